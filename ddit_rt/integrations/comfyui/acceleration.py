"""The settings of an accelerated model of ComfyUI, and the wrappers that put them to work.

After the manner of ComfyUI's own caches: what a node sets up hangs on a clone of the model, a run makes its state in
OUTER_SAMPLE and drops it there, and the model is wrapped in PREDICT_NOISE (a sampler's step, guidance and all) and in
DIFFUSION_MODEL (one call of it). No state is kept anywhere else.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch

from ...config import DDiTConfig
from ...errors import ConfigError, ScheduleError, UnsupportedPipelineError
from ...multiples import TEMPORAL_MULTIPLES
from ...schedule import FittedSchedule, Report
from .run import SamplingRun, place, policy_of
from .samplers import SamplerFacts

KEY = "ddit"
_RUN = "ddit_run"
_OTHER_CACHES = ("easycache", "lazycache")
_PATHS = ("auto", "delta", "band-split", "extrapolate", "reuse")
_log = logging.getLogger(__name__)


class Acceleration:
    """What hangs on an accelerated model: settings that never change, and the report of the last run.

    Args:
        config: Settings.

    Attributes:
        report: Of the last sampling run that ended, however it ended; None before the first.
    """

    def __init__(self, config: DDiTConfig) -> None:
        self.config = config
        self.report: Report | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        # cloning a model copies its options; the clones' runs report to the same place
        return self


def settings(
    speedup: float = 2.0,
    schedule: str = "",
    threshold: float = 0.0,
    multiples: str = "1,2,4",
    coarse: str = "auto",
    positions: str = "native",
) -> DDiTConfig:
    """The settings that a node's inputs stand for.

    Args:
        speedup: Ratio of FLOP to aim at by skipping steps; up to 1 is none.
        schedule: File of ``ddit-rt fit``, or a hub id; goes before the speed-up. Empty for none.
        threshold: τ of the paper's rule, where there is neither; 0 leaves every step full.
        multiples: Sizes that steps may run at, as in "1,2,4".
        coarse: Coarse path, by name.
        positions: "native" or "interpolated".

    Raises:
        ConfigError: a value is out of range.
        ScheduleError: the schedule holds a size that is not among ``multiples``, or spans two latent frames.
    """
    if coarse not in _PATHS:
        raise ConfigError(f"coarse={coarse!r}: use one of {', '.join(map(repr, _PATHS))}.")
    try:
        sizes = tuple(int(part) for part in multiples.split(","))
    except ValueError:
        raise ConfigError(f"multiples={multiples!r}: write whole numbers, as in '1,2,4'.") from None
    shared: dict[str, Any] = {"multiples": sizes, "coarse": coarse, "positions": positions}
    if not schedule.strip():
        if speedup > 1:
            return DDiTConfig(speedup=speedup, **shared)
        return DDiTConfig(threshold=threshold, **shared)
    fitted = FittedSchedule.load(schedule.strip())
    for index, multiple in enumerate(fitted.schedule):
        if multiple in TEMPORAL_MULTIPLES:
            raise ScheduleError(
                f"schedule[{index}]={multiple}: patches that span two latent frames do not run in ComfyUI; fit without "
                "them, as in `ddit-rt fit --kinds 1,2,4,0`."
            )
        if multiple not in (0, *sizes):
            raise ScheduleError(f"schedule[{index}]={multiple} is not among multiples={multiples}: add it there.")
    return DDiTConfig(schedule=fitted, **shared)


def attach(model: Any, config: DDiTConfig, points: Any) -> Any:
    """An accelerated clone of a model.

    Args:
        model: A ``ModelPatcher`` of ComfyUI.
        config: Settings. A model that has some gets these instead.
        points: ``comfy.patcher_extension.WrappersMP``.

    Returns:
        The clone; the model itself is left as it is.

    Raises:
        UnsupportedPipelineError: it predicts no flow.
        ConfigError: it does not tell where its tokens lie, and the settings move them.
    """
    check_flow(model.get_model_object("model_sampling"))
    if config.positions == "interpolated" and not _moves_tokens(model.model.diffusion_model):
        raise ConfigError(
            f"positions='interpolated': {type(model.model.diffusion_model).__name__} of this ComfyUI reads no "
            "rope_options; use 'native'."
        )
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    wrapped = KEY in options
    options[KEY] = Acceleration(config)
    if not wrapped:
        clone.add_wrapper_with_key(points.OUTER_SAMPLE, KEY, outer_sample)
        clone.add_wrapper_with_key(points.PREDICT_NOISE, KEY, predict_noise)
        clone.add_wrapper_with_key(points.DIFFUSION_MODEL, KEY, diffusion_model)
    return clone


def attached(model: Any) -> Acceleration:
    """What hangs on a model.

    Raises:
        ConfigError: it is not accelerated.
    """
    found = model.model_options.get("transformer_options", {}).get(KEY)
    if not isinstance(found, Acceleration):
        raise ConfigError("this model has no report: connect the output of a 'DDiT accelerate' node.")
    return found


def check_flow(sampling: Any) -> None:
    """Refuses models that predict no flow.

    Args:
        sampling: The model's ``model_sampling``.

    Raises:
        UnsupportedPipelineError: naming what it is.
    """
    mro = type(sampling).__mro__
    kinds = [kind.__name__ for kind in mro]
    # some models for pictures from pictures derive from it and predict the clean latent
    reads = next((kind.__name__ for kind in mro if "calculate_denoised" in vars(kind)), "")
    if reads != "CONST":
        own = [kind for kind in kinds if kind not in ("ModelSampling", "Module", "object")]
        raise UnsupportedPipelineError(
            f"this model is no flow model (its sampling is {', '.join(own[:3]) or kinds[0]}): DDiT accelerate takes "
            "models like Flux, Flux.2, Qwen-Image, Wan, Z-Image, Chroma and HunyuanVideo."
        )


# -- the wrappers -----------------------------------------------------------------------------------------------------


def outer_sample(
    executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    """Around a whole sampling run: makes its state, and drops it however the run ends."""
    guider = executor.class_obj
    options = guider.model_options
    acceleration: Acceleration = options["transformer_options"][KEY]
    config, patcher = acceleration.config, guider.model_patcher
    sampling = patcher.get_model_object("model_sampling")
    check_flow(sampling)  # a node behind ours may have given the model another
    rival = next((name for name in _OTHER_CACHES if name in options["transformer_options"]), None)
    if rival is not None:
        raise ConfigError(f"{rival} and DDiT accelerate both skip steps: remove one of the two nodes.")
    facts, policy = SamplerFacts.of(sampler), policy_of(config)
    given = [float(level) for level in sigmas.tolist()]
    levels = place(config, policy, facts, given, float(sampling.sigma_max))
    run = SamplingRun(config, facts, levels, patcher.model.diffusion_model, policy, _obstacle(options))
    if levels != given:
        sigmas = torch.tensor(levels, dtype=sigmas.dtype, device=sigmas.device)
    guider.model_options = {**options, "transformer_options": {**options["transformer_options"], _RUN: run}}
    complete = False
    try:
        result = executor(noise, latent, sampler, sigmas, *rest, **named)
        complete = True
        return result
    finally:
        guider.model_options = options
        acceleration.report = run.report(complete)
        _log.info("DDiT: %s", str(acceleration.report).splitlines()[-1])


def predict_noise(executor: Any, latent: Any, timestep: Any, model_options: dict[str, Any], *rest: Any) -> Any:
    """Around a sampler's step."""
    run = _run_of(model_options.get("transformer_options", {}))
    if run is None:
        return executor(latent, timestep, model_options, *rest)
    return run.predict_noise(executor, latent, timestep, model_options, *rest)


def diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a call of the diffusion model."""
    found = [value for value in (*args, kwargs.get("transformer_options")) if isinstance(value, dict) and _RUN in value]
    run = _run_of(found[0]) if found else None
    return executor(*args, **kwargs) if run is None else run.diffusion_model(executor, *args, **kwargs)


def _run_of(options: dict[str, Any]) -> SamplingRun | None:
    run: SamplingRun | None = options.get(_RUN)
    return run


def _obstacle(options: dict[str, Any]) -> str:
    """Why a run with these options has to stay plain."""
    if options.get("context_handler") is not None:
        return "context windows move between steps"
    return "several GPUs share the conditionings" if options.get("multigpu_clones") else ""


def _moves_tokens(module: Any) -> bool:
    """Whether the code of a diffusion model reads ``rope_options``, in its file or that of a class it derives from."""
    files = {
        kind.__module__ for kind in type(module).__mro__ if kind.__module__.split(".")[0] not in ("torch", "builtins")
    }
    for name in files:
        try:
            if "rope_options" in inspect.getsource(sys.modules[name]):
                return True
        except (OSError, TypeError, KeyError):
            continue
    return False
