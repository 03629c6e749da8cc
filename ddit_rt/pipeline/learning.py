"""What is learned from the calls of an accelerated pipeline: the contract with whoever stands above and does it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..config import DDiTConfig
from ..schedule import CallKey, Report
from .caller import Caller, calling_pipeline


@dataclass(frozen=True)
class EndedCall:
    """A pipeline call with a target that has made all its steps and its picture, and is about to return it.

    Attributes:
        arguments: As they were given, by name, defaults filled in.
        key: Under which schedules for such calls are kept.
        config: Settings that it ran with.
        report: Of it; what is learned may be written into its ``fit``.
    """

    arguments: Mapping[str, Any]
    key: CallKey
    config: DDiTConfig
    report: Report


class Learner(Protocol):
    """Hears of calls for which no schedule was kept."""

    def call_ended(self, call: EndedCall) -> None:
        """Called before such a call returns. It may run the pipeline, and has to keep its errors to itself."""
        ...


class Listener:
    """Tells a learner of the calls of one pipeline for which no schedule was kept.

    Attributes:
        learner: Who is told; None for nobody.
    """

    def __init__(self) -> None:
        self.learner: Learner | None = None
        self._local = threading.local()

    def call_begins(self, caller: Caller, arguments: Mapping[str, Any]) -> None:
        """A call of the pipeline shows its arguments before it makes its first step."""
        self._local.caller, self._local.arguments, self._local.key = caller, arguments, None

    def steps_begin(self, key: CallKey | None) -> None:
        """A call is about to make its first step; ``key`` is that of its schedules, None if it cannot have one."""
        if getattr(self._local, "caller", None) == calling_pipeline():
            self._local.key = key

    def call_ends(self, config: DDiTConfig, report: Report | None) -> None:
        """A call is about to return; its settings, and the last report."""
        heard = dict(vars(self._local))
        vars(self._local).clear()  # nothing of the call is held on to
        if self.learner is None or heard.get("caller") != calling_pipeline() or heard["key"] is None:
            return
        if report is not None and report.complete and report.kept is None and config.has_target:
            self.learner.call_ended(EndedCall(heard["arguments"], heard["key"], config, report))
