"""Loading the model that a command names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .quiet import hide_loading_bars
from .terminal import activity


def load(
    model: str, dtype: str | None, device: str | None, *calls: Mapping[str, Any], scheme: str | None = None
) -> Any:
    """The pipeline, after a check that it takes these calls.

    Args:
        model, dtype, device: As for :func:`ddit_rt.pipeline.load_any`.
        *calls: Arguments of the pipeline's call.
        scheme: As for :func:`ddit_rt.pipeline.load_any`.

    Raises:
        ConfigError: no such model, it does not take one of the calls, or it cannot be quantised so.
        UnsupportedPipelineError: the pipeline is none that ddit_rt can accelerate.
    """
    from ..pipeline import check_call, load_any

    hide_loading_bars()
    with activity(f"loading {model}"):
        pipe = load_any(model, dtype, device, scheme)
    for call in calls:
        check_call(pipe, call)
    return pipe


def load_prompts(source: str | None, count: int, model: str, required: int | None = None) -> list[str]:
    """The first ``count`` prompts of ``--prompts``; by default captions of a shipped model's own world, or the demo's.

    Args:
        source: As for :func:`ddit_rt.evaluate.load_prompts`, or None.
        count: How many.
        model: That they are for.
        required: As for :func:`ddit_rt.evaluate.load_prompts`.
    """
    from ..evaluate import load_prompts as read
    from ..pipeline import DEMO, SHIPPED

    return read(source or (model if model in SHIPPED else DEMO), count, required)


def shipped_prompts(model: str, missing: str) -> dict[str, str]:
    """The example prompts of a shipped model, by name.

    Raises:
        ConfigError: with the text ``missing``, for every other model.
    """
    from ..pipeline import example_prompts

    prompts = example_prompts(model)
    if not prompts:
        raise ConfigError(missing)
    return prompts
