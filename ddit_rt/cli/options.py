"""Every option that commands share, defined once, and how options that hold lists or JSON are read."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..files import check_output

# -- the model and where it runs ------------------------------------------------------------------------------------

_MODEL = typer.Argument(help="'demo', 'demo-256', 'demo-video', a folder in diffusers format, or a hub id.")
Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default bfloat16 on CUDA.")]
Adapter = Annotated[str | None, typer.Option(help="Trained adapter for coarse steps: a file, a folder or a hub id.")]
Quantize = Annotated[
    str | None, typer.Option(help="Blocks in few bits: fp8, int8, int4, fp8-weights, int8-weights, or auto.")
]
# torch takes 64 bits; half of them are left to the seeds counted on from it
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]

# -- one call of the pipeline; None leaves the value to the model ---------------------------------------------------

_STEPS = typer.Option(help="Denoising steps.")
Height = Annotated[int | None, typer.Option(help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a video.")]
Steps = Annotated[int, _STEPS]
StepsOfModel = Annotated[int | None, _STEPS]
Guidance = Annotated[float | None, typer.Option(help="guidance_scale of the pipeline.")]
CallArguments = Annotated[
    str, typer.Option("--call", help="Further arguments of the pipeline as JSON, such as '{\"true_cfg_scale\": 1}'.")
]

# -- prompts --------------------------------------------------------------------------------------------------------

PromptSource = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="'demo', 'demo-video', 'drawbench', 'partiprompts', 'coco', a hub id, or a .txt, .csv, .tsv, .json(l).",
        show_default="captions of the model's own world, or of the demo's",
    ),
]
PromptList = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")]
Count = Annotated[int, typer.Option("--count", help="How many of the prompts.", min=1)]

# -- how the pipeline is accelerated --------------------------------------------------------------------------------

Coarse = Annotated[str, typer.Option(help="What a coarse step computes; see DDiTConfig.")]
OptionalCoarse = Annotated[str | None, typer.Option("--coarse", help="What a coarse step computes; see DDiTConfig.")]
Quantile = Annotated[float, typer.Option(help="ρ: share of patches that have to be smooth.")]
Order = Annotated[int, typer.Option(help="Order of the finite difference, 1 to 3.")]
TargetSpeedup = Annotated[float, typer.Option("--speedup", help="Target ratio of FLOP, plain over accelerated.")]
OptionalSpeedup = Annotated[
    float | None, typer.Option("--speedup", help="Target ratio of FLOP, plain over accelerated; 2 by default.")
]
Reference = Annotated[
    str, typer.Option(help="What to aim at: 'plain', the pipeline's own picture, or 'converged', that of many steps.")
]
TowardConverged = Annotated[
    float, typer.Option(help="Share of the way from the plain to the converged picture to aim at; 0 is plain.")
]
Costs = Annotated[
    str, typer.Option(help="What a fitted speed-up is a ratio of: 'flops', or 'seconds' of the steps on this machine.")
]
OptionalThreshold = Annotated[
    float | None,
    typer.Option("--threshold", help="τ of the threshold rule: a patch size is smooth enough when its σ is below."),
]
OptionalQuantile = Annotated[float | None, typer.Option("--quantile", help="ρ of the threshold rule.")]
OptionalOrder = Annotated[int | None, typer.Option("--order", help="Order of the threshold rule's difference, 1 to 3.")]
Tau = Annotated[float | None, typer.Option(help="τ; by default the one that --speedup needs.")]

# -- what is written ------------------------------------------------------------------------------------------------


def _checked(folder: Path) -> Path:
    check_output(folder, folder=True)
    return folder


def folder_option(text: str, name: str = "--output") -> Any:
    """A folder that is refused before anything runs where nothing could be written into it."""
    return typer.Option(name, help=text, callback=_checked)


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
TableFolder = Annotated[Path, folder_option("Folder for tables and figures.")]

# -- data of a distillation -----------------------------------------------------------------------------------------


class BadData(StrEnum):
    """What to do with items that cannot be used."""

    refuse = "refuse"
    skip = "skip"


PromptFile = Annotated[Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")]
Pictures = Annotated[Path | None, typer.Option(help="Folder of pictures, each with a .txt caption of the same name.")]
Dataset = Annotated[str | None, typer.Option(help="Hugging Face dataset of captioned pictures (needs `datasets`).")]
Columns = Annotated[str, typer.Option(help="Columns of picture and caption in --dataset.")]
Items = Annotated[int | None, typer.Option(help="Use at most so many items of the data.", min=1)]
BadDataOption = Annotated[
    BadData, typer.Option("--bad-data", help="Items that cannot be used: refuse the data, or skip and name them.")
]
SamplingSteps = Annotated[int | None, typer.Option(help="Denoising steps of the pipeline.")]
Calls = Annotated[
    list[str] | None,
    typer.Option(
        "--call", help="Further arguments of the pipeline, as JSON; repeated, the recordings take them in turn."
    ),
]
HeldOut = Annotated[int, typer.Option(help="Items kept for validation.")]
MaxGap = Annotated[int, typer.Option(help="Longest distance, in steps, to the remembered full step.")]


# -- reading --------------------------------------------------------------------------------------------------------


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
        ConfigError: something else is written there, or i is not below n.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise ConfigError(f"shard={text!r}: write i/n with i < n, as in 0/2.")
    return int(parts[0]), int(parts[1])


def read_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object; ``name`` is the option's, for the error.

    Raises:
        ConfigError: the text is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}={text!r}: give an object, as in '{{\"guidance_scale\": 2}}'.")
    return value


def read_integers(text: str, name: str, least: int = 1) -> list[int]:
    """Whole numbers from ``least`` on, with commas.

    Raises:
        ConfigError: names the option ``name`` and its text.
    """
    numbers = read_numbers(text, name)
    if not numbers or any(number != int(number) or number < least for number in numbers):
        raise ConfigError(f"{name}={text!r}: whole numbers from {least} on, with commas.")
    return [int(number) for number in numbers]


def read_numbers(text: str, name: str) -> list[float]:
    """Finite numbers with commas.

    Raises:
        ConfigError: names the option ``name`` and its text.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}={text!r}: write numbers with commas.") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{name}={text!r}: write finite numbers.")
    return numbers


def read_ratios(text: str, name: str) -> dict[int, float]:
    """Multiple -> ratio, of pairs with commas.

    Raises:
        ConfigError: names the option ``name`` and its text.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(multiple): float(ratio) for multiple, ratio in pairs}
    except ValueError:
        raise ConfigError(f"{name}={text!r}: write pairs with commas, as in 2:0.12,4:0.02.") from None


def read_schedule(text: str) -> Any:
    """A schedule for ``accelerate``: multiples with commas, one per step, or a file that ``ddit-rt fit`` wrote.

    Raises:
        ConfigError: the text is neither, or there is no such file.
    """
    if text.endswith(".json"):
        from ..schedule import FittedSchedule

        return FittedSchedule.load(text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"schedule={text!r}: write multiples with commas, as in 1,1,1,2,4, or name a .json of `ddit-rt fit`."
        ) from None
