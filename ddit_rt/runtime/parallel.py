"""One decision for all ranks that share a sequence (diffusers' context parallelism)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import distributed, nn

from .attention import attention_processors

T = TypeVar("T")

_WITHOUT_SUMS = ("native", "_native_npu")
"""Attention back-ends that diffusers splits, but whose kernels do not give the log-sum-exp that a ring adds up."""

_LOCAL_CACHES = ("teacache", "FirstBlockCacheConfig", "SeaCacheConfig")
"""Caches that decide by the tokens they see."""


def is_parallel(module: Any) -> bool:
    """Whether diffusers has set a transformer, or an attention's processor, up to run on several devices at once."""
    return getattr(module, "_parallel_config", None) is not None


def sequence_ranks(module: nn.Module) -> Any:
    """The process group whose ranks each hold a part of the module's tokens; None if nothing is split."""
    config = _context_parallel(module)
    if config is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return config._flattened_mesh.get_group()


def agreed(multiple: int, group: Any, device: torch.device) -> int:
    """The multiple that the group's first rank chose.

    Rounding may differ between ranks, and with it a decision at the threshold; ranks at different multiples would wait
    for each other forever.
    """
    chosen = torch.tensor(multiple, device=device)
    distributed.broadcast(chosen, src=distributed.get_global_rank(group, 0), group=group)
    return int(chosen)


def of_first_rank(value: T, module: nn.Module) -> T:
    """What the first of the ranks that share a module's sequence has; ``value`` itself if nothing is split.

    Args:
        value: Anything that can be pickled.
        module: The transformer. All its ranks have to call.
    """
    group = sequence_ranks(module)
    if group is None:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=distributed.get_global_rank(group, 0), group=group)
    return box[0]


def divided(module: nn.Module, inputs: Any) -> Any:
    """A call's inputs with coarse grids that divide among the ranks that share the module's sequence, if any do.

    Args:
        module: The transformer.
        inputs: Of its call; a dataclass that has a ``geometry``.
    """
    group = sequence_ranks(module)
    if group is None:
        return inputs
    ranks = distributed.get_world_size(group)
    return replace(inputs, geometry=replace(inputs.geometry, ranks=ranks))


def cannot_divide(module: nn.Module, cache: str) -> str:
    """Why a transformer cannot run as its context parallelism is set up; empty if it can, or if there is none.

    Without this, the call would end in the middle of a step, or ranks would wait for each other forever.

    Args:
        module: The transformer.
        cache: Kind of the step cache that is put on it: "teacache", or the class of diffusers' configuration.
    """
    config = _context_parallel(module)
    if config is None:
        return ""
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    ulysses = config.ulysses_degree
    if heads and heads % ulysses and not getattr(config, "ulysses_anything", False):
        return f"its {heads} attention heads do not divide among ulysses_degree={ulysses} ranks"
    lacking = [name for name in _attention_backends(module) if name in _WITHOUT_SUMS]
    if config.ring_degree > 1 and lacking:
        return (
            f"ring_degree={config.ring_degree} needs the log-sum-exp of attention, which the back-end {lacking[0]!r} "
            "does not give: set_attention_backend('_native_cudnn') or another before enable_parallelism()"
        )
    if cache in _LOCAL_CACHES:
        return (
            f"cache={cache!r} decides by the tokens it sees, which are others on every rank: leave cache=None, or take "
            "one that goes by the step, as TaylorSeerCacheConfig"
        )
    return ""


def uneven_parts(module: nn.Module, inputs: Any) -> str:
    """Why the tokens of a call do not divide among the ranks that share the module's sequence; empty if they do.

    Coarse grids are padded until they do; full steps are the model's own.

    Args:
        module: The transformer.
        inputs: Of its call: ``arguments``, ``geometry`` and ``references``.
    """
    config, group = _context_parallel(module), sequence_ranks(module)
    if group is None or any(getattr(config, f"{kind}_anything", False) for kind in ("ulysses", "ring")):
        return ""
    beside = 0 if inputs.references is None else inputs.references.shape[1]
    obstacle = undividable(inputs.geometry.tokens(1) + beside, group)
    text = inputs.arguments.get("encoder_hidden_states")
    if not obstacle and isinstance(text, torch.Tensor) and "encoder_hidden_states" in _split_names(module):
        obstacle = undividable(text.shape[1], group, "text tokens")
    return obstacle


def own_part(module: nn.Module, output: Any) -> Any:
    """The part of a module's output that this rank works with, if context parallelism splits it; else all of it.

    diffusers splits in a hook around the module's forward, which is passed by where something else computes in place of
    the module.

    Args:
        module: Inside a transformer.
        output: What the module would return, for all tokens: a tensor, or several.
    """
    for hook in _split_hooks(module):
        output = hook.post_forward(module, output)
    return output


def undividable(tokens: int, group: Any, what: str = "tokens") -> str:
    """Why a sequence cannot be split evenly among the group's ranks; empty if it can."""
    ranks = distributed.get_world_size(group)
    return "" if tokens % ranks == 0 else f"{tokens} {what} do not divide among {ranks} ranks"


def agree_on_multiple(module: nn.Module, inputs: Any, multiple: int, own_projections: bool) -> tuple[int, str]:
    """The multiple for all ranks that share a module's sequence, and why it is not what they would choose, if so.

    Args:
        module: The transformer.
        inputs: Of its call; has a ``latent``, a ``geometry`` and ``references``.
        multiple: What this rank chose.
        own_projections: Coarse steps have projections of their own, which context parallelism does not split.
    """
    group = sequence_ranks(module)
    if group is None:
        return multiple, ""
    multiple = agreed(multiple, group, inputs.latent.device)
    if multiple <= 1:
        return multiple, ""
    beside = 0 if inputs.references is None else inputs.references.shape[1]
    obstacle = undividable(inputs.geometry.tokens(multiple) + beside, group)
    if own_projections:
        obstacle = "coarse steps have projections of their own, which context parallelism does not split"
    return (1, obstacle) if obstacle else (multiple, "")


def _context_parallel(module: nn.Module) -> Any:
    """diffusers' configuration of a module's context parallelism; None without."""
    return getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)


def _attention_backends(module: nn.Module) -> Iterator[str]:
    """Names of the back-ends that the split attention layers of a module run."""
    for processor in attention_processors(module):
        if is_parallel(processor):
            chosen = processor._attention_backend
            active = _AttentionBackendRegistry.get_active_backend()[0] if chosen is None else chosen
            yield str(getattr(active, "value", active))


def _split_hooks(module: nn.Module) -> Iterator[ContextParallelSplitHook]:
    registry = getattr(module, "_diffusers_hook", None)
    for hook in registry.hooks.values() if registry is not None else ():
        if isinstance(hook, ContextParallelSplitHook):
            yield hook


def _split_names(module: nn.Module) -> set[Any]:
    """Names of the arguments that are split on their way into a module or one of its children."""
    return {name for child in module.modules() for hook in _split_hooks(child) for name in hook.metadata}
