"""What happened at every step: the report of a pipeline call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from ..multiples import SKIP, SUPPORTED_MULTIPLES, TEMPORAL_MULTIPLES, short_label

if TYPE_CHECKING:
    import torch

    from .fitted import FittedSchedule


Value = TypeVar("Value")


class Late(Generic[Value]):
    """A field of a dataclass that may be given a function in place of a value; it is called at the first reading.

    Args:
        default: Function that makes the field's default.
    """

    def __init__(self, default: Callable[[], Value]) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, record: None, owner: type) -> Callable[[], Value]: ...

    @overload
    def __get__(self, record: object, owner: type) -> Value: ...

    def __get__(self, record: object | None, owner: type) -> Value | Callable[[], Value]:
        if record is None:
            return self._default  # what dataclass takes for the default
        value = record.__dict__[self._name]
        if callable(value):
            value = record.__dict__[self._name] = value()
        return value  # type: ignore[no-any-return]

    def __set__(self, record: object, value: Value | Callable[[], Value]) -> None:
        record.__dict__[self._name] = value


@dataclass
class StepRecord:
    """One denoising step. What the device still has to tell is waited for when it is first read.

    Attributes:
        index: From 0.
        timestep: As the scheduler gives it.
        sigma: Noise level in [0, 1].
        multiple: Patch size as a multiple of the model's own; 0 for a step without a model call.
        tokens: Image (or video) tokens the transformer saw per sample and call.
        patch_std: Multiple -> ρ-quantile of the per-patch standard deviations; empty while the history fills.
        flops: Floating-point operations of all transformer calls of the step, probes included.
        full_flops: What they would have been at multiple 1.
        executed: "eager", "graph" or "cached" (no model call).
        kernels: What computed the transformer's two ends: "fused" (our kernels, with all that a coarse path does around
            the model), "torch" (its own layers), "" where no model ran.
        note: Why the step did not run as the policy wanted, if so.
    """

    index: int
    timestep: float
    sigma: float
    multiple: int
    tokens: int
    patch_std: Late[dict[int, float]] = Late(dict)
    flops: float = 0.0
    full_flops: float = 0.0
    executed: str = "eager"
    kernels: str = ""
    note: Late[str] = Late(str)
    elapsed: Callable[[], float] | None = field(default=None, repr=False)
    miss: torch.Tensor | None = field(default=None, repr=False)

    @property
    def missed(self) -> float | None:
        """What the forecast for this step missed, where skipped steps led up to it: root mean square of the difference
        over that of the prediction, the largest of the batch. Reading waits for the device."""
        return None if self.miss is None else float(self.miss)

    @property
    def seconds(self) -> float:
        """Time from the step's first transformer call to the end of its scheduler step."""
        return self.elapsed() if self.elapsed is not None else 0.0

    def to_dict(self) -> dict[str, Any]:
        names = [
            "index",
            "timestep",
            "sigma",
            "multiple",
            "tokens",
            "patch_std",
            "flops",
            "full_flops",
            "executed",
            "kernels",
            "note",
        ]
        return {**{name: getattr(self, name) for name in names}, "missed": self.missed, "seconds": self.seconds}


@dataclass
class Report:
    """The steps of one pipeline call, and the settings they ran with.

    Attributes:
        steps: One :class:`StepRecord` per denoising step.
        config: The :class:`ddit_rt.DDiTConfig` as a dict.
        complete: False when the call ended early, by an exception for instance.
        kept: The fitted schedule that was found for a target, if one was.
        origin: Where the choice of steps comes from: "rule" of a target, "threshold", "given" for ``schedule=``, or of
            ``kept`` its file; "fitted by this process" where no file could hold it.
        fit: With ``fit="first-calls"``, what this call did for a fit, or why none was made.
        attention: The attention back-end that the settings chose, and why; empty where they leave it as it is.
    """

    steps: list[StepRecord]
    config: dict[str, Any]
    complete: bool = False
    kept: FittedSchedule | None = None
    origin: str = ""
    fit: str = ""
    attention: str = ""

    @property
    def speedup_estimate(self) -> float:
        """FLOP of the same steps at multiple 1 over the FLOP spent: what arithmetic allows, not a measured time."""
        spent = sum(step.flops for step in self.steps)
        return sum(step.full_flops for step in self.steps) / spent if spent else 1.0

    @property
    def schedule(self) -> list[int]:
        """The multiples, in order; feed it back as ``schedule=`` to repeat the run, unless its noise levels were moved,
        as ``reference="converged"`` does."""
        return [step.multiple for step in self.steps]

    def summary(self) -> dict[str, Any]:
        """What a server's response tells of its steps, in JSON's types.

        Returns:
            ``speedup`` (ratio of FLOP), ``steps`` (a multiple per step, 0 where the model was not called) and ``sizes``
            (how many steps at p, 2p and 4p, at those that span frames if there are any, and skipped).
        """
        steps = self.schedule
        return {
            "speedup": round(self.speedup_estimate, 3),
            "steps": steps,
            "sizes": {
                short_label(multiple): steps.count(multiple)
                for multiple in (*SUPPORTED_MULTIPLES, *(k for k in TEMPORAL_MULTIPLES if k in steps), SKIP)
            },
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "complete": self.complete,
            "kept": None if self.kept is None else asdict(self.kept),
            "origin": self.origin,
            "fit": self.fit,
            "attention": self.attention,
            "speedup_estimate": self.speedup_estimate,
            "steps": [step.to_dict() for step in self.steps],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text (a σ that is not finite becomes null); written to ``path`` too if one is given."""
        text = json.dumps(_finite(self.to_dict()), indent=2)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draws the schedule over the σ curves (the paper's figures 10 and 6) into an image file."""
        from .plots import plot_report

        return plot_report(self, Path(path))

    def __str__(self) -> str:
        multiples = self.config.get("multiples", (1, 2, 4))
        headings = [f"σ_{k}p" if k in SUPPORTED_MULTIPLES else f"σ_{short_label(k)}" for k in multiples]
        head = (
            f"{'step':>4} {'timestep':>9} {'size':>5} {'tokens':>7}"
            + "".join(f" {heading:>9}" for heading in headings)
            + f" {'GFLOP':>9} {'seconds':>8}  executed kernels"
        )
        lines = [head]
        for step in self.steps:
            stds = "".join(f" {step.patch_std[k]:9.2e}" if k in step.patch_std else f" {'-':>9}" for k in multiples)
            lines.append(
                f"{step.index:4d} {step.timestep:9.2f} {short_label(step.multiple):>5} {step.tokens:7d}{stds}"
                f" {step.flops / 1e9:9.2f} {step.seconds:8.3f}  {step.executed:<8} {step.kernels:<5}"
                f"{'  ' + step.note if step.note else ''}".rstrip()
            )
        counts = ", ".join(
            f"{self.schedule.count(k)} {'at ' if k else ''}{short_label(k)}"
            for k in (0, *multiples)
            if k in self.schedule
        )
        lines.append(
            f"{len(self.steps)} steps ({counts}); {self.speedup_estimate:.2f}x fewer FLOP"
            + ("" if self.complete else "; the call did not finish")
            + ("" if self.kept is None else f"; by a schedule fitted on {self.kept.prompts} prompts, {self.origin}")
            + (f"; {self.fit}" if self.fit else "")
        )
        if self.attention:
            lines.append(f"attention: {self.attention}")
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
