"""Runs methods x prompts x seeds, one after the other on one machine, and remembers what is done."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from .. import __version__
from ..errors import ConfigError
from ..families import denoisers, family_of
from ..files import write_text_whole
from ..pipeline import frame_rate, makes_videos
from ..trajectories import Outcome, can_encode, check_deterministic_flow, save
from .baselines import find_library
from .columns import FRAMES, MEASURED
from .measurement import generate
from .methods import Method
from .metrics import PAIRED, TO_CONVERGED
from .references import ConvergedPictures
from .settings import check_methods, run_settings
from .video_metrics import CLIP, psnr_of_frames

ROWS = "rows*.jsonl"
PLAN = "plan.json"

Row = dict[str, Any]


@dataclass
class Plan:
    """What a sweep runs; written beside its rows, so that it can be resumed and read later.

    Attributes:
        model: Name of the pipeline, for the record.
        methods: See :class:`Method`.
        prompts: One picture or video each per seed.
        seeds: Of the noise; prompt i takes seed + 1000 i.
        call: Arguments of the pipeline besides prompt and steps, JSON-ready.
        metrics: Of :data:`~ddit_rt.evaluate.columns.MEASURED`.
        converged: Compare with the converged picture too, which costs two plain runs per prompt and seed.
    """

    model: str
    methods: list[Method]
    prompts: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    call: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])
    converged: bool = True

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if not self.prompts or not self.seeds:
            raise ConfigError("a sweep needs at least one prompt and one seed.")
        unknown = [name for name in self.metrics if name not in MEASURED]
        if unknown:
            raise ConfigError(f"metrics={unknown}: take from {', '.join(MEASURED)}.")

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "methods": [method.to_dict() for method in self.methods]}

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a folder.

        Raises:
            ConfigError: there is none.
        """
        path = folder / PLAN
        if not path.is_file():
            raise ConfigError(f"{folder} holds no evaluation: there is no {PLAN} in it.")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8"))["plan"])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """What :meth:`to_dict` gave, here or in a version that knew no converged picture."""
        return cls(**{**_BEFORE, **values, "methods": [Method(**method) for method in values["methods"]]})

    def write(self, folder: Path, pipe: Any = None) -> None:
        """Writes the plan with machine and versions, or checks that the folder belongs to this plan.

        A plan with further methods, or further prompts after the same ones, replaces the folder's.

        Args:
            folder: Is made if it is not there.
            pipe: What runs the plan; its dtype is recorded, or compared with what the folder has, if it has one.

        Raises:
            ConfigError: the folder holds another evaluation, or one in another dtype.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PLAN
        dtype = {} if pipe is None else {"dtype": dtype_of(pipe)}
        content = {"plan": json.loads(json.dumps(self.to_dict())), "machine": machine() | dtype}
        if not path.exists():
            # shards may begin at once, and each reads what another has written
            write_text_whole(path, json.dumps(content, indent=1))
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        before = {**_BEFORE, **known["plan"]}
        if all(method in content["plan"]["methods"] for method in before["methods"]):
            before = {**before, "methods": content["plan"]["methods"]}
        if content["plan"]["prompts"][: len(before["prompts"])] == before["prompts"]:
            before = {**before, "prompts": content["plan"]["prompts"]}
        changed = [name for name, value in content["plan"].items() if before.get(name) != value]
        if changed:
            raise ConfigError(
                f"{folder} holds an evaluation with other {', '.join(changed)}: choose another output folder."
            )
        begun = known["machine"].get("dtype")
        if begun is not None and dtype.get("dtype", begun) != begun:
            raise ConfigError(
                f"{folder} holds an evaluation in {begun}, this pipeline is in {dtype['dtype']}: go on with "
                f"--dtype {begun}, or choose another output folder."
            )
        if any(before[name] != known["plan"][name] for name in ("methods", "prompts")):
            write_text_whole(path, json.dumps({**known, "plan": before}, indent=1))


_BEFORE = {"converged": False}
"""Fields that the plans of earlier versions lack."""


def machine() -> dict[str, Any]:
    """What a timing depends on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else (platform.processor() or platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ddit_rt": __version__,
        "python": platform.python_version(),
    }


def dtype_of(pipe: Any) -> str:
    """That of the pipeline's transformers, as ``--dtype`` names it."""
    found = {str(module.dtype).removeprefix("torch.") for module in denoisers(pipe, family_of(pipe)).values()}
    return ", ".join(sorted(found))


def read_rows(folder: Path) -> list[Row]:
    """All finished rows of a folder, in any order; a line that a kill cut short is left out."""
    rows = []
    for path in sorted(folder.glob(ROWS)):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


