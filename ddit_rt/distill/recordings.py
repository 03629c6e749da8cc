"""Recordings of a data source on disk, made when they are first asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from PIL import Image

from ..errors import ConfigError
from ..families import Family
from ..families import fingerprint as fingerprint_of_model
from ..files import write_text_whole
from ..granularity import fingerprint
from ..schedule import describe_scheduler
from ..settings import shown
from ..trajectories import Recording, Shard, sole_transformer
from .data import Source

GROUP = 4  # items recorded by one pipeline call
_SIZE = ("height", "width", "num_frames")
_LATER = ("scheduler", "weights")  # manifests did not have them at first


class Library:
    """Shards of recordings in a directory.

    Args:
        directory: Of the shards; a manifest in it says what they were made from.
        make: Shard number -> its recording.
        count: Shards in all.
        held: Of these, at the end, for validation.
        manifest: JSON-ready description of model, scheduler, calls and data.
        dtype: Of stored latents and predictions.

    Attributes:
        training: Numbers of the shards that are trained on.
        held_out: Of those that are kept for validation.
        manifest: As it was given, as it reads from a file.
        calls: Arguments of the pipeline calls that were recorded.

    Raises:
        ConfigError: the directory holds recordings of something else, or its manifest cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        make: Callable[[int], Recording],
        count: int,
        held: int,
        manifest: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.count = count
        self.training, self.held_out = range(count - held), range(count - held, count)
        self.dtype = dtype
        self._directory, self._make = directory, make
        self._open: dict[int, Shard] = {}
        directory.mkdir(parents=True, exist_ok=True)
        path, text = directory / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        self.manifest: dict[str, Any] = json.loads(text)
        self.calls = manifest.get("calls", [])
        if not path.exists():
            # the processes of a run open the same directory at once
            write_text_whole(path, text)
        changed = manifest_differences(_read(path), self.manifest)
        if changed:
            raise ConfigError(
                f"{directory} holds recordings of another model, scheduler, call or data ({'; '.join(changed)}): "
                "choose another directory, or delete it."
            )

    def path(self, index: int) -> Path:
        return self._directory / f"shard-{index:06d}.safetensors"

    def shard(self, index: int) -> Shard:
        """Opens a shard, recording it first if it is not there."""
        if index not in self._open:
            if not self.path(index).exists():
                self._make(index).save(self.path(index), self.dtype)
            self._open[index] = Shard(self.path(index))
        return self._open[index]


def open_library(
    directory: Path,
    pipe: Any,
    family: Family,
    source: Source,
    calls: Sequence[Mapping[str, Any]],
    held_out: int,
    seed: int,
) -> Library:
    """The recordings of ``source``, in groups of items.

    Args:
        directory: Of the shards.
        pipe: A plain pipeline with one transformer.
        family: Of the transformer.
        source: What the base model is shown.
        calls: Arguments of the pipeline, all of one size; the groups take turns.
        held_out: Items at the end that are kept for validation.
        seed: Of the noise.

    Raises:
        ConfigError: nothing is left to train on, the calls differ in size, or the directory holds something else.
    """
    items = len(source.captions)
    if items <= held_out:
        raise ConfigError(f"{items} items, {held_out} of them held out for validation: none is left to train on.")
    for name in _SIZE:
        values = list(dict.fromkeys(call.get(name) for call in calls))
        if len(values) > 1:
            raise ConfigError(f"{name} is {', '.join(map(str, values))}: calls that take turns have one size.")
    first, last = _groups(0, items - held_out), _groups(items - held_out, items)
    groups = first + last

    def make(index: int) -> Recording:
        # counted from the beginning of either part, so that both hold every call
        turn = index if index < len(first) else index - len(first)
        return source.record(pipe, family, calls[turn % len(calls)], groups[index], seed)

    base = unwrap_module(sole_transformer(pipe, family))
    manifest = {
        "family": family.name,
        "model": list(fingerprint(family.projections(base).embed_weight, 8)),  # all that earlier manifests have
        "weights": fingerprint_of_model(base),
        "scheduler": describe_scheduler(pipe.scheduler),
        "calls": [{name: _told(value) for name, value in call.items() if name != "generator"} for call in calls],
        "data": source.describe(),
        "held_out": held_out,
        "seed": seed,
    }
    # half precision keeps 3 digits, finer than what is learned; float16 the most of them
    dtype = next(base.parameters()).dtype
    stored = torch.float16 if dtype == torch.float32 else dtype
    return Library(directory, make, len(groups), len(last), manifest, stored)


def manifest_differences(kept: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """``name: kept value, own value`` for every entry that differs; what earlier versions did not keep is not compared.

    Args:
        kept: Manifest of recordings, or of the run that a checkpoint is of, from a file.
        own: Of this run.
    """
    names = [name for name in sorted({*kept, *own}) if name in kept or name not in _LATER]
    pairs = {name: (kept.get(name), own.get(name)) for name in names}
    return [f"{name}: {_brief(theirs)}, {_brief(ours)}" for name, (theirs, ours) in pairs.items() if theirs != ours]


def _brief(value: Any) -> str:
    """A scheduler's text whole, as a cut one could hide what differs; lists of calls cut."""
    return repr(value) if isinstance(value, str) else shown(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r}): choose another directory, or delete {path.parent}."
        ) from error


def _told(value: Any) -> Any:
    """A call's argument for the manifest; pictures and tensors, such as references, by what they hold."""
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    if isinstance(value, Image.Image):
        return f"picture {value.width}x{value.height} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    return value


def _groups(start: int, stop: int) -> list[list[int]]:
    return [list(range(i, min(i + GROUP, stop))) for i in range(start, stop, GROUP)]
