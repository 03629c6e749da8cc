"""The shape of the package: the import contract of ``.importlinter``, and packages that know each other by faces."""

from __future__ import annotations

import ast
import importlib
import logging
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from importlinter import cli

import ddit_rt

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Import:
    """One ``from module import name``, or ``import module`` with an empty name."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name or 'it'} from {self.module}"


def imports_of(folder: str) -> Iterator[Import]:
    """All imports of the package, absolute, in the modules below a folder of the repository."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        importer = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (Import(importer, alias.name, "", node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                module = ".".join([*above, *([node.module] if node.module else [])])
                yield from (Import(importer, module, alias.name, node.lineno) for alias in node.names)


def is_package(name: str) -> bool:
    return (ROOT / Path(*name.split(".")) / "__init__.py").is_file()


def packages() -> Iterator[ModuleType]:
    yield ddit_rt
    for module in pkgutil.walk_packages(ddit_rt.__path__, "ddit_rt."):
        if module.ispkg:
            yield importlib.import_module(module.name)


def room(module: str) -> str:
    """``ddit_rt.granularity`` of any module within it."""
    return ".".join(module.split(".")[:2])


def offered(found: Import) -> bool:
    """Whether what is imported is a face itself, or named by it."""
    return not found.name or found.name in importlib.import_module(found.module).__all__


def test_imports_keep_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    kept = cli.lint_imports(str(ROOT / ".importlinter"), no_cache=True) == cli.EXIT_STATUS_SUCCESS
    # it configures logging, which disables every logger that there is: later tests would hear nothing
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    assert kept, capsys.readouterr().out


def test_packages_import_each_other_by_their_faces() -> None:
    foreign = [found for found in imports_of("ddit_rt") if is_package(room(found.module))]
    foreign = [found for found in foreign if found.module != "ddit_rt" and room(found.module) != room(found.importer)]
    inside = [str(found) for found in foreign if found.module != room(found.module) or not offered(found)]
    assert not inside, "\n".join(inside)


def test_examples_import_the_package_by_its_faces() -> None:
    used = [found for found in imports_of("examples") if found.module.split(".")[0] == "ddit_rt"]
    inside = [str(found) for found in used if not is_package(found.module) or not offered(found)]
    assert used and not inside, "\n".join(inside)


def test_no_face_hides_a_module() -> None:
    hidden = [
        f"{package.__name__} exports {name}, the name of its module"
        for package in packages()
        for name in getattr(package, "__all__", ())
        if name in {module.name for module in pkgutil.iter_modules(package.__path__)}
        and not isinstance(getattr(package, name), ModuleType)
    ]
    assert not hidden, "\n".join(hidden)


def test_the_kernels_folder_is_no_package() -> None:
    # a top-level `kernels` would shadow the Hugging Face package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_these_tests_read_is_read_rightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ddit_rt" / "cli").mkdir(parents=True)
    (tmp_path / "ddit_rt" / "cli" / "__init__.py").write_text("from ..schedule import a\nfrom .root import b\n")
    (tmp_path / "ddit_rt" / "cli" / "root.py").write_text("def f():\n    from .. import c\n    import ddit_rt.ops.d\n")
    monkeypatch.setattr(__name__ + ".ROOT", tmp_path)
    assert [(found.importer, found.module, found.name) for found in imports_of("ddit_rt")] == [
        ("ddit_rt.cli", "ddit_rt.schedule", "a"),
        ("ddit_rt.cli", "ddit_rt.cli.root", "b"),
        ("ddit_rt.cli.root", "ddit_rt", "c"),
        ("ddit_rt.cli.root", "ddit_rt.ops.d", ""),
    ]