class RowWriter:
    """Appends rows to a JSONL file, each of them on disk before the next begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            kept = path.read_text(encoding="utf-8")
            if kept and not kept.endswith("\n"):
                path.write_text(kept[: kept.rfind("\n") + 1], encoding="utf-8")

    def add(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def turns(methods: Sequence[Method], turn: int) -> list[Method]:
    """References first, since the others are compared with them; the rest from another one each time, and backwards
    every other time, so that no method always runs in the wake of the same one."""
    references = [method for method in methods if method.is_reference]
    others = [method for method in methods if not method.is_reference]
    start = turn * 7 % len(others) if others else 0
    turned = others[start:] + others[:start]
    return references + (turned[::-1] if turn % 2 else turned)


def run_sweep(
    pipe: Any,
    plan: Plan,
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    warmup_runs: int | None = None,
    pictures: bool = True,
    progress: bool = True,
) -> list[Row]:
    """Runs what is missing of a plan.

    Every row holds ``method``, ``prompt`` (index), ``seed``, ``seconds``, ``reference_seconds`` (of the plain run in
    the same turn, under the same load), ``peak_bytes`` (CUDA), ``schedule``, ``tokens``, ``cached`` and
    ``speedup_estimate`` (of the report, where there is one), and a value per metric, to the plain picture and, as
    ``METRIC_converged``, to the converged one; the plain picture's own row has both. Rows of videos have
    ``psnr_frames`` too, and metrics of clips to the plain clip alone. Another library that says how many steps it
    cached has ``cached`` too; those steps still run a few blocks. Lines with ``flops`` hold what the
    transformer executed for the first prompt, counted in a separate run that warms up and is not timed.

    Args:
        pipe: The pipeline; left plain.
        plan: What to run.
        folder: For plan, rows and pictures, converged ones among them. A folder that was begun with the same plan is
            continued.
        shard: (i, n): takes every n-th prompt from the i-th on; the rows of all shards of a folder are read together.
        warmup_runs: Untimed calls before each timed one; None takes 1 on CUDA, where graphs are captured then.
        pictures: Keep the pictures or videos, in ``pictures/METHOD/``.
        progress: Show a bar.

    Returns:
        All rows of the folder.

    Raises:
        ConfigError: the folder holds another evaluation or one in another dtype, a library that the plan names is not
            installed, the pipeline's pictures have no converged one, or metrics of clips are asked for of a pipeline
            that makes none.
    """
    of_clips = [name for name in plan.metrics if name in CLIP]
    if of_clips and not makes_videos(pipe):
        raise ConfigError(f"metrics={','.join(of_clips)}: {type(pipe).__name__} makes no videos.")
    if plan.converged:
        _require_converged(pipe)
    for method in plan.methods:
        if method.other_library is not None:
            library, options = find_library(method.name, method.other_library)
            library.require(method.name, options)
    plan.write(folder, pipe)
    index, count = shard
    writer = RowWriter(folder / (f"rows-{index}-of-{count}.jsonl" if count > 1 else "rows.jsonl"))
    done = {(row["method"], row["prompt"], row["seed"]) for row in read_rows(folder) if "seconds" in row}
    counted = {row["method"] for row in read_rows(folder) if "flops" in row}
    mine = [(p, s) for p in range(index, len(plan.prompts), count) for s in plan.seeds]
    missing = sum((m.name, p, s) not in done for m in plan.methods for p, s in mine)
    if warmup_runs is None:
        warmup_runs = 1 if torch.cuda.is_available() else 0
    scorers = {name: PAIRED[name]() for name in plan.metrics if name in PAIRED}
    clip_scorers = {name: CLIP[name]() for name in of_clips}
    fps = frame_rate(plan.model)
    converged = ConvergedPictures(folder, pipe) if plan.converged else None
    names = video_names(plan.prompts)
    with tqdm(total=missing, disable=not progress, unit="run") as bar:
        for method in plan.methods[index::count]:
            if method.name not in counted:
                bar.set_description(f"{method.name:<28.28} (FLOP)")
                writer.add({"method": method.name, "flops": _count(pipe, method, plan)})
        for turn, (prompt, seed) in enumerate(mine):
            todo = [m for m in plan.methods if (m.name, prompt, seed) not in done]
            needed = {method.reference for method in todo if not method.is_reference}
            # a reference that is done runs again where a comparison with it is missing
            again = [m for m in plan.methods if m.is_reference and m.steps in needed and m not in todo]
            bases: dict[int, Outcome] = {}
            limit = None
            if converged is not None and todo:
                bar.set_description(f"{'converged':<28.28} prompt {prompt}")
                limit = converged.get(prompt, seed, noise_seed(seed, prompt), _call(plan, _longest(plan), prompt))
            for method in turns([*again, *todo], turn):
                bar.set_description(f"{method.name:<28.28} prompt {prompt}")
                row, outcome = _measure(pipe, method, plan, prompt, seed, warmup_runs)
                if method.is_reference:
                    bases[method.steps] = outcome
                if method in again:
                    continue
                row["reference_seconds"] = bases[method.reference].seconds
                plain = bases[method.reference].frames
                row |= _score(scorers, outcome.frames, plain) | _score(clip_scorers, outcome.frames, plain)
                if plain.ndim == 5:
                    row[FRAMES] = psnr_of_frames(outcome.frames, plain)
                if limit is not None:
                    found = _score(scorers, outcome.frames, limit)
                    row |= {TO_CONVERGED[name]: value for name, value in found.items()}
                if pictures:
                    kept = folder / "pictures" / method.name
                    _keep(outcome.frames, kept, names[prompt], prompt, seed, fps)
                writer.add(row)
                bar.update()
    return read_rows(folder)


def _call(plan: Plan, method: Method, prompt: int) -> dict[str, Any]:
    return {**plan.call, "prompt": plan.prompts[prompt], "num_inference_steps": method.steps}


def _longest(plan: Plan) -> Method:
    """The plain run of the most steps: the converged one takes its noise levels."""
    return max((method for method in plan.methods if method.is_reference), key=lambda method: method.steps)


def _require_converged(pipe: Any) -> None:
    try:
        check_deterministic_flow(pipe)
    except ConfigError as error:
        raise ConfigError(
            f"{error} An evaluation without the converged picture: Plan(converged=False), ddit-rt eval --no-converged."
        ) from None


def noise_seed(seed: int, prompt: int) -> int:
    """Of the noise that a plan's prompt of this number begins from."""
    return seed + 1000 * prompt


