"""SGLang-diffusion: what its diffusers back-end loads is accelerated.

Verified with sglang 0.5.23. The entry point ``sglang.multimodal_gen.plugins`` calls :func:`register` once in every
process, before the engine resolves hooks; names of the engine's functions below are the contract.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..errors import DDiTError
from .settings import PluginSettings, request_settings, settings_from_environment

logger = logging.getLogger(__name__)

REQUEST_KEY = "ddit"
"""In a request's ``diffusers_kwargs``, in ``usage`` on its way to the HTTP process, and in the response."""

_RUNTIME = "sglang.multimodal_gen.runtime"
LOAD = f"{_RUNTIME}.pipelines.diffusers_pipeline.DiffusersPipeline._load_diffusers_pipeline"
FORWARD = f"{_RUNTIME}.pipelines.diffusers_pipeline.DiffusersExecutionStage.forward"
SAMPLING = f"{_RUNTIME}.entrypoints.openai.utils.build_sampling_params"
RESPONSE = f"{_RUNTIME}.entrypoints.openai.utils.add_common_data_to_response"
APP = f"{_RUNTIME}.entrypoints.http_server.create_app"


def register() -> None:
    """Registers the hooks; the entry point's callable. What stands against it is logged, and the engine runs plain."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    try:
        settings = settings_from_environment()
    except DDiTError as error:
        # the engine would log a traceback and go on; this is one line that names the value
        logger.error("ddit_rt NOT APPLIED, SGLang runs plain: %s", error)
        return
    if settings is None:
        logger.warning(
            "ddit_rt is installed and NOT APPLIED: no DDIT_* variable is set. DDIT_SPEEDUP=2 accelerates every "
            "request, DDIT_SPEEDUP=1 those that ask for it."
        )
        return
    HookRegistry.register(LOAD, _after_load(settings), HookType.AFTER)
    HookRegistry.register(FORWARD, around_forward, HookType.AROUND)
    HookRegistry.register(SAMPLING, _check_request(settings), HookType.BEFORE)
    HookRegistry.register(RESPONSE, tell_in_response, HookType.AFTER)
    HookRegistry.register(APP, let_responses_tell, HookType.BEFORE)
    logger.warning("ddit_rt will accelerate what SGLang's diffusers back-end loads (--backend diffusers), nothing else")


def _after_load(settings: PluginSettings) -> Callable[..., Any]:
    def after_load(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """Behind device, offload, attention back-end, cache-dit and compilation, which all come before ours."""
        from .acceleration import accelerate_for

        accelerate_for("SGLang", pipe, settings)
        return pipe

    return after_load


def around_forward(forward: Callable[..., Any], stage: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a request of the diffusers back-end by its own settings, and puts what happened into its ``usage``.

    Args:
        forward: ``DiffusersExecutionStage.forward``.
        stage: With ``diffusers_pipe``.
        batch: The request: ``extra["diffusers_kwargs"]["ddit"]`` is taken out, so that the engine does not warn of it.
        *args, **kwargs: Further arguments of ``forward``.

    Raises:
        ConfigError, ScheduleError: settings that cannot be run; the engine makes an error of the request.
    """
    from .acceleration import run_request, steps_of_call

    extra = batch.extra or {}
    own = dict(extra.get("diffusers_kwargs") or {})
    wanted = own.pop(REQUEST_KEY, None)
    if wanted is not None:
        batch.extra = {**extra, "diffusers_kwargs": own}
    named = {} if batch.num_inference_steps is None else {"num_inference_steps": batch.num_inference_steps}
    pipe = stage.diffusers_pipe
    steps = steps_of_call(pipe, {**named, **own})
    result, facts = run_request(pipe, wanted, steps, lambda: forward(stage, batch, *args, **kwargs))
    if facts is not None:
        result.usage = {**(result.usage or {}), REQUEST_KEY: facts}
    return result


def _check_request(settings: PluginSettings) -> Callable[..., None]:
    def check_request(*args: Any, **kwargs: Any) -> None:
        """Refuses a request's settings in the HTTP process, where a ValueError becomes status 400.

        Raises:
            ConfigError, ScheduleError: as of :func:`ddit_rt.integrations.settings.request_settings`, or the settings do
                not go with the request's number of steps.
        """
        given = kwargs.get("diffusers_kwargs")
        if not isinstance(given, dict) or given.get(REQUEST_KEY) is None:
            return
        from ..schedule import make_policy

        _, config = request_settings(given[REQUEST_KEY], settings.config)
        steps = given.get("num_inference_steps", kwargs.get("num_inference_steps"))
        # from a picture a part of the steps is made, by a strength that may be the pipeline's own, which is not here
        from_picture = kwargs.get("image_path") or given.keys() & {"image", "strength", "video"}
        if isinstance(steps, int) and not from_picture:
            make_policy(config, None).start(steps)

    return check_request


def tell_in_response(response: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Moves what happened from a response's ``usage``, which has no room for it, to an entry of its own."""
    usage = response.get("usage")
    if isinstance(usage, dict) and REQUEST_KEY in usage:
        response[REQUEST_KEY] = usage.pop(REQUEST_KEY)
        if not usage:
            del response["usage"]
    return response


def let_responses_tell(*args: Any, **kwargs: Any) -> None:
    """Before the app is built: the engine's response classes keep entries that they do not know.

    Where that fails responses are the engine's own, without ours.
    """
    try:
        from sglang.multimodal_gen.runtime.entrypoints.openai.protocol import ImageResponse, VideoResponse

        for cls in (ImageResponse, VideoResponse):
            cls.model_config["extra"] = "allow"
            cls.model_rebuild(force=True)
    except Exception as error:
        logger.warning("ddit_rt: SGLang's responses will not tell of patch sizes: %s: %s", type(error).__name__, error)
