"""What a baseline is: the contract between an evaluation and what it compares with.

A baseline is one file with one class, named in :data:`~ddit_rt.evaluate.baselines.BASELINES`. There are four kinds:

- a :class:`Baseline` whose methods run the plain pipeline, or ``ddit_rt.accelerate`` with settings it has anyway;
- a :class:`StepCache`, which ``accelerate(cache=...)`` puts on;
- an :class:`~ddit_rt.evaluate.baselines.solver.OtherSolver`, which steps through the plain pipeline's noise levels;
- a :class:`~ddit_rt.evaluate.baselines.other_library.Library`, another package that is put on the plain pipeline.

No other file compares the name of a baseline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError
from ..methods import Method


@dataclass(frozen=True)
class Listing:
    """What a baseline lists its methods for: one model and one step count.

    Attributes:
        pipe: The pipeline; left plain.
        steps: Denoising steps of the plain run.
        call: Arguments of the pipeline, ``num_inference_steps`` among them, without a prompt.
        prompts: To calibrate on.
        full: False for the few methods that a second step count is shown with.
        fit: Fit coefficients to the model instead of taking the published ones.
        progress: Called with a line of text now and then.
    """

    pipe: Any
    steps: int
    call: Mapping[str, Any]
    prompts: Sequence[str] = ()
    full: bool = True
    fit: bool = False
    progress: Callable[[str], None] = lambda text: None


class Baseline(ABC):
    """Something that users would pick instead.

    Attributes:
        name: Unique; the ``type`` in the settings of a step cache or a library.
    """

    name: ClassVar[str]

    @property
    def missing(self) -> str | None:
        """Why the baseline cannot run here, as in "needs X: pip install X"; None if it can."""
        return None

    @abstractmethod
    def methods(self, listing: Listing) -> list[Method]:
        """The methods for one step count, as plain data. Only called if nothing is :attr:`missing`."""


class StepCache(Baseline):
    """A step cache that ``ddit_rt.accelerate`` takes: ``{"cache": {"type": name, option: value, ...}}``.

    Attributes:
        kind: The curve its methods lie on.
        config_class: Class of the config that ``DDiTConfig.cache`` takes; its arguments are the options.
        defaults: Options that are given where a method does not.
    """

    kind: ClassVar[str]
    config_class: ClassVar[Callable[..., Any]]
    defaults: ClassVar[Mapping[str, Any]] = {}

    def config(self, where: str, options: Mapping[str, Any]) -> Any:
        """The cache's config.

        Args:
            where: Name of the method, for errors.
            options: Of a method's ``cache``, without the type.

        Raises:
            ConfigError: an option that the cache does not have, or a value out of range.
        """
        try:
            return type(self).config_class(**{**self.defaults, **options})
        except TypeError as error:
            raise ConfigError(f"{where}: cache type {self.name!r} refuses its options: {error}.") from None

    def method(self, label: str, steps: int, **options: Any) -> Method:
        """A method that runs every step at the full size with this cache on."""
        cache = {"type": self.name, **options}
        settings = {"multiples": [1], "threshold": 0.0, "cache": cache}
        return Method(f"{self.name}-{label}@{steps}", self.kind, steps, steps, settings)


def fixed(name: str, kind: str, steps: int, schedule: Sequence[int], **settings: Any) -> Method:
    """A method that follows a fixed schedule.

    Args:
        name: Without the step count.
        kind: The curve it lies on.
        steps: Denoising steps.
        schedule: A multiple per step, 0 for a skipped one.
        settings: Further settings of ``accelerate``.
    """
    return Method(f"{name}@{steps}", kind, steps, steps, {"schedule": list(schedule), **settings})
