"""Fits a schedule to the first calls of a pipeline that ask for a target: ``accelerate(pipe, fit="first-calls")``.

Nothing is taken from the calls but their arguments: they run as they would without a fit. A fit then repeats them
plainly, under the recorder of :mod:`ddit_rt.trajectories`, from other noise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..multiples import SKIP, SUPPORTED_MULTIPLES
from ..pipeline import AcceleratedPipeline, EndedCall, has_own_levels, own_bar_off
from ..runtime import is_parallel
from ..schedule import CallKey, FittedSchedule
from .fitter import fit_schedule

logger = logging.getLogger(__name__)

FIRST_CALLS = 4
"""Calls of one kind that a schedule is fitted to."""

KINDS = 4
"""Kinds of calls whose arguments are held at once; those of the kind that was called the longest ago are dropped."""

PLAIN_RUNS = 8.5
"""What a fit to a speed-up costs per call, in plain runs; to a quality about twice that."""

# a fit decides about these itself, or has no use for them
_LEFT_OUT = frozenset(
    {
        *("generator", "latents", "output_type", "return_dict", "num_inference_steps"),
        *("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    }
)
_COPIES = ("num_images_per_prompt", "num_videos_per_prompt")

_Target = tuple[CallKey, float | None, float | None]
"""What a schedule is found again for: a size class and a target."""

_Kind = tuple[CallKey, float | None, float | None, int, int]
"""Target, tokens and prompts of a call: along calls of one size alone can a fit measure."""


class FirstCalls:
    """Counts the calls of an accelerated pipeline that no schedule is kept for, and fits one.

    The last of :data:`FIRST_CALLS` calls of a kind (model, scheduler, steps, guidance, size, number of prompts and
    target) makes the fit when its picture is there, before it returns, in its own thread: a pipeline serves one thread
    at a time, and the device would be shared in any case. What it finds serves every size of that class. Of several
    processes with one cache directory one fits, the others go on by the rule and find the schedule later. An error in a
    fit is logged; calls of that size class and target then go on by the rule.

    Args:
        accelerated: The accelerated pipeline.
    """

    def __init__(self, accelerated: AcceleratedPipeline) -> None:
        self._accelerated = accelerated
        self._calls: OrderedDict[_Kind, list[dict[str, Any]]] = OrderedDict()
        self._settled: set[_Target] = set()
        self._lock = threading.Lock()

    def call_ended(self, call: EndedCall) -> None:
        """Takes in a call, and makes the fit if it is the last that is needed."""
        target = (call.key, call.config.speedup, call.config.quality)
        if target in self._settled or not (call.config.chosen_target or SKIP in call.report.schedule):
            return  # nobody asked for a run of so few steps to be any faster
        if has_own_levels(call.arguments):
            call.report.fit = "not recorded: it has noise levels of its own"
            return
        if not self._lock.acquire(blocking=False):
            return
        try:
            kind = (*target, call.report.steps[0].tokens, _prompts_of(call.arguments))
            calls = self._calls.setdefault(kind, [])
            self._calls.move_to_end(kind)
            while len(self._calls) > KINDS:
                self._calls.popitem(last=False)
            if len(calls) < FIRST_CALLS:
                calls.append(repeatable(call.arguments))
            call.report.fit = f"recorded for a fit, {len(calls)} of {FIRST_CALLS}"
            if len(calls) == FIRST_CALLS:
                self._settle(target, calls, call)
        finally:
            self._lock.release()

    def _settle(self, target: _Target, calls: list[dict[str, Any]], call: EndedCall) -> None:
        """Fits, unless another process does or has."""
        kept, key, config = self._accelerated.kept, call.key, call.config
        with kept.claim(key) as claimed:
            if not claimed:
                call.report.fit = "another process is fitting"
                return
            if kept.locate(config, key) is None:
                began = time.perf_counter()
                try:
                    kept.keep(config, key, self._fitted(calls, call))
                    call.report.fit = f"fitted to {len(calls)} calls in {time.perf_counter() - began:.1f} s"
                except Exception as error:  # the picture is there, and nothing of it depends on a fit
                    call.report.fit = f"not fitted: {error}"
                    logger.warning("no schedule is fitted to calls like the last, they go on by the rule: %s", error)
            self._settled.add(target)
            for kind in [kind for kind in self._calls if kind[:3] == target]:
                del self._calls[kind]

    def _fitted(self, calls: list[dict[str, Any]], call: EndedCall) -> FittedSchedule:
        accelerated, config = self._accelerated, call.config
        if any(map(is_parallel, accelerated.transformers.values())):
            raise RuntimeError("the transformer runs on several devices at once; use ddit_rt.fit on one")
        full = [step.seconds for step in call.report.steps if step.multiple == 1]
        runs = PLAIN_RUNS * len(calls) * (1 if config.quality is None else 2)
        seconds = runs * len(call.report.steps) * sum(full) / len(full)
        logger.warning(
            "a schedule is fitted to the last %d calls: about %.0f plain runs, %.0f s; then this call returns, and "
            "later ones run it",
            len(calls),
            runs,
            seconds,
        )
        kinds = [k for k in config.multiples if k in SUPPORTED_MULTIPLES]
        with accelerated.taken_off(), own_bar_off(accelerated.pipe):
            return fit_schedule(
                accelerated.pipe,
                calls,
                config.speedup,
                [*kinds, SKIP],
                progress=lambda text: logger.info("fitting: %s", text),
                adapter=accelerated.kept.adapter,
                quality=config.quality,
                reference=config.reference,
                keep=False,
                costs=call.key.costs,
                num_inference_steps=call.arguments.get("num_inference_steps", call.key.steps),
            )


def _prompts_of(arguments: Mapping[str, Any]) -> int:
    """How many prompts a call makes pictures of."""
    prompt = arguments.get("prompt")
    if prompt is None:
        prompt = arguments.get("prompt_embeds")
    return 1 if prompt is None or isinstance(prompt, str) else len(prompt)


def repeatable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to make a call once more, for one picture of every prompt, from any noise."""
    kept = {name: value for name, value in arguments.items() if name not in _LEFT_OUT}
    return kept | {name: 1 for name in _COPIES if name in kept}
