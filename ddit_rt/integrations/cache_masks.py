"""Fitted schedules of skipped steps as masks for the caches of engines, whose own models we do not run."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from ..errors import ScheduleError
from ..multiples import SKIP

if TYPE_CHECKING:
    from ..schedule import FittedSchedule


def cache_mask(fitted: FittedSchedule) -> list[int]:
    """A fitted schedule of skipped steps as the mask of cache-dit: 1 where the model is called, 0 where it is not.

    Raises:
        ScheduleError: it has coarse steps, noise levels of its own, begins with a skipped step, or skips none.
    """
    steps = list(fitted.schedule)
    for index, multiple in enumerate(steps):
        if multiple not in (SKIP, 1):
            raise ScheduleError(
                f"schedule[{index}]={multiple}: cache-dit has no coarse steps. Fit one of full and skipped steps: "
                "ddit-rt fit MODEL --kinds 1,0 --export ..., or run this one by our own runtime."
            )
    if fitted.sigmas or fitted.reference != "plain":
        raise ScheduleError(
            f"reference={fitted.reference!r}: the schedule has noise levels of its own, or counts on a solver of its "
            "own, which cache-dit has not. Fit one with --reference plain."
        )
    if steps[0] == SKIP:
        raise ScheduleError("schedule[0]=0: the first step has nothing to go on from; begin with 1.")
    if SKIP not in steps:
        raise ScheduleError("the schedule skips no step: there is nothing for a cache to do.")
    return steps


def sglang_environment(fitted: FittedSchedule) -> dict[str, str]:
    """Environment variables that make SGLang's own denoising loop follow a fitted schedule of skipped steps.

    In a skipped step cache-dit still runs the first block (``FN``) and foretells what the others add from the line
    through the last two (``TAYLORSEER``); our runtime calls nothing and corrects the gap afterwards. So the steps are
    ours and the pictures are not: compare before you serve.

    Raises:
        ScheduleError: as of :func:`cache_mask`.
    """
    runs = [(value, len(list(run))) for value, run in groupby(cache_mask(fitted))]
    compute, cached = ([length for value, length in runs if value == wanted] for wanted in (1, 0))
    return {
        "SGLANG_CACHE_DIT_ENABLED": "true",
        "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": ",".join(map(str, compute)),
        "SGLANG_CACHE_DIT_SCM_CACHE_BINS": ",".join(map(str, cached)),
        "SGLANG_CACHE_DIT_SCM_POLICY": "static",
        # the mask alone decides: no step before its first skipped one may be cached anyway
        "SGLANG_CACHE_DIT_WARMUP": str(compute[0]),
        "SGLANG_CACHE_DIT_TAYLORSEER": "true",
        "SGLANG_CACHE_DIT_TS_ORDER": "1",
    }
