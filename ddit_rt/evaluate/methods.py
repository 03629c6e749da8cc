"""A method of an evaluation as plain data: a pipeline's step count, and what accelerates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One point of a speed-quality curve, as plain data.

    Attributes:
        name: Unique; also a folder name.
        kind: The curve it lies on.
        steps: Denoising steps.
        reference: Denoising steps of the plain run it is compared with.
        settings: Arguments of :func:`ddit_rt.accelerate` with ``cache`` as a mapping such as
            ``{"type": "teacache", "threshold": 0.4}``; or ``{"library": {"type": "dbcache", ...}}`` for another library
            with its options; or ``{"solver": {"type": "unipc", "spacing": 1.4}}`` for another solver of the plain
            pipeline's flow; or ``{"target": {"speedup": 2, "reference": "plain"}}`` for the rule behind
            ``accelerate(pipe, speedup=...)``; or ``{"fitted": {...}}`` with the fields of a schedule file; None for
            the plain pipeline. The types are names of
            :data:`~ddit_rt.evaluate.baselines.BASELINES`.
    """

    name: str
    kind: str
    steps: int
    reference: int
    settings: Mapping[str, Any] | None = None

    @property
    def is_reference(self) -> bool:
        return self.settings is None and self.steps == self.reference

    @property
    def other_library(self) -> Any:
        """Type and options of the other library that the method runs; None for methods of our own."""
        return self.settings.get("library") if self.settings is not None else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
