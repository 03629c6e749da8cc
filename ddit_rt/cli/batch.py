"""``ddit-rt generate --prompts``: many prompts into one folder, divided among the processes that were started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError
from .models import load
from .terminal import importing, note, print_json, print_line


def generate_all(
    model: str,
    prompts: Path,
    output: Path,
    call: Mapping[str, Any],
    settings: Mapping[str, Any],
    adapter: str | None,
    quantize: str | None,
    seed: int,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Makes what is missing of a picture per prompt, in this process and in those that were started beside it.

    Args:
        model, device, dtype: As of :func:`ddit_rt.pipeline.load_any`; without a device each process takes its own.
        prompts: File, as of :func:`ddit_rt.trajectories.read_items`.
        output: Folder.
        call: Arguments of the pipeline, but for the prompt.
        settings: Of ``accelerate``.
        adapter, quantize: As of the command.
        seed: Of the first line.
        as_json: See the command.

    Raises:
        ConfigError: before a model is loaded: prompts, folder or device cannot be used.
        typer.Exit: status 1, a prompt failed.
    """
    with importing():
        import torch
        from accelerate import PartialState
        from tqdm import tqdm

        from ..granularity import load_adapter
        from ..pipeline import accelerated, frame_rate, makes_videos, report
        from ..trajectories import MANIFEST, PictureFolder, can_encode, read_items, timed_call

    items = read_items(prompts, seed)
    # the CPU's process group, also beside GPUs: all it does is to wait, for days if one process has the longer share
    state = PartialState(cpu=True, timeout=timedelta(days=365))
    device = _own_device(device, state.local_process_index, state.num_processes)
    run = {"model": model, "call": call, "settings": settings, "adapter": adapter, "quantize": quantize, "dtype": dtype}
    folder = PictureFolder(output, run)
    todo = folder.missing(items)
    state.wait_for_everyone()  # all have seen the same before the first picture is added
    if state.is_main_process:
        folder.clear()
    state.wait_for_everyone()
    with state.split_between_processes(todo) as mine:
        mine = list(mine)
    if mine:
        trained = None if adapter is None else load_adapter(adapter)
        pipe = load(model, dtype, device, {**call, "prompt": mine[0].prompt}, scheme=quantize)
        suffix = (".mp4" if can_encode() else ".gif") if makes_videos(pipe) else ".png"
        with (
            tqdm(total=len(items), disable=None if state.is_main_process else True, leave=False) as bar,
            accelerated(pipe, trained, **settings),
        ):
            for item in mine:
                bar.update(folder.count() - bar.n)  # those of the other processes, too
                try:
                    frames, seconds = timed_call(pipe, item.seed, {**call, "prompt": item.prompt})
                    facts = {"seconds": round(seconds, 3), **report(pipe).summary()}
                    folder.add(item, frames, suffix, frame_rate(model), facts)
                # one prompt must not end the others
                except Exception as error:
                    folder.fail(item, error)
                    note(f"error: {prompts}, line {item.line} ({item.prompt!r}): {type(error).__name__}: {error}")
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
    state.wait_for_everyone()
    failed = [record for item in items if (record := folder.record(item)) is None or "error" in record]
    if state.is_main_process:
        records = folder.finish(items)
        speeds = [record["speedup"] for record in records if "file" in record]
        result = {
            "output": str(output),
            "manifest": str(output / MANIFEST),
            "made": len(todo) - len(failed),
            "before": len(items) - len(todo),
            "failed": len(failed),
            "speedup": sum(speeds) / len(speeds) if speeds else None,
        }
        if as_json:
            print_json(result)
        else:
            print_line(f"{output}: {result['made']} made, {result['before']} were there, {result['failed']} failed")
    state.wait_for_everyone()  # whoever ends with an error first has the others killed
    state.destroy_process_group()
    if failed:
        raise typer.Exit(1)


def _own_device(device: str | None, local: int, processes: int) -> str | None:
    """The device of this process: what was asked for, or the CUDA device that has the process's number on its machine.

    Raises:
        ConfigError: one device for all of several processes.
    """
    import torch

    if processes == 1 or device == "cpu":
        return device
    if device is not None and ":" in device:
        raise ConfigError(
            f"device={device!r} for all of {processes} processes: leave it out, and each takes a device of its own."
        )
    if device is None and not torch.cuda.is_available():
        return None
    if (device or "cuda") == "cuda" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', processes)} processes on this machine, which has "
                f"{torch.cuda.device_count()} CUDA devices: start one process per device."
            )
        torch.cuda.set_device(local)  # kernels run where the current device is
        return f"cuda:{local}"
    return device
