"""Notices whatever would make a captured graph wrong: layers that came or went, weights that moved, switches thrown.

A graph reads weights where they were, and does what the Python of the forward decided, when it was captured. Weights
changed in place are therefore fine, and everything else has to be looked for before every replay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_DTYPE = operator.attrgetter("dtype")
_TRAINING = operator.attrgetter("training")


class ModelState:
    """Looks a module over; cheap enough to do before every call (the tree is walked again only when it changed).

    Args:
        module: The transformer, or another module whose weights a graph reads.

    Attributes:
        version: Grows when layers or weights are not those of the last look. Graphs captured before read memory that is
            no longer theirs.
        switches: What the forward reads from Python: LoRA state, attention processors and backends, training or not. A
            graph captured under other switches is right again when they are back.
        obstacle: Why the module cannot be captured as it is now; empty if it can.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.version = 0
        self.switches: Hashable = ()
        self.obstacle = ""
        self._memory: list[object] = []
        self._walk()
        self.refresh()

    def refresh(self) -> None:
        """Brings ``version``, ``switches`` and ``obstacle`` up to date."""
        tree, tensors = _values(self._children), _values(self._holders)
        if tree != self._tree or not _same_objects(tensors, self._tensors):
            self._walk()
        memory = _memory(self._plain, self._quantised)
        if memory != self._memory:
            self._memory = memory
            self.version += 1
        self.switches = (
            tuple(map(adapter_state, self._adapters)),
            tuple(_processor_state(layer.processor) for layer in self._attentions),
            bytes(map(_TRAINING, self._layers)),  # one object: hashed with every key
        )
        self.obstacle = self._obstacle()

    def _walk(self) -> None:
        named = dict(self.module.named_modules())
        modules = self._layers = list(named.values())
        self._names = list(named)
        self._attributes = [module.__dict__ for module in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._children = [module._modules for module in modules]
        self._holders = [held for m in modules for held in (m._parameters, m._buffers)]
        # kept, not only compared: an object that lives cannot lend its identity to another
        self._tree, self._tensors = _values(self._children), _values(self._holders)
        weights = [tensor for tensor in self._tensors if tensor is not None]
        self._plain = [tensor for tensor in weights if not is_traceable_wrapper_subclass(tensor)]
        self._quantised = [tensor for tensor in weights if is_traceable_wrapper_subclass(tensor)]
        self._adapters = [module for module in modules if hasattr(module, "merged_adapters")]
        self._attentions = [module for module in modules if getattr(module, "processor", None) is not None]
        self._memory = []  # equal to none: the version grows

    def _obstacle(self) -> str:
        """Hooks and replaced forwards decide in Python, or move weights, at every call; a replay would not run them."""
        if any("forward" in attributes for attributes in self._attributes[1:]) or "_hf_hook" in self._attributes[0]:
            for name, attributes in zip(self._names, self._attributes):
                reason = _wrapped(attributes, own=not name)
                if reason:
                    return f"{name or type(self.module).__name__} {reason}"
        registry = self._attributes[0].get("_diffusers_hook")
        if registry is not None and registry.hooks:
            return f"{type(self.module).__name__} has hooks of diffusers: {', '.join(registry.hooks)}"
        if any(self._hooks):
            name = self._names[next(i for i, hooks in enumerate(self._hooks) if hooks) // 2]
            return f"{name or type(self.module).__name__} has forward hooks"
        for layer in self._attentions:
            kind = type(layer.processor)
            if not kind.__module__.startswith("diffusers."):
                return f"attention processor {kind.__qualname__} is not one of diffusers' own"
        return ""


def interventions(module: nn.Module) -> list[tuple[object, ...]]:
    """What has layers compute something else than their weights say: hooks, replaced forwards, switched LoRAs.

    Returns:
        An entry per layer that has any. Lists are equal where the same things intervene.
    """
    found: list[tuple[object, ...]] = []
    # its own walk, breadth first: twice a step, of a thousand layers
    left: list[nn.Module | None] = [module]
    for number, layer in enumerate(left):
        if layer is None:
            continue
        attributes = layer.__dict__
        left += attributes["_modules"].values()
        things: list[object] = [*attributes["_forward_pre_hooks"].values(), *attributes["_forward_hooks"].values()]
        registry, forward = attributes.get("_diffusers_hook"), attributes.get("forward")
        if registry is not None:
            things += registry.hooks.values()
        if forward is not None and getattr(forward, "__func__", None) is not type(layer).forward:
            things.append(forward)
        if "merged_adapters" in attributes:
            things.append(adapter_state(layer))
        if things:
            found.append((number, *things))
    return found


def ambient() -> Hashable:
    """Settings of the process that decide which kernels a forward launches, and in which precision."""
    cuda = torch.backends.cuda
    return (
        _AttentionBackendRegistry.get_active_backend()[0],
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        _flags(torch.backends),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _flags_getter(backends: Any) -> operator.attrgetter[Any]:
    matmul = backends.cuda.matmul
    # PyTorch's older getters raise once the newer settings (of 2.9) were used; the newer ones hold what either set
    newer = hasattr(matmul, "fp32_precision")
    reductions = (
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction_split_k",
        "allow_bf16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction_split_k",
        "allow_fp16_accumulation",
    )
    return operator.attrgetter(
        "cuda.matmul.fp32_precision" if newer else "cuda.matmul.allow_tf32",
        "cudnn.conv.fp32_precision" if newer else "cudnn.allow_tf32",
        *(f"cuda.matmul.{name}" for name in reductions if hasattr(matmul, name)),
        "cudnn.enabled",
        "cudnn.benchmark",
        "cudnn.deterministic",
    )


_flags = _flags_getter(torch.backends)


def adapter_state(layer: Any) -> Hashable:
    """What a layer of peft reads in its forward: which adapters are active, how strong, merged or not."""
    scales = getattr(layer, "scaling", {})
    return (
        tuple(layer.active_adapters),
        layer.disable_adapters,
        tuple(layer.merged_adapters),
        # peft multiplies and divides again for scales passed with a call, which can move the last bit
        tuple((k, v.data_ptr() if isinstance(v, torch.Tensor) else round(v, 12)) for k, v in scales.items()),
    )


def _values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _same_objects(first: list[Any], second: list[Any]) -> bool:
    # `==` would compare tensors by their values
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _memory(plain: Iterable[torch.Tensor], quantised: Iterable[torch.Tensor]) -> list[object]:
    """Where weights lie, and how."""
    parts = [*plain, *chain.from_iterable(map(_parts, quantised))]
    return [*map(torch.Tensor.data_ptr, parts), *map(_DTYPE, parts), *map(torch.Tensor.stride, parts)]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a quantised weight consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _processor_state(processor: Any) -> Hashable:
    return type(processor), getattr(processor, "_attention_backend", None), str(getattr(processor, "scale", None))


def _wrapped(attributes: dict[str, Any], own: bool) -> str:
    """How a module's forward is wrapped; ``own``: a plain forward on the instance is ours."""
    if "_hf_hook" in attributes:
        return f"is moved or offloaded by accelerate ({type(attributes['_hf_hook']).__name__})"
    registry = attributes.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"has hooks of diffusers: {', '.join(registry.hooks)}"
    forward = attributes.get("forward")
    if own or forward is None:
        return ""
    # diffusers leaves the class's own forward, bound, on the instance when it takes its hooks away
    owner = getattr(forward, "__self__", None)
    if owner is not None and getattr(forward, "__func__", None) is type(owner).forward:
        return ""
    return f"has its forward replaced by {getattr(forward, '__qualname__', repr(forward))}"


def wrapped_forward(forward: Callable[..., Any], module: nn.Module) -> str:
    """How ``forward``, through which a module is about to be called, is not just its class's own; empty if it is."""
    if getattr(forward, "__func__", None) is type(module).forward or _is_compiled(forward):
        return ""
    return f"{type(module).__name__} has its forward replaced by {getattr(forward, '__qualname__', repr(forward))}"


def _is_compiled(forward: Callable[..., Any]) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable")
