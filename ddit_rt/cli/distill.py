"""``ddit-rt distill``: train, record, push."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .models import load
from .options import (
    BadData,
    BadDataOption,
    Calls,
    Columns,
    Dataset,
    Device,
    Dtype,
    Frames,
    Guidance,
    Height,
    HeldOut,
    Items,
    MaxGap,
    Model,
    Pictures,
    PromptFile,
    SamplingSteps,
    Seed,
    Width,
    folder_option,
    read_integers,
    read_object,
)
from .terminal import importing, note, print_line

_OWN_ITEMS = 800

group = typer.Typer(help="Trains an adapter: coarse steps as good as full ones.", no_args_is_help=True)


@group.command("train")
def train(
    model: Model,
    out: Annotated[Path, folder_option("Folder of the run: checkpoint, adapter, log, pictures.", "--out")],
    prompts: PromptFile = None,
    pictures: Pictures = None,
    dataset: Dataset = None,
    columns: Columns = "image,caption",
    items: Items = None,
    bad_data: BadDataOption = BadData.refuse,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    sampling_steps: SamplingSteps = None,
    guidance: Guidance = None,
    call: Calls = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20_000,
    batch: Annotated[int, typer.Option(help="Samples per device and micro-step.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Micro-steps per optimizer step.")] = 4,
    multiples: Annotated[str, typer.Option(help="Coarse sizes.")] = "2,4",
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Layers with LoRA: feed-forward (default), attention, or a regular expression; repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 32,
    shared: Annotated[bool, typer.Option("--shared", help="One LoRA for all sizes.")] = False,
    memory: Annotated[bool, typer.Option(help="Let the adapter see the last full predictions.")] = True,
    positions: Annotated[str, typer.Option(help="native or interpolated.")] = "native",
    objective: Annotated[str, typer.Option(help="direct (equation 1), delta or both.")] = "direct",
    weighting: Annotated[str, typer.Option(help="relative (to the forecast's error) or even.")] = "relative",
    optimizer: Annotated[str, typer.Option(help="auto, prodigy or adamw.")] = "auto",
    lr: Annotated[float | None, typer.Option(help="Learning rate; default 1.0 (Prodigy), 1e-4 (AdamW).")] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled.")] = 0.01,
    lr_warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 100,
    lr_decay: Annotated[float, typer.Option(help="Share of the steps over which it falls to 0.")] = 0.5,
    ema: Annotated[float, typer.Option(help="Decay of the saved average; 0 for none.")] = 0.999,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for any.")] = 1.0,
    max_gap: MaxGap = 6,
    timesteps: Annotated[str, typer.Option(help="steps (evenly) or sigma (by the noise they remove).")] = "steps",
    fill: Annotated[float, typer.Option(help="Spread recording over this share of the steps; 0: record first.")] = 0.5,
    held_out: HeldOut = 8,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute blocks: less memory.")] = False,
    precision: Annotated[str, typer.Option(help="no or bf16 (autocast of the adapter).")] = "no",
    checkpoint_every: Annotated[int, typer.Option(help="Steps.")] = 500,
    validate_every: Annotated[int, typer.Option(help="Steps.")] = 2000,
    recordings: Annotated[
        Path | None, typer.Option(help="Folder of recordings, to share between runs; default: in OUT.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events (extra `distill`).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory and time, and stop.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Trains an adapter for MODEL against itself, and writes OUT/adapter.safetensors.

    Several GPUs: accelerate launch --num_processes 4 -m ddit_rt.cli distill train ...
    """
    with importing():
        from ..distill import DistillConfig, Trainer, estimate

    config = DistillConfig(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        multiples=tuple(read_integers(multiples, "multiples")),
        targets=tuple(targets or ("feed-forward",)),
        rank=rank,
        shared=shared,
        memory=memory,
        positions=positions,
        objective=objective,
        weighting=weighting,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        lr_warmup_steps=lr_warmup,
        lr_decay=lr_decay,
        ema=ema,
        clip=clip,
        max_gap=max_gap,
        timesteps=timesteps,
        fill=fill,
        held_out=held_out,
        checkpointing=checkpointing,
        precision=precision,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        seed=seed,
    )
    calls = _calls(model, height, width, frames, sampling_steps, guidance, call or ["{}"])
    source = _source(model, prompts, pictures, dataset, columns, items, bad_data, calls[0], config.max_gap, seed)
    pipe = load(model, dtype, device or _device_of_process(), *calls)
    _check_source(pipe, source)
    if dry_run:
        print_line(str(estimate(pipe, source, calls, config)))
        return
    name = Path(model).name if Path(model).exists() else model  # a local path means nothing to others
    trainer = Trainer(
        pipe, source, calls, config, out, recordings=recordings, base_model=name, tensorboard=tensorboard, log=note
    )
    trainer.train(resume=resume)
    note(f"{out / 'adapter.safetensors'}: ddit_rt.accelerate(pipe, adapter={str(out / 'adapter.safetensors')!r})")


