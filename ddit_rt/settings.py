"""What settings have in common: frozen, checked, refused in this package's words, read from small files."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, DDiTError

MAX_FILE_BYTES = 2**18  # of a file of settings or of a schedule; ten thousand steps fit
YAML_ENDINGS, JSON_ENDING = (".yaml", ".yml"), ".json"


@dataclass(frozen=True)
class Expected:
    """What a field has to hold, in the words of the error message; stands in the field's annotation."""

    text: str


class Settings(BaseModel):
    """Frozen settings that take numbers of any kind and raise errors of this package.

    A field whose values are not listed by a ``Literal`` has an :class:`Expected` in its annotation, or a validator that
    raises the error itself.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    prefix: ClassVar[str] = ""
    """Stands before a field's name in messages."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**{name: plain_number(value) for name, value in values.items()})
        except ValidationError as error:
            raise self._translated(error, values) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(f"{name}={shown(value)}: settings do not change, take .replace({name}=...).")

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked as at construction.

        Raises:
            ConfigError: an unknown name, or a value out of range. A class may raise further errors.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**kept, **changes})

    @classmethod
    def check_names(cls, *groups: Mapping[str, Any]) -> None:
        """Refuses names that are no field.

        Raises:
            ConfigError: naming the first of them, and the fields.
        """
        for name in (name for group in groups for name in group):
            if name not in cls.model_fields:
                known = ", ".join(sorted(cls.model_fields))
                raise ConfigError(f"unknown setting {shown(name)}: {cls.__name__} has {known}.")

    @classmethod
    def _translated(cls, error: ValidationError, values: Mapping[str, Any]) -> DDiTError:
        try:
            cls.check_names(values)
        except ConfigError as unknown:
            return unknown
        first = error.errors(include_url=False)[0]
        name, own = str(first["loc"][0]), first.get("ctx", {}).get("error")
        if isinstance(own, DDiTError):
            return own
        field = cls.model_fields[name]
        if get_origin(field.annotation) is Literal:
            expected = f"use one of {', '.join(map(repr, get_args(field.annotation)))}."
        else:
            expected = next(item.text for item in field.metadata if isinstance(item, Expected))
        return ConfigError(f"{cls.prefix}{name}={shown(values[name])}: {expected}")


def plain_number(value: Any) -> Any:
    """The Python number or truth value equal to a number of any library; other values as they are."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            return value  # for the check of the field to refuse
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return value


def is_whole(value: object) -> bool:
    """Whether a value is an integer of any library, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 24


def shown(value: object) -> str:
    """``repr`` for an error message, cut where the value is long."""
    return _SHORT.repr(value)


def read_json(path: Path, name: str) -> Any:
    """The value in a small JSON file. Arguments and errors as of :func:`read_text`."""
    text = read_text(path, name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}={str(path)!r} holds no JSON ({error}).") from None


def read_yaml(path: Path, name: str) -> Any:
    """The plain data in a small YAML file without aliases. Arguments and errors as of :func:`read_text`."""
    text = read_text(path, name)
    try:
        return _load_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{name}={str(path)!r} holds no YAML ({error}).") from None


def parse_yaml(text: str, name: str) -> Any:
    """The plain data in a line of YAML without aliases.

    Raises:
        ConfigError: it is none; ``name`` is the argument's, for the message.
    """
    try:
        return _load_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{name}={shown(text)} is no YAML ({error}).") from None


# PyYAML's constructors let the errors of int(), datetime() and table look-ups through
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # a few lines of them can stand for more memory than there is
            raise yaml.YAMLError("aliases (*name) are not taken: write the value out")
        return super().compose_node(parent, index)


# 1e-3 is a number, as in YAML 1.2 and in JSON; PyYAML asks for 1.0e-3
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_text(path: Path, name: str) -> str:
    """The text of a small file in UTF-8.

    Args:
        path: Of the file.
        name: Of the argument that named it, for the messages.

    Raises:
        ConfigError: there is no such file, it holds more than ``MAX_FILE_BYTES``, or something other than text.
    """
    if not path.is_file():
        raise ConfigError(f"{name}={str(path)!r}: there is no such file.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}={str(path)!r} cannot be read ({error}).") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}={str(path)!r} is larger than {MAX_FILE_BYTES} bytes: is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}={str(path)!r} is no text in UTF-8 ({error}).") from None
