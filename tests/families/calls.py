"""Transformer calls as the pipelines make them, caught in the act."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases import ALL
from tiny import latents_of


@cache
def caught(name: str) -> tuple[Any, torch.nn.Module, dict[str, Any]]:
    """(pipeline, transformer, arguments of its second call) of the case ``name``; shared, not to be changed."""
    pipe, inputs = ALL[name]()
    module, seen = pipe.transformer, []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    latents_of(pipe, inputs)
    hook.remove()
    return pipe, module, seen[1]