@group.command("record")
def record(
    model: Model,
    recordings: Annotated[Path, typer.Option(help="Folder to record into; goes on where it stopped.")],
    prompts: PromptFile = None,
    pictures: Pictures = None,
    dataset: Dataset = None,
    columns: Columns = "image,caption",
    items: Items = None,
    bad_data: BadDataOption = BadData.refuse,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    sampling_steps: SamplingSteps = None,
    guidance: Guidance = None,
    call: Calls = None,
    max_gap: MaxGap = 6,
    held_out: HeldOut = 8,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Records MODEL's own trajectories beforehand, for runs that share them."""
    from tqdm.auto import tqdm

    with importing():
        from ..distill import DistillConfig, Trainer

    calls = _calls(model, height, width, frames, sampling_steps, guidance, call or ["{}"])
    source = _source(model, prompts, pictures, dataset, columns, items, bad_data, calls[0], max_gap, seed)
    pipe = load(model, dtype, device or _device_of_process(), *calls)
    _check_source(pipe, source)
    config = DistillConfig(held_out=held_out, max_gap=max_gap, seed=seed)
    trainer = Trainer(pipe, source, calls, config, recordings, recordings=recordings, log=note)
    for index in tqdm(range(trainer.recorded.count), desc="record"):
        trainer.recorded.shard(index)


@group.command("push")
def push(
    adapter: Annotated[str, typer.Argument(help="File of a trained adapter.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="For a new repository.")] = False,
) -> None:
    """Publishes an adapter with a model card."""
    with importing():
        from ..granularity import load_adapter, push_to_hub

    print_line(push_to_hub(load_adapter(adapter), repository, private=private))


def _device_of_process() -> str | None:
    """The GPU of this process under ``accelerate launch``; None where that did not start it, or without CUDA."""
    from ..pipeline import default_device

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and default_device() == "cuda" else None


def _calls(
    model: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    steps: int | None,
    guidance: float | None,
    further: Sequence[str],
) -> list[dict[str, Any]]:
    from ..pipeline import call_arguments
    from ..settings import is_whole, shown

    shared = call_arguments(model, height, width, frames, steps, {"guidance_scale": guidance})
    calls = [{**shared, **read_object(text, "call")} for text in further]
    for call in calls:
        steps = call.get("num_inference_steps", 50)
        if not is_whole(steps) or steps < 4:
            raise ConfigError(
                f"num_inference_steps={shown(steps)}: at least 4 denoising steps, a whole number. A trajectory has to "
                "hold a step and two before it."
            )
    return calls


def _source(
    model: str,
    prompts: Path | None,
    pictures: Path | None,
    dataset: str | None,
    columns: str,
    items: int | None,
    bad_data: BadData,
    call: dict[str, Any],
    max_gap: int,
    seed: int,
) -> Any:
    from ..distill import Checked, Prompts, picture_dataset, picture_folder, read_prompts
    from ..pipeline import SHIPPED

    given = [value for value in (prompts, pictures, dataset) if value is not None]
    if len(given) > 1 or (not given and model not in SHIPPED):
        raise ConfigError("give the data as one of --prompts, --pictures or --dataset.")
    checked = Checked(bad_data is BadData.skip, note)
    length = 2 * max_gap + 1  # a step, and the two it may remember at their farthest
    if pictures is not None or dataset is not None:
        if "height" not in call or "width" not in call:
            raise ConfigError("pictures need --height and --width.")
        size = (int(call["width"]), int(call["height"]))
        if pictures is not None:
            return picture_folder(pictures, size, length, checked, items)
        image, _, caption = columns.partition(",")
        return picture_dataset(_rows(str(dataset)), image, caption, items or 1000, size, length, checked)
    if prompts is not None:
        return Prompts(read_prompts(prompts, checked)[:items])
    return Prompts(_own_captions(model, items, seed))


def _own_captions(model: str, items: int | None, seed: int) -> list[str]:
    from ..demo import DISTILL_PROMPTS

    prompts = DISTILL_PROMPTS[model].read_text(encoding="utf-8").splitlines()
    count = items or min(_OWN_ITEMS, len(prompts))
    if count > len(prompts):
        raise ConfigError(f"items={count}: there are {len(prompts)} {model} prompts; ask for fewer, or give --prompts.")
    return prompts[:count] if seed == 0 else Random(seed).sample(prompts, count)


def _rows(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("--dataset needs the datasets package: pip install datasets.") from error
    return load_dataset(name, split="train", streaming=True)


def _check_source(pipe: Any, source: Any) -> None:
    from ..families import family_of

    if source.describe()["kind"] == "pictures" and family_of(pipe).name != "flux":
        raise ConfigError("video models are distilled from their own videos: pass --prompts.")
