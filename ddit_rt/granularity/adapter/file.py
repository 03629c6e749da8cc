"""Adapters as files: one safetensors file whose metadata says what the adapter is. Reading it executes no code."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import AdapterMismatchError, ConfigError
from .model import Adapter, AdapterSpec

FORMAT = 2
FILE_NAME = "adapter.safetensors"
_KEY = "ddit_adapter"


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
        AdapterMismatchError: there is no such file, or it is no adapter, or its tensors are not what it says it holds.
    """
    if isinstance(source, Adapter):
        return copy.deepcopy(source).requires_grad_(False).eval()
    path = _find(source, revision)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {_inner_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterMismatchError(f"{path} cannot be read as safetensors ({error}): is it cut short?") from error
    adapter = Adapter(_spec(path, metadata))
    _check_state(path, adapter.state_dict(), state)
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
    import tempfile

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(adapter, directory)
        (Path(directory) / "README.md").write_text(model_card(adapter, repo_id), encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="ddit_rt adapter"))


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


def _find(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return path
    name = str(source)
    if isinstance(source, str) and name.count("/") == 1 and path.suffix != ".safetensors" and not path.is_absolute():
        try:
            return Path(hf_hub_download(name, FILE_NAME, revision=revision))
        except (OSError, ValueError, HFValidationError) as error:
            raise AdapterMismatchError(
                f"adapter={name!r}: neither a local path nor {FILE_NAME} of a reachable hub repository ({error})."
            ) from error
    raise AdapterMismatchError(f"adapter={name!r}: there is no such file.")


def _spec(path: Path, metadata: Mapping[str, str]) -> AdapterSpec:
    if _KEY not in metadata:
        raise AdapterMismatchError(f"{path} is no ddit_rt adapter: its metadata has no {_KEY!r} entry.")
    try:
        values: dict[str, Any] = json.loads(metadata[_KEY])
        version = values.pop("format")
        if version != FORMAT:
            raise AdapterMismatchError(
                f"{path} has format {version!r}, this version reads {FORMAT}: "
                + ("train it anew." if version == 1 else "update ddit_rt.")
            )
        known = {field.name for field in fields(AdapterSpec)}
        values["multiples"] = tuple(values["multiples"])
        values["fingerprint"] = tuple(values["fingerprint"])
        values["layers"] = {str(name): (int(sizes[0]), int(sizes[1])) for name, sizes in values["layers"].items()}
        return AdapterSpec(**{name: value for name, value in values.items() if name in known})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ConfigError) as error:
        if isinstance(error, AdapterMismatchError):
            raise
        raise AdapterMismatchError(f"{path}: its description cannot be used ({error!r}).") from error


def _check_state(path: Path, expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    problems = [f"{_outer_name(name)} is missing" for name in expected if name not in state]
    problems += [f"{_outer_name(name)} is unknown" for name in state if name not in expected]
    problems += [
        f"{_outer_name(name)} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [
        f"{_outer_name(name)} holds values that are not finite"
        for name, tensor in state.items()
        if not bool(torch.isfinite(tensor.float()).all())
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AdapterMismatchError(f"{path}: {'; '.join(problems[:5])}{more}.")


def _outer_name(name: str) -> str:
    """Names as peft writes them: loras.<size>.<layer path>.lora_A.weight."""
    return name.replace(".pairs.", ".").replace("/", ".")


def _inner_name(name: str) -> str:
    if not name.startswith("loras."):
        return name
    head, size, rest = name.split(".", 2)
    layer, matrix, weight = rest.rsplit(".", 2)
    return f"{head}.{size}.pairs.{layer.replace('.', '/')}.{matrix}.{weight}"
