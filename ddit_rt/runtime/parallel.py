"""One decision for all ranks that share a sequence (diffusers' context parallelism)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from torch import distributed, nn


def sequence_ranks(module: nn.Module) -> Any:
    """The process group whose ranks each hold a part of the module's tokens; None if nothing is split."""
    config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
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


def own_part(module: nn.Module, output: Any) -> Any:
    """The part of a module's output that this rank works with, if context parallelism splits it; else all of it.

    diffusers splits in a hook around the module's forward, which is passed by where something else computes in place of
    the module.

    Args:
        module: Inside a transformer.
        output: What the module would return, for all tokens: a tensor, or several.
    """
    registry = getattr(module, "_diffusers_hook", None)
    for hook in registry.hooks.values() if registry is not None else ():
        if isinstance(hook, ContextParallelSplitHook):
            output = hook.post_forward(module, output)
    return output


def undividable(tokens: int, group: Any) -> str:
    """Why a sequence cannot be split evenly among the group's ranks; empty if it can."""
    ranks = distributed.get_world_size(group)
    return "" if tokens % ranks == 0 else f"{tokens} tokens do not divide among {ranks} ranks"


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