def _count(pipe: Any, method: Method, plan: Plan) -> float | None:
    noise = noise_seed(plan.seeds[0], 0)
    return generate(pipe, run_settings(method), noise, count_flops=True, **_call(plan, method, 0)).flops


def _measure(pipe: Any, method: Method, plan: Plan, prompt: int, seed: int, warmup_runs: int) -> tuple[Row, Outcome]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    outcome = generate(
        pipe, run_settings(method), noise_seed(seed, prompt), warmup_runs=warmup_runs, **_call(plan, method, prompt)
    )
    row: Row = {"method": method.name, "prompt": prompt, "seed": seed, "seconds": outcome.seconds}
    if torch.cuda.is_available():
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if outcome.report is not None:
        steps = outcome.report.steps
        row["schedule"] = outcome.report.schedule
        row["tokens"] = sum(step.tokens for step in steps if step.executed != "cached")
        row["cached"] = sum(step.executed == "cached" for step in steps)
        row["speedup_estimate"] = outcome.report.speedup_estimate
    elif outcome.cached is not None:
        row["cached"] = outcome.cached
    return row, outcome


def _score(scorers: Mapping[str, Any], frames: torch.Tensor, base: torch.Tensor) -> dict[str, float]:
    return {name: float(scorer(frames, base)) for name, scorer in scorers.items()}


def video_names(prompts: Sequence[str]) -> list[str]:
    """What the videos of each prompt are called, before ``-SEED``: the prompt itself, as VBench reads it.

    One that is too long for a file system is cut. That, and one that has the name of an earlier prompt, ends in its
    number; further prompts of a plan change no name.
    """
    names: dict[str, None] = {}
    for index, prompt in enumerate(prompts):
        name = prompt.replace("/", " ")
        cut = name.encode()[:_LONGEST].decode(errors="ignore")
        if cut != name or name in names:
            name = f"{cut}-{index:04d}"
        while name in names:  # an earlier prompt that ends in this very number
            name += "-"
        names[name] = None
    return list(names)


_LONGEST = 200  # bytes of a prompt in a name: file systems take 255, number, seed and ending among them


def picture_path(folder: Path, name: str, index: int, seed: int, video: bool) -> Path:
    """Where a picture or video lies; ``name`` is the prompt's of :func:`video_names`."""
    return folder / (f"{name}-{seed}.mp4" if video else f"{index:04d}-{seed}.png")


def _keep(frames: torch.Tensor, folder: Path, name: str, index: int, seed: int, fps: int) -> None:
    video = frames.ndim == 5
    path = picture_path(folder, name, index, seed, video)
    if not video or can_encode():
        save(frames, path, fps)
    else:
        for number in range(frames.shape[1]):
            save(frames[:, number], path.with_suffix("") / f"{number:04d}.png")


def holds_videos(plan: Plan, folder: Path) -> bool:
    """Whether what a sweep has kept are videos."""
    kept = (path for method in plan.methods for _, _, path in pictures_of(folder, plan, method))
    return next((path.suffix != ".png" for path in kept), False)


def pictures_of(folder: Path, plan: Plan, method: Method) -> Iterator[tuple[int, int, Path]]:
    """(prompt index, seed, path) of the pictures that are there: a picture, a video, or the folder of its frames."""
    kept = folder / "pictures" / method.name
    for index, name in enumerate(video_names(plan.prompts)):
        for seed in plan.seeds:
            video = picture_path(kept, name, index, seed, True)
            places = (picture_path(kept, name, index, seed, False), video, video.with_suffix(""))
            found = next((path for path in places if path.exists()), None)
            if found is not None:
                yield index, seed, found
