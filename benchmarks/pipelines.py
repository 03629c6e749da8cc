"""Measures whole pipelines on a CUDA GPU: FLUX.1-dev and Wan 2.1 1.3B at their real sizes.

    python benchmarks/pipelines.py [--models flux wan] [--runs 3] [--out benchmarks/results/pipelines.json] [--dry-run]

The configurations are the published ones, the weights random bfloat16 made on the device: latency does not depend on
them, and quality is not measured here. Times are those of the denoising loop, without text encoders and decoding.

Providers: stock diffusers, stock with compiled blocks, ours eagerly, ours with CUDA graphs, ours with both. Schedules:
every step at p, every step at 2p, every step at 4p, and a mix of the three. Beside the wall clock of a call: median
device time of a step at every size, what a step that changes the size takes beside one that repeats it, time between
steps, peak memory.

``--dry-run`` walks through everything on a CPU at tiny sizes, to test this file; its times mean nothing and its result
says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import ddit_rt

PROVIDERS = ("stock", "stock+compile", "ours", "ours+graphs", "ours+graphs+compile")
SCHEDULES = ("p", "2p", "4p", "mixed")


def flux(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev, 1024 x 1024, 28 steps: the pipeline and the arguments of its call."""
    small = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "axes_dims_rope": (4, 6, 6),
    }
    transformer = FluxTransformer2DModel(guidance_embeds=True, **(small if tiny else {}))
    # never decodes: the pipeline only asks it for its scale
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4)
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, None, None, None, None, transformer
    )
    config = transformer.config
    return pipe, {
        "prompt_embeds": torch.randn(1, 6 if tiny else 512, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "height": 64 if tiny else 1024,
        "width": 64 if tiny else 1024,
        "num_inference_steps": 4 if tiny else 28,
    }


def wan(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """Wan 2.1 1.3B, 832 x 480, 81 frames, 50 steps with guidance: the pipeline and the arguments of its call."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    real = {"num_attention_heads": 12, "ffn_dim": 8960, "qk_norm": "rms_norm_across_heads"}
    transformer = WanTransformer3DModel(num_layers=1 if tiny else 30, **(small if tiny else real))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer)
    embeds = torch.randn(1, 6 if tiny else 512, transformer.config.text_dim, device=device, dtype=dtype)
    return pipe, {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": -embeds,
        "height": 64 if tiny else 480,
        "width": 96 if tiny else 832,
        "num_frames": 5 if tiny else 81,
        "num_inference_steps": 4 if tiny else 50,
    }


MODELS = {"flux": flux, "wan": wan}


def schedule_of(name: str, steps: int) -> list[int]:
    """One multiple per step; ``mixed`` is a third of each, fine first: about the paper's 2.18 times fewer FLOP."""
    if name == "mixed":
        third = steps // 3
        return [1] * third + [2] * third + [4] * (steps - 2 * third)
    return [{"p": 1, "2p": 2, "4p": 4}[name]] * steps


def build(model: str, device: torch.device, tiny: bool) -> tuple[Any, dict[str, Any]]:
    dtype = torch.float32 if tiny else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:  # 12 billion weights are made where they stay
            pipe, inputs = MODELS[model](device, dtype, tiny)
    finally:
        torch.set_default_dtype(before)
    pipe.transformer.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**inputs, "output_type": "latent"}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, to the end of its device work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}


def measure(pipe: Any, inputs: dict[str, Any], runs: int, device: torch.device) -> dict[str, Any]:
    """Seconds per call over ``runs`` calls, and what the reports say of the steps if the pipeline is accelerated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    walls, reports = [], []
    for run in range(runs):
        generator = torch.Generator().manual_seed(run)
        walls.append(timed(lambda generator=generator: pipe(**inputs, generator=generator), device))
        if pipe.__dict__.get("_ddit_session") is not None:
            reports.append(ddit_rt.report(pipe))
    result: dict[str, Any] = {"seconds_per_call": summary(walls)}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if reports:
        result.update(_of_steps(reports, walls))
    return result


def _of_steps(reports: list[Any], walls: list[float]) -> dict[str, Any]:
    by_size: dict[int, list[float]] = {}
    switching: dict[int, list[float]] = {}
    for report in reports:
        # the first step has no predecessor
        for before, step in zip(report.steps, report.steps[1:]):
            kind = by_size if before.multiple == step.multiple else switching
            kind.setdefault(step.multiple, []).append(step.seconds)
    between = [(wall - sum(s.seconds for s in r.steps)) / len(r.steps) for wall, r in zip(walls, reports)]
    return {
        "executed": sorted({step.executed for report in reports for step in report.steps}),
        "flop_speedup": reports[0].speedup_estimate,
        "seconds_per_repeating_step": {k: summary(v) for k, v in sorted(by_size.items())},
        "seconds_per_switching_step": {k: summary(v) for k, v in sorted(switching.items())},
        "seconds_between_steps": summary(between),
    }


def benchmark(model: str, runs: int, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Provider -> schedule -> measurements of one model."""
    results: dict[str, Any] = {}
    for provider in PROVIDERS:
        pipe, inputs = build(model, device, tiny)
        if "compile" in provider:
            pipe.transformer.compile_repeated_blocks(**({"backend": "eager"} if tiny else {}))
        results[provider] = {}
        for name in ("p",) if provider.startswith("stock") else SCHEDULES:
            schedule = schedule_of(name, inputs["num_inference_steps"])
            if not provider.startswith("stock"):
                graphs = "graphs" in provider and device.type == "cuda"
                ddit_rt.accelerate(pipe, schedule=schedule, cuda_graphs=graphs)
            pipe(**inputs)  # compiles, tunes, captures
            results[provider][name] = measure(pipe, inputs, runs, device)
            print(f"{model:5} {provider:20} {name:6} {results[provider][name]['seconds_per_call']}", flush=True)
        ddit_rt.restore(pipe)
        del pipe
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=int, default=3, help="measured calls per provider and schedule")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipelines.json"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("pipelines.py needs a CUDA device, and there is none; --dry-run tests the script.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    result = {
        "what": "dry run at tiny sizes: the times mean nothing" if options.dry_run else "random bfloat16 weights",
        "device": "cpu" if options.dry_run else torch.cuda.get_device_name(),
        "versions": versions,
        "models": {model: benchmark(model, options.runs, device, options.dry_run) for model in options.models},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
