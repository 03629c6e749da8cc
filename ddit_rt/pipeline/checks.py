"""What has to hold of a pipeline's components and of a call before they are touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config import DDiTConfig, TeaCacheConfig
from ..errors import ConfigError, UnsupportedPipelineError
from ..families import Family, ModelInputs
from ..granularity import CoarsePath
from ..runtime import Attention, attention_by_name, cannot_divide, capability_of, choose_attention, uneven_parts
from .modulation import weights_elsewhere
from .plain_state import accelerated_by


def check_unshared(owner: Any) -> None:
    """Refuses a component that another accelerated pipeline has patched.

    Raises:
        UnsupportedPipelineError: with the way out.
    """
    if accelerated_by(owner) is not None:
        raise UnsupportedPipelineError(
            f"{type(owner).__name__} is shared with another accelerated pipeline: ddit_rt.restore(pipe) takes its "
            "patches off, or give each pipeline its own, as in type(s).from_config(s.config) for a scheduler."
        )


def check_settings(config: DDiTConfig, family: Family, path: CoarsePath, modules: Mapping[str, nn.Module]) -> None:
    """Refuses settings that this model, or the others among them, leave nothing to do for or cannot serve.

    Args:
        config: The settings.
        family, modules: Of the pipeline's transformers, by component.
        path: What coarse steps compute.

    Raises:
        ConfigError, UnsupportedPipelineError: with the way out.
    """
    _check_merge(config, path)
    _check_ends(family, path, modules)
    _check_levers(config, family, modules)


def _check_merge(config: DDiTConfig, path: CoarsePath) -> None:
    """Refuses to merge an adapter that is not there."""
    if config.merge_adapter and path.adapter is None:
        raise ConfigError("merge_adapter=True: there is no adapter to merge; pass adapter=..., or leave it out.")


def _check_ends(family: Family, path: CoarsePath, modules: Mapping[str, nn.Module]) -> None:
    """Refuses transformers whose ends a coarse step would have to read, and cannot."""
    if path.needs_projections and path.adapter is None:  # an adapter is held against them anyway
        for module in modules.values():
            family.projections(unwrap_module(module))


def _check_levers(config: DDiTConfig, family: Family, modules: Mapping[str, nn.Module]) -> None:
    """Refuses levers that the model does not have, or that the others leave nothing to do for."""
    if config.modulation == "ahead":
        if not family.modulation_inputs:
            raise ConfigError(
                f"modulation='ahead': models of family {family.name} have none to make ahead; leave it out."
            )
        for name, module in modules.items():
            reason = weights_elsewhere(module)
            if reason:
                raise ConfigError(
                    f"modulation='ahead' reads weights before the transformer runs, and in {name} {reason}. Leave it "
                    "out, or keep the transformer on the device."
                )
    if config.trim_text:
        if not family.trims_text:
            raise ConfigError(f"trim_text=True: models of family {family.name} keep all their text; leave it out.")
        if len(config.multiples) == 1:
            raise ConfigError("trim_text=True is for coarse steps, and multiples=(1,) has none: leave one of them out.")
    if config.batch_guidance != "never":
        setting = f"batch_guidance={config.batch_guidance!r}"
        if config.cache is not None:
            raise ConfigError(
                f"{setting}: a cache decides for each call of a step by itself, so they cannot be one call. Leave "
                "cache=None, or leave it out."
            )
        if family.companion_scheduler:
            raise ConfigError(
                f"{setting}: models of family {family.name} predict a second output, which is not told apart by "
                "sample; leave it out."
            )
        if config.batch_guidance == "coarse" and len(config.multiples) == 1:
            raise ConfigError(f"{setting} is for coarse steps, and multiples=(1,) has none: leave one of them out.")


def chosen_attention(
    setting: str | None, pipe: Any, family: Family, modules: Mapping[str, nn.Module]
) -> Attention | None:
    """The attention back-end that ``DDiTConfig.attention`` stands for; None leaves it as it is.

    Raises:
        ConfigError: it cannot be had, with the reason.
    """
    if setting is None:
        return None
    transformers = [unwrap_module(module) for module in modules.values()]
    if setting != "auto":
        return attention_by_name(setting, transformers)
    # a model that is offloaded is not yet where it will run
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    first: Any = transformers[0]
    return attention_for(first, family, capability_of(device), first.dtype)


def attention_for(
    transformer: nn.Module, family: Family, capability: tuple[int, int] | None, dtype: torch.dtype
) -> Attention:
    """What ``attention="auto"`` takes for a transformer on a card; arguments as for :func:`choose_attention`."""
    width = getattr(transformer.config, "attention_head_dim", None)
    return choose_attention(capability, dtype, width, family.attends_unmasked)


def check_not_compiled(modules: Mapping[str, nn.Module]) -> None:
    """Refuses transformers that are compiled as a whole in place.

    Raises:
        UnsupportedPipelineError: with the way out.
    """
    for name, module in modules.items():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedPipelineError(
                f"{name}.compile() hides its forward. Use {name}.compile_repeated_blocks() or "
                f"pipe.{name} = torch.compile(pipe.{name}), before accelerate()."
            )


def check_parallel(modules: Mapping[str, nn.Module], cache: Any) -> None:
    """Refuses context parallelism that cannot work.

    Args:
        modules: Component name -> transformer.
        cache: Of the settings.

    Raises:
        UnsupportedPipelineError: with the way out.
    """
    kind = "teacache" if isinstance(cache, TeaCacheConfig) else type(cache).__name__
    for name, module in modules.items():
        obstacle = cannot_divide(unwrap_module(module), kind)
        if obstacle:
            raise UnsupportedPipelineError(f"{name} is context parallel, and {obstacle}.")


def check_even(module: nn.Module, call: ModelInputs | None) -> None:
    """Refuses a call whose full steps cannot be divided, before the transformer runs.

    Raises:
        ConfigError: with the way out.
    """
    obstacle = "" if call is None else uneven_parts(module, call)
    if obstacle:
        raise ConfigError(
            f"{obstacle} (context parallelism): choose another height, width or number of frames, or pad the prompt to "
            "another length; or ContextParallelConfig(ulysses_anything=True), which divides unevenly."
        )


def check_finite(call: ModelInputs | None) -> None:
    """What can only be known once the call's latent is there, and must be known before its first step.

    Raises:
        ConfigError: the latent holds NaN or Inf.
    """
    if call is not None and not bool(torch.isfinite(call.latent).all()):
        raise ConfigError("the latents hold NaN or Inf before the first step: check latents= or the input image.")
