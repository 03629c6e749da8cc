"""The route to the wanted times, computed: which levers, at which schedule, on which card, and what each gives.

Levers are added one after the other in the order of :data:`LEVERS`; the kernels are those of ``paper_count.py``, what a
lever makes of them is in ``paper_levers.py``. ``on_paper.py`` writes the result, ``readme.py`` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import paper_levers as levers
from evaluations import Evaluation
from paper_count import Gpu, Operation, end, rows
from pipe_ends import ENDS
from pipe_models import MODELS
from pipe_schedules import mixed, speedup
from store import ROOT

from ddit_rt.schedule import WARP, schedule_of

GUIDED = {"flux": 1, "wan": 2}  # transformer calls per step
WANTED = {"flux": 1.2, "wan": 8.0}  # seconds on the H200
ASKED = {"flux": (2, 3), "wan": (2, 3, 4, 6)}  # speed-ups whose fidelity is known
DEMO = {28: "evaluation-28.json", 50: "evaluation.json"}
SHORT_TEXT = 64  # tokens that are left of a prompt of 64 or fewer

LEVERS = (
    "graphs, compiled",
    "schedule",
    "8 bits",
    "attention back-end",
    "QKV in one launch",
    "modulation ahead",
    "short text in coarse steps",
    "guidance in one batch",
    "attention in 8 bits",
)
"""In the order they are added. The last leaves the precision that the model is run in, as "8 bits" does."""

CHECKS = {
    "flux": (
        ("compiled, whole request", "H200", 4.32, LEVERS[:1], True),
        (
            "FP8, compiled, denoising only",
            "H100 SXM",
            2.43,
            ("8 bits", "attention back-end"),
            False,
        ),
    ),
    "wan": (("plain, whole request", "H200", 58.0, (), True),),
}
"""Published times of full steps only (see ``pipe_targets.py``): what, where, seconds, which levers, ends included."""

SHARES = {"RTX 4090": 0.9, "A100 80GB SXM": 0.7, "H100 SXM": 0.75, "H200": 0.75}
"""Of the bf16 peak, published for attention with 128 values a head: FlashAttention-2 and 3."""
SHARES_EIGHT = {"RTX 4090": 2.5, "H100 SXM": 1.2, "H200": 1.2}
"""Likewise with operands in 8 bits; nothing comparable is published for the A100."""

SOURCES = {
    "RTX 4090": "NVIDIA Ada GPU architecture whitepaper, appendix A: bf16 and FP8 with FP32 accumulate",
    "A100 80GB SXM": "NVIDIA A100 data sheet: BF16, INT8",
    "H100 SXM": "NVIDIA H100 data sheet: BF16, FP8, halved, since it states them with sparsity",
    "H200": "NVIDIA H200 data sheet, likewise",
    "attention": "FlashAttention-2 (arXiv 2307.08691): 50 to 73 % of the A100's peak; FlashAttention-3 (arXiv "
    "2407.08608): 740 TFLOP/s in FP16 and 1.2 PFLOP/s in FP8 on the H100; SageAttention2++ (arXiv 2505.21136): on the "
    "RTX 4090 FlashAttention-2's 160 TFLOP/s, and 420 to 490 of SageAttention2",
}


@dataclass(frozen=True)
class Choice:
    """A schedule that is looked at, and what it gave on the demo model.

    Attributes:
        name: For tables.
        multiples: Per step; 0 runs nothing.
        decibels: Mean PSNR to the plain picture on the demo model at as many steps, by the rule, and fitted; None where
            there is no such measurement.
    """

    name: str
    multiples: tuple[int, ...]
    decibels: tuple[float | None, float | None]


def choices(model: str) -> list[Choice]:
    """The targets of :data:`ASKED`, and the mix of sizes that needs as few FLOP as the paper's run."""
    steps = MODELS[model].steps
    found = []
    for asked in ASKED[model]:
        multiples = tuple(schedule_of(steps, steps // asked, WARP["plain"]))
        found.append(
            Choice(f"{asked}x", multiples, (_demo(steps, f"target-{asked}x"), _demo(steps, f"fitted-{asked}x")))
        )
    flops = {k: sum(operation.flops for operation in row.operations) for k, row in rows(model).items()}
    return [*found, Choice("p, 2p, 4p", mixed(steps, flops), (None, None))]


@cache
def _demo(steps: int, method: str) -> float | None:
    evaluation = Evaluation.read(ROOT / "benchmarks" / "results" / "demo-targets" / DEMO[steps])
    known = {row.method: row.metrics["psnr"] for row in evaluation.summaries(steps) if "psnr" in row.metrics}
    return known.get(f"{method}@{steps}")


def steps_of(model: str, on: Sequence[str], batch: int = 1) -> dict[int, list[Operation]]:
    """Multiple -> kernels of one transformer call for ``batch`` samples, compiled, with the levers that are on."""
    whole, short = rows(model, 512, batch), rows(model, SHORT_TEXT if model == "flux" else 512, batch)
    chosen = {k: short[k] if k > 1 and "short text in coarse steps" in on else row for k, row in whole.items()}
    found = {k: list(row.fused) for k, row in chosen.items()}
    if "QKV in one launch" in on:
        found = {k: levers.together(operations) for k, operations in found.items()}
    if "modulation ahead" in on:
        found = {k: levers.without_modulation(operations) for k, operations in found.items()}
    if "8 bits" in on:
        found = {k: levers.eight_bits(operations) for k, operations in found.items()}
    return found


def seconds(model: str, gpu: Gpu, choice: Choice, on: Sequence[str], waves: bool = True) -> float:
    """Of all denoising steps with some of :data:`LEVERS`, from graphs, probes included.

    Args:
        model: Key of ``MODELS``.
        gpu: The card.
        choice: Followed if ``"schedule"`` is on, else every step is full.
        on: Levers.
        waves: Matrix products come in whole waves of tiles; otherwise no processor waits.
    """
    if "attention in 8 bits" in on:
        gpu = replace(gpu, attention=SHARES_EIGHT.get(gpu.name, SHARES[gpu.name]))
    elif "attention back-end" in on:
        gpu = replace(gpu, attention=SHARES[gpu.name])
    multiples = choice.multiples if "schedule" in on else (1,) * len(choice.multiples)
    calls = GUIDED[model]
    each = {k: calls * _total(operations, gpu, waves) for k, operations in steps_of(model, on).items()}
    if "guidance in one batch" in on:  # in coarse steps, and their probes
        both = steps_of(model, on, calls)
        each |= {k: _total(operations, gpu, waves) for k, operations in both.items() if k > 1}
    found = len(multiples) * each[1] / speedup(multiples, each)
    if "modulation ahead" in on:
        # every size that occurs has noise levels of its own
        sizes = len(set(multiples) - {0})
        ahead = levers.modulation_ahead(rows(model)[1].fused, len(multiples))
        found += calls * sizes * _total(ahead, gpu, waves)
    return found


def _total(operations: Sequence[Operation], gpu: Gpu, waves: bool = True) -> float:
    return sum(operation.seconds(gpu, waves) for operation in operations)


def ends_seconds(model: str, gpu: Gpu) -> dict[str, float]:
    """Of text encoders and decoder, compiled; float32 convolutions multiply in TF32, at half the rate of bf16."""
    found = {}
    for which in ENDS:
        operations = _end(model, which)
        slower = 2 if (model, which) == ("wan", "decoder") else 1
        found[which] = _total([replace(operation, flops=slower * operation.flops) for operation in operations], gpu)
    return found


@cache
def _end(model: str, which: str) -> tuple[Operation, ...]:
    return tuple(end(model, which).fused)


def weights_gb(model: str) -> dict[str, float]:
    """GB that the transformer's linear layers take: in bf16, and with those of the blocks in 8 and in 4 bits."""
    linear, modulation = levers.weight_bytes(rows(model)[1].operations)
    of_bits = {"bf16": 16, "8 bits": 8, "4 bits": 4}
    return {name: (linear * bits / 16 + modulation) / 1e9 for name, bits in of_bits.items()}


def narrow_seconds(model: str, gpu: Gpu, choice: Choice) -> float:
    """As :func:`seconds`, with weights alone in 4 bits, attention back-end and schedule: what fits a small card."""
    gpu = replace(gpu, attention=SHARES[gpu.name])
    each = {k: _total(levers.narrow_weights(row.fused, 4), gpu) for k, row in rows(model).items()}
    return GUIDED[model] * len(choice.multiples) * each[1] / speedup(choice.multiples, each)


def routes(gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Everything, JSON-ready: per model what every lever adds, on every card, at every schedule."""
    found: dict[str, Any] = {"computed": True, "sources": SOURCES, "models": {}}
    found["memory_gb"] = {gpu.name: gpu.memory / 1e9 for gpu in gpus}
    for model in MODELS:
        found["models"][model] = {
            "title": MODELS[model].title,
            "steps": MODELS[model].steps,
            "wanted_s": WANTED[model],
            "weights_gb": _rounded(weights_gb(model)),
            "checks": _checks(model, gpus),
            "schedules": [_schedule(model, choice, gpus) for choice in choices(model)],
            "ends_s": {gpu.name: _rounded(ends_seconds(model, gpu)) for gpu in gpus},
        }
    return found


def _checks(model: str, gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    """Published times, and what is computed for the same runs."""
    found = []
    plain = Choice("plain", (1,) * MODELS[model].steps, (None, None))
    for what, where, published, on, whole in CHECKS[model]:
        gpu = next(gpu for gpu in gpus if gpu.name == where)
        computed = seconds(model, gpu, plain, on) if on else _eager(model, gpu)
        computed += sum(ends_seconds(model, gpu).values()) if whole else 0.0
        found.append({"what": what, "gpu": where, "published": published, "computed": round(computed, 2)})
    return found


def _eager(model: str, gpu: Gpu) -> float:
    return GUIDED[model] * MODELS[model].steps * rows(model)[1].seconds(gpu, graphs=False, compiled=False)


def _schedule(model: str, choice: Choice, gpus: Sequence[Gpu]) -> dict[str, Any]:
    names = [name for name in LEVERS if _does(name, model, choice)]
    ladder = []
    for count in range(1, len(names) + 1):
        on = names[:count]
        times = {gpu.name: seconds(model, gpu, choice, on) for gpu in gpus}
        ladder.append({"lever": on[-1], "seconds": _rounded(times)})
    return {
        "name": choice.name,
        "multiples": list(choice.multiples),
        "demo_db": {"rule": choice.decibels[0], "fitted": choice.decibels[1]},
        "levers": ladder,
        "every_wave_full": _rounded({gpu.name: seconds(model, gpu, choice, names, waves=False) for gpu in gpus}),
        "weights_in_4_bits": _rounded({gpu.name: narrow_seconds(model, gpu, choice) for gpu in gpus}),
    }


def _does(name: str, model: str, choice: Choice) -> bool:
    """Whether a lever applies: two of them to coarse steps alone, and Wan's one modulation is small."""
    coarse = bool(set(choice.multiples) & {2, 4})
    if name == "short text in coarse steps":
        return model == "flux" and coarse
    if name == "guidance in one batch":
        return GUIDED[model] > 1 and coarse
    return name != "modulation ahead" or model == "flux"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}
