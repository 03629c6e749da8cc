"""Adapters as files: one safetensors file whose metadata says what the adapter is.

Reading one executes no code, and takes no memory before sizes, names and shapes have been checked.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import AdapterMismatchError, ConfigError
from ...hub import find_file, push_file
from ...settings import shown
from .model import Adapter, AdapterSpec

FORMAT = 2
FILE_NAME = "adapter.safetensors"
_KEY = "ddit_adapter"
_MAX_HEADER_BYTES = 2**22  # tens of times what an adapter of FLUX.1-dev needs
_DTYPES = ("F64", "F32", "F16", "BF16")
_DESCRIPTION = TypeAdapter(AdapterSpec)


def save_adapter(adapter: Adapter, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes an adapter as one safetensors file, through a temporary file beside it.

    Args:
        adapter: Trained or fresh.
        path: The file, or an existing directory for ``adapter.safetensors`` inside it.
        dtype: Of the stored weights; None keeps them as they are.

    Returns:
        The file's path.
    """
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    state = {
        _outer_name(name): tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in adapter.state_dict().items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    save_file(state, temporary, metadata={_KEY: json.dumps({"format": FORMAT, **asdict(adapter.spec)})})
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return target


def load_adapter(source: str | Path | Adapter, revision: str | None = None) -> Adapter:
    """Reads an adapter, checking its description and the shape of every tensor; no code of the file is executed.

    Args:
        source: Path of a file, of a directory that holds ``adapter.safetensors``, or a Hugging Face hub id
            ``owner/name``. An :class:`Adapter` is copied.
        revision: Of the hub repository.

    Returns:
        The adapter on the CPU, frozen, in evaluation mode.

    Raises:
        ConfigError: ``source`` is none of these.
        AdapterMismatchError: there is no such file, or it is no adapter, or its tensors are not what it says it holds.
    """
    if isinstance(source, Adapter):
        return copy.deepcopy(source).requires_grad_(False).eval()
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"adapter={shown(source)}: a file, a directory, a hub id or a ddit_rt.Adapter.")
    path = find_file(source, FILE_NAME, revision, "adapter", AdapterMismatchError)
    if not path.is_file():
        raise AdapterMismatchError(f"adapter={str(path)!r}: there is no such file.")
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            names = {_inner_name(name): name for name in file.keys()}  # noqa: SIM118 (no mapping)
            adapter = _described(path, file.metadata() or {}, len(names))
            _check_tensors(path, adapter.state_dict(), {inner: file.get_slice(name) for inner, name in names.items()})
            state = {inner: file.get_tensor(name) for inner, name in names.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterMismatchError(f"{path} cannot be read as safetensors ({error}): is it cut short?") from error
    _raise_if_any(
        path,
        [f"{_outer_name(n)} holds values that are not finite" for n, t in state.items() if not t.isfinite().all()],
    )
    adapter.load_state_dict(state, assign=True)
    return adapter.requires_grad_(False).eval()


def push_to_hub(adapter: Adapter, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads an adapter with a model card to the Hugging Face hub, creating the repository if need be.

    Args:
        adapter: Trained.
        repo_id: ``owner/name``; :func:`load_adapter` and ``accelerate(pipe, adapter=...)`` take it.
        private: For a new repository.
        token: Of the hub; None takes the one logged in with.

    Returns:
        The commit's address.
    """
    return push_file(
        repo_id,
        lambda directory: save_adapter(adapter, directory),
        model_card(adapter, repo_id),
        "ddit_rt adapter",
        private,
        token,
    )


def model_card(adapter: Adapter, repo_id: str) -> str:
    """The hub's README of an adapter, in Markdown."""
    spec = adapter.spec
    sizes = ", ".join(f"{k}p" for k in spec.multiples)
    lines = [
        "---",
        "library_name: ddit_rt",
        "tags: [ddit, diffusion, acceleration, lora]",
        *([f"base_model: {spec.base_model}"] if "/" in spec.base_model and not Path(spec.base_model).exists() else []),
        "---",
        "",
        f"# DDiT adapter for {spec.base_model or spec.family}",
        "",
        f"Lets the model take denoising steps at patch sizes {sizes} beside its own (DDiT, arXiv 2602.16968).",
        "",
        "```python",
        f'ddit_rt.accelerate(pipe, adapter="{repo_id}")',
        "```",
        "",
        f"LoRA rank {spec.rank} on {len(spec.layers)} layers.",
        f"Training: `{json.dumps(dict(spec.training))}`",
    ]
    return "\n".join(lines) + "\n"


def _check_header(path: Path) -> None:
    """A header that is longer than its file, or than any adapter's, is not read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if not claimed <= min(size - 8, _MAX_HEADER_BYTES):
        raise AdapterMismatchError(
            f"{path} cannot be read as safetensors (a file of {size} bytes, its header would have {claimed}): is it "
            "cut short?"
        )


def _described(path: Path, metadata: Mapping[str, str], tensors: int) -> Adapter:
    """The adapter that a file describes, on the meta device."""
    if _KEY not in metadata:
        raise AdapterMismatchError(f"{path} is no ddit_rt adapter: its metadata has no {_KEY!r} entry.")
    try:
        values = json.loads(metadata[_KEY])
        version = values["format"]
        if version != FORMAT:
            raise AdapterMismatchError(
                f"{path} has format {shown(version)}, this version reads {FORMAT}: "
                + ("train it anew." if version == 1 else "update ddit_rt.")
            )
        spec = _DESCRIPTION.validate_json(metadata[_KEY])
        if tensors < 2 * len(spec.layers):
            raise AdapterMismatchError(
                f"{path} describes LoRA on {len(spec.layers)} layers and holds {tensors} tensors."
            )
        return Adapter(spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in first["loc"])
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise AdapterMismatchError(f"{path}: its description cannot be used ({place}{reason}).") from error
    # no mapping or no JSON, and names of layers that a module has for something else
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, AdapterMismatchError):
            raise
        raise AdapterMismatchError(f"{path}: its description cannot be used ({error!r}).") from error


def _check_tensors(path: Path, expected: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> None:
    problems = [f"{_outer_name(name)} is missing" for name in expected if name not in found]
    problems += [f"{_outer_name(name)} is unknown" for name in found if name not in expected]
    problems += [
        f"{_outer_name(name)} is {tuple(found[name].get_shape())}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and tuple(found[name].get_shape()) != tuple(tensor.shape)
    ]
    dtypes = sorted({piece.get_dtype() for piece in found.values()})
    if len(dtypes) > 1 or not set(dtypes) <= set(_DTYPES):
        problems.append(f"its tensors are {', '.join(dtypes)}, expected one of {', '.join(_DTYPES)} for all")
    _raise_if_any(path, problems)


def _raise_if_any(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterMismatchError(f"{path}: {'; '.join(problems[:5])}{more}.")


def _outer_name(name: str) -> str:
    """Names as peft writes them: loras.<size>.<layer path>.lora_A.weight."""
    return name.replace(".pairs.", ".").replace("/", ".")


def _inner_name(name: str) -> str:
    """Undoes :func:`_outer_name`; a name that is none of a LoRA's stays as it is."""
    found = re.fullmatch(r"loras\.(\w+)\.([\w.]+)\.(lora_[AB])\.weight", name)
    if found is None:
        return name
    size, layer, matrix = found.groups()
    return f"loras.{size}.pairs.{layer.replace('.', '/')}.{matrix}.weight"
