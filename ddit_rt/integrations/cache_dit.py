"""cache-dit (1.5): a fitted schedule of skipped steps as its mask of the steps to compute.

What the file holds is read by ``cache_dit.load_configs``. In a step with a 0 the first block runs, and what the others
would add to it is taken from the line through what they added before (its TaylorSeer of 1st order); nothing is
corrected afterwards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache_masks import cache_mask

if TYPE_CHECKING:
    from ..schedule import FittedSchedule


def cache_settings(schedule: FittedSchedule, guided: bool | None = None) -> dict[str, Any]:
    """What ``cache_dit.load_configs`` takes, to run as many of the blocks as the schedule runs steps.

    Args:
        schedule: Fitted.
        guided: Whether every step calls the transformer once more for the negative prompt; None leaves that to
            cache-dit, which goes by the pipeline's class.

    Raises:
        ScheduleError: as of :func:`ddit_rt.integrations.cache_mask`.
    """
    mask = cache_mask(schedule)
    config: dict[str, Any] = {
        "Fn_compute_blocks": 1,  # the least it takes
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 0,
        "num_inference_steps": len(mask),
        "steps_computation_mask": mask,
        "steps_computation_policy": "static",
        # read by load_configs, which makes a calibrator of it: the schedule was fitted to lines
        "enable_taylorseer": True,
        "taylorseer_order": 1,
    }
    if guided is not None:
        config["enable_separate_cfg"] = guided
    return {"cache_config": config}


def export(schedule: FittedSchedule, path: str | Path, guided: bool | None = None) -> Path:
    """Writes :func:`cache_settings` as JSON.

    Returns:
        The file's path.

    Raises:
        ScheduleError: as of :func:`ddit_rt.integrations.cache_mask`.
    """
    text = json.dumps(cache_settings(schedule, guided), indent=2) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
