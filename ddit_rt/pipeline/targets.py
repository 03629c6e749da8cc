"""Which policy a call with a target gets: a schedule that is kept for such calls, else a rule."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..config import DDiTConfig
from ..errors import ConfigError
from ..families import Family, denoisers, fingerprint
from ..granularity import Adapter
from ..runtime import MethodPatch, installed
from ..schedule import CallKey, FittedSchedule, Located, ScheduleStore, describe_machine
from .caller import arguments_of_call

logger = logging.getLogger(__name__)

FASTER = 1.15
"""A kept schedule may be so many times faster than the rule is at what was asked for; beyond that the rule ends
nearer."""

OWN_LEVELS = ("sigmas", "timesteps", "mu")
"""Arguments that give a call noise levels of its own; some pipelines put their defaults there before the first step."""

FITTED_HERE = "fitted by this process"
"""Origin of a schedule that no file could hold."""

SHIPPED_SCHEDULES = Path(__file__).parents[1] / "demo" / "schedules"
"""Schedules that come with the package, for the models that do."""


_Wanted = tuple[CallKey, float | None, float | None]


class KeptSchedules:
    """Finds kept schedules for the calls of one pipeline.

    Args:
        pipe: The pipeline.
        family: Of its transformers.
        adapter: What coarse steps run, or None.
        folders: Further folders of schedules, such as an adapter's.

    Attributes:
        adapter: As given.
    """

    def __init__(self, pipe: Any, family: Family, adapter: Adapter | None, folders: Sequence[Path] = ()) -> None:
        self.adapter = adapter
        self._pipe, self._family = pipe, family
        self._folders = [*folders, SHIPPED_SCHEDULES]
        self._looked_up = False
        self._store: ScheduleStore | None = None
        self._identity: tuple[str, str] | None = None
        self._found: dict[_Wanted, tuple[FittedSchedule, str] | None] = {}

    def find(
        self, config: DDiTConfig, scheduler: Any, arguments: Mapping[str, Any]
    ) -> tuple[FittedSchedule, str] | None:
        """The best schedule for a call, and where it comes from; None without a target, for noise levels of its own, or
        where none kept reaches it.

        What is not found is looked for again where schedules are fitted to first calls, which any process may do.

        Args:
            config: Settings.
            scheduler: With the call's timesteps set.
            arguments: Of the pipeline's call; :data:`OWN_LEVELS` as they were given.
        """
        if not config.has_target or has_own_levels(arguments):
            return None
        key = self.key(config, scheduler, arguments)
        if key is None:
            return None
        wanted = (key, config.speedup, config.quality)
        if self._found.get(wanted) is None and (config.fit or wanted not in self._found):
            located = self.locate(config, key)
            self._found[wanted] = None if located is None else (located.fitted, str(located.path))
        return self._found[wanted]

    def key(self, config: DDiTConfig, scheduler: Any, arguments: Mapping[str, Any]) -> CallKey | None:
        """Under which a call's schedules are kept; None where none can be. Arguments as of :meth:`find`."""
        if not self._looked_up:
            self._look_up(config)
        if self._store is None or self._identity is None:
            return None
        called = (self._pipe, self._family, scheduler, arguments)
        costs = config.costs if config.quality is None else "flops"  # a quality has no cost to count
        return key_of_call(*called, config.reference, self._identity, costs)

    def locate(self, config: DDiTConfig, key: CallKey) -> Located | None:
        """The best schedule that the store has now."""
        assert self._store is not None
        speedup, quality, multiples = config.speedup, config.quality, config.multiples
        # the rule makes whole evaluations, as a fit does: of few steps that may be far more than was asked for
        rule = math.inf if speedup is None else key.steps / max(int(key.steps / speedup + 1e-9), 1)
        return self._store.locate(key, speedup=speedup, quality=quality, multiples=multiples, fastest=FASTER * rule)

    def claim(self, key: CallKey) -> AbstractContextManager[bool]:
        """As :meth:`ScheduleStore.claim`."""
        assert self._store is not None
        return self._store.claim(key)

    def keep(self, config: DDiTConfig, key: CallKey, fitted: FittedSchedule) -> None:
        """Has later calls run a schedule: those of every process, or of this pipeline where it cannot be written."""
        assert self._store is not None
        self._store.save(key, fitted, str(getattr(self._pipe, "name_or_path", "") or ""))
        if self.locate(config, key) is None:
            self._found[key, config.speedup, config.quality] = fitted, FITTED_HERE

    def _look_up(self, config: DDiTConfig) -> None:
        """Opens the store and reads who the model is; neither can be had everywhere, and calls go on without."""
        self._looked_up = True
        try:
            store = ScheduleStore(shipped=self._folders)
            if config.fit or store.holds_any():
                self._store, self._identity = store, identity_of(self._pipe, self._family, self.adapter)
        except ConfigError as error:
            logger.warning("fitted schedules are not looked for: %s", error)


def has_own_levels(arguments: Mapping[str, Any]) -> bool:
    """Whether a call was given noise levels of its own, for which no schedule is fitted or kept."""
    return any(arguments.get(name) is not None for name in OWN_LEVELS)


def identity_of(pipe: Any, family: Family, adapter: Adapter | None = None) -> tuple[str, str]:
    """Fingerprints of a pipeline's transformers and of an adapter; the second is empty without one.

    Where transformers take turns, the noise levels at which they do are in the first.

    Raises:
        ConfigError: the weights are nowhere to be read, as under some kinds of offloading.
    """
    modules = [unwrap_module(module) for module in denoisers(pipe, family).values()]
    model, boundaries = fingerprint(*modules), family.boundaries(pipe)
    if boundaries:
        model = hashlib.sha256(f"{model} {boundaries}".encode()).hexdigest()[: len(model)]
    return model, "" if adapter is None else fingerprint(adapter)


def key_of_call(
    pipe: Any,
    family: Family,
    scheduler: Any,
    arguments: Mapping[str, Any],
    reference: str,
    identity: tuple[str, str],
    costs: str = "flops",
) -> CallKey | None:
    """Under which a call's schedules are kept; None for a call that may run a part of its steps, or has no size.

    Args:
        pipe, family: The pipeline, and the family of its transformers.
        scheduler: With the call's timesteps set.
        arguments: Of the pipeline's call, sizes included.
        reference: What the schedule aims at.
        identity: As of :func:`identity_of`.
        costs: What a speed-up counts, "flops" or "seconds".
    """
    height, width = arguments.get("height"), arguments.get("width")
    if "strength" in arguments or not height or not width:
        return None
    geometry = family.geometry(pipe, height, width, family.frames_of(arguments))
    return CallKey.of(
        identity[0],
        scheduler,
        len(scheduler.timesteps),
        guided=family.is_guided(pipe, arguments),
        tokens=geometry.tokens(1) // geometry.frames,
        frames=geometry.frames,
        reference="converged" if reference == "converged" else "plain",
        adapter=identity[1],
        machine=describe_machine(torch.device(pipe._execution_device)) if costs == "seconds" else "",
    )


@contextmanager
def arguments_seen(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """Within the context, collects the arguments of the pipeline's calls, defaults filled in, as its steps begin."""
    seen: list[dict[str, Any]] = []

    def on_set_timesteps(inner: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(arguments_of_call())
        return inner(*args, **kwargs)

    with installed([MethodPatch(pipe.scheduler, "set_timesteps", on_set_timesteps)]):
        yield seen
