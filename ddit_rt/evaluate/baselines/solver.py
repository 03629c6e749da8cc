"""Better solvers of the plain pipeline's flow at fewer model evaluations, on its own noise levels or spaced anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from ...errors import ConfigError
from ...trajectories import Solver, check_deterministic_flow, respaced, solved_by
from ..methods import Method
from .base import Baseline, Listing

logger = logging.getLogger(__name__)

SHARES = (2, 3, 4)
"""How many times fewer evaluations than the plain run, as :mod:`.fewer_steps` takes steps."""

DENSER = 1.4
"""The spacing that puts more levels where there is most noise, and errors grow most."""


class OtherSolver(Baseline):
    """Another solver on a plain pipeline: ``{"solver": {"type": name, "spacing": w}}``, nothing beside it.

    ``spacing`` reads the scheduler's noise levels at u^w, u even from 0 (noise) to 1; 1, the default, leaves them as
    they are. A method's steps are those of the solver; its name says how many model evaluations they take, and its
    FLOP are counted as executed.

    Attributes:
        kind: The curve its methods lie on.
        solver: Makes the steps.
        spacings: Those that are compared.
    """

    kind: ClassVar[str]
    solver: ClassVar[Solver]
    spacings: ClassVar[Sequence[float]] = (1, DENSER)

    def methods(self, listing: Listing) -> list[Method]:
        try:
            check_deterministic_flow(listing.pipe)
        except ConfigError as error:
            logger.warning("%s is not compared: %s", self.name, error)
            return []
        counts = [round(listing.steps / share) for share in (SHARES if listing.full else SHARES[:2])]
        spacings = self.spacings if listing.full else self.spacings[-1:]
        found = [self.method(max(count, 1), listing.steps, w) for w in spacings for count in counts]
        # of few evaluations, several counts may come to the same steps
        return list({method.name: method for method in found}.values())

    def method(self, evaluations: int, reference: int, spacing: float) -> Method:
        """The solver at no more than so many model evaluations.

        Args:
            evaluations: At least 1.
            reference: Steps of the plain run it is compared with.
            spacing: w.
        """
        steps = (evaluations - 1) // self.solver.order + 1
        settings: dict[str, Any] = {"type": self.name}
        label, kind = f"{self.name}-{self.solver.evaluations(steps)}", self.kind
        if spacing != 1:
            settings["spacing"] = spacing
            label, kind = f"{label}-w{spacing:g}", f"{kind}, spacing {spacing:g}"
        return Method(f"{label}@{reference}", kind, steps, reference, {"solver": settings})

    def check(self, where: str, options: Mapping[str, Any]) -> None:
        """Looks at options.

        Args:
            where: Name of the method, for errors.
            options: Without the type.

        Raises:
            ConfigError: an unknown option, or a spacing that is no number above 0.
        """
        unknown = sorted(set(options) - {"spacing"})
        if unknown:
            raise ConfigError(f"{where}: solver {self.name!r} has no option {', '.join(unknown)}, only spacing.")
        spacing = options.get("spacing", 1)
        if not isinstance(spacing, (int, float)) or not spacing > 0:
            raise ConfigError(f"{where}: spacing={spacing!r}: a number above 0.")

    @contextmanager
    def enabled(self, pipe: Any, options: Mapping[str, Any]) -> Iterator[None]:
        """The solver on a plain pipeline for the length of a ``with`` block.

        Args:
            pipe: A plain pipeline.
            options: Without the type.

        Raises:
            ConfigError: the options are out of range, or the pipeline's scheduler is none that can be replaced.
        """
        self.check(self.name, options)
        with solved_by(pipe, self.solver, partial(respaced, power=options.get("spacing", 1))):
            yield
