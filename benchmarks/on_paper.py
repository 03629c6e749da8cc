"""What full-size runs should take on GPUs, computed: every operation of the real transformers against a data sheet.

    python benchmarks/on_paper.py [--into docs/runtime.md] [--save benchmarks/results/on-paper/routes.json]

Nothing is measured. FLUX.1-dev and Wan 2.1 1.3B go through ddit_rt's own coarse path as shapes without data
(``paper_count.py``); every operation that would launch a kernel takes the longer of its arithmetic and its bytes on the
GPU in question, at shares of the peak that large kernels reach, and no less than a kernel takes. A matrix product or an
attention counts in whole waves of tiles: the few tokens of a coarse step leave processors idle. Eager runs also cannot
be faster than the host issues kernels; graphs can. Published times stand beside what the same model computes for them.
--save writes the routes to the wanted times, lever by lever (``paper_routes.py``), which ``readme.py`` shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import markers
from paper_count import ATTENTION, HOST, KERNEL, MATMUL, MEMORY, Gpu, rows
from paper_levers import together, with_feed_forward
from paper_routes import GUIDED, routes
from pipe_models import MODELS
from pipe_schedules import mixed, speedup
from pipe_targets import GRAPHS_GIB, RATIOS, RECORDS

GPUS = (
    Gpu("RTX 4090", 128, 165.2e12, 1.008e12, 330.3e12, memory=24e9),
    Gpu("A100 80GB SXM", 108, 312e12, 2.039e12, 624e12, memory=80e9),
    Gpu("H100 SXM", 132, 989.4e12, 3.35e12, 1978.9e12, memory=80e9),
    Gpu("H200", 132, 989.4e12, 4.8e12, 1978.9e12, memory=141e9),
)


def run_seconds(model: str, gpu: Gpu, schedule: Sequence[int], graphs: bool, compiled: bool) -> float:
    """Of all denoising steps of a run, probes at anchors included; encoders and decoder are not."""
    each = {k: row.seconds(gpu, graphs, compiled) for k, row in rows(model).items()}
    # a ratio of FLOP counts runs and probes; here they weigh what they take
    return GUIDED[model] * len(schedule) * each[1] / speedup(schedule, each)


def _mixed(model: str) -> tuple[int, ...]:
    flops = {k: sum(operation.flops for operation in row.operations) for k, row in rows(model).items()}
    return mixed(MODELS[model].steps, flops)


def step_table(model: str) -> str:
    """Milliseconds of a step per size, and of the mixed run, on every GPU."""
    steps = MODELS[model].steps
    lines = [
        f"{MODELS[model].title}: ms a step{' (two calls)' if GUIDED[model] > 1 else ''}, and s of {steps} steps.",
        "",
        "| GPU | eager p / 2p / 4p | graphs, compiled p / 2p / 4p | 2p, 4p against p | with every wave full | "
        f"{steps} plain steps, eager / compiled | mixed, eager / graphs, compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        eager = {k: row.seconds(gpu, False, False) for k, row in rows(model).items()}
        best = {k: row.seconds(gpu, True, True) for k, row in rows(model).items()}
        full = {k: row.seconds(gpu, True, True, waves=False) for k, row in rows(model).items()}
        plain, mix = (1,) * steps, _mixed(model)
        runs = [run_seconds(model, gpu, what, how, how) for what in (plain, mix) for how in (False, True)]
        cells = [" / ".join(f"{1e3 * GUIDED[model] * times[k]:.1f}" for k in (1, 2, 4)) for times in (eager, best)]
        cells += [f"{times[1] / times[2]:.2f}x, {times[1] / times[4]:.2f}x" for times in (best, full)]
        cells += [f"{a:.2f} / {b:.2f}" for a, b in (runs[:2], runs[2:])]
        lines.append(f"| {gpu.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_published(model: str) -> str:
    """What others measured, beside what is computed for the same run."""
    found = []
    for record in RECORDS[model]:
        compiled = {"stock diffusers": False, "plain": False, "compiled": True, "xDiT, compiled": True}.get(record.what)
        if compiled is not None:
            gpu = next(gpu for gpu in GPUS if record.gpu in gpu.name)
            ours = run_seconds(model, gpu, (1,) * MODELS[model].steps, compiled, compiled)
            found.append(f"{record.what} on {record.gpu} {record.seconds:g} s, computed {ours:.2f}")
    return "; ".join(found)


def verdict(model: str) -> str:
    """The targets, as far as they can be computed, on the H200."""
    gpu, each = GPUS[-1], rows(model)
    parts = []
    for size, limit in RATIOS[model].items():
        times = [[each[k].seconds(gpu, True, True, waves) for k in (1, int(size))] for waves in (True, False)]
        low, high = (a / b for a, b in times)
        parts.append(f"{size}p {low:.2f}x, {high:.2f}x with every wave full (target {limit:g}x)")
    pool = max(row.peak_bytes for row in each.values()) / 2**30
    return f"{', '.join(parts)}; activations in one graph pool {pool:.2f} GiB (target {GRAPHS_GIB:g})"


def in_one_batch(model: str) -> str:
    """What a coarse step takes where both calls of guidance are one, and how much that is beside two calls."""
    found = []
    for gpu in GPUS:
        cells = []
        for k in (2, 4):
            apart = GUIDED[model] * rows(model)[k].seconds(gpu, True, True)
            together = rows(model, 512, GUIDED[model])[k].seconds(gpu, True, True)
            cells.append(f"{1e3 * together:.1f} ({together / apart - 1:+.1%})")
        found.append(f"{gpu.name} {' / '.join(cells)}")
    return f"{MODELS[model].title}, both calls in one batch, from graphs, compiled, 2p / 4p: {'; '.join(found)} ms."


def in_one_launch() -> str:
    """What FLUX's steps take with QKV in one launch, and how much less if the single blocks' MLP enters in it, too."""
    found = []
    for gpu in GPUS:
        cells = []
        for k in (1, 2, 4):
            apart = together(rows("flux")[k].fused)
            times = [sum(one.seconds(gpu) for one in step) for step in (apart, with_feed_forward(apart))]
            cells.append(f"{1e3 * times[1]:.1f} ({times[1] / times[0] - 1:+.1%})")
        found.append(f"{gpu.name} {' / '.join(cells)}")
    title = f"{MODELS['flux'].title}, QKV and MLP-in of the single blocks in one launch, beside QKV alone in one"
    return f"{title}, from graphs, compiled, p / 2p / 4p: {'; '.join(found)} ms."


def text() -> str:
    """All tables."""
    names = ", ".join(f"{gpu.name} {gpu.flops / 1e12:.0f} TFLOP/s {gpu.bandwidth / 1e12:.2f} TB/s" for gpu in GPUS)
    parts = [
        f"Computed, not measured. bf16, batch 1; data sheets: {names}. Shares of the peak: matrix products "
        f"{MATMUL:.0%} (in whole waves of tiles), attention {ATTENTION:.0%}, memory {MEMORY:.0%}; a kernel takes at "
        f"least {KERNEL * 1e6:g} µs, and {HOST * 1e6:g} µs of the host to issue."
    ]
    parts += [step_table(model) for model in MODELS]
    parts += [in_one_batch(model) for model in MODELS if GUIDED[model] > 1]
    parts += [in_one_launch()]
    parts += [
        f"Published and computed, encoders and decoder only in the former: {against_published(m)}." for m in MODELS
    ]
    parts += [f"On the H200, {MODELS[model].title}: {verdict(model)}." for model in MODELS]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=Path, help="Markdown file with markers for the tables")
    parser.add_argument("--save", type=Path, help="JSON file for the routes")
    options = parser.parse_args(arguments)
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(routes(GPUS), indent=1) + "\n", encoding="utf-8")
    if options.into is None:
        print(text())
    else:
        document = options.into.read_text(encoding="utf-8")
        options.into.write_text(markers.put(document, "paper-table", text()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
