"""What makes a model's layers compute something else than their weights say is noticed, and its end too."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from tiny import flux_transformer

from ddit_rt.runtime import interventions


def hooked(model: Any) -> Callable[[], Any]:
    return model.transformer_blocks[0].register_forward_hook(lambda *_: None).remove


def hooked_before(model: Any) -> Callable[[], Any]:
    return model.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_: None).remove


def hooked_by_diffusers(model: Any) -> Callable[[], Any]:
    registry = HookRegistry.check_if_exists_or_initialize(model.single_transformer_blocks[0])
    registry.register_hook(ModelHook(), "skip")
    return lambda: registry.remove_hook("skip", recurse=False)


def replaced(model: Any) -> Callable[[], Any]:
    layer = model.x_embedder
    layer.forward = MethodType(lambda self, given: given, layer)
    return lambda: delattr(layer, "forward")


@pytest.mark.parametrize("intervene", [hooked, hooked_before, hooked_by_diffusers, replaced])
def test_what_comes_and_goes_is_told(intervene: Callable[[Any], Callable[[], Any]]) -> None:
    model = flux_transformer()
    before = interventions(model)
    undo = intervene(model)
    during = interventions(model)
    assert during != before and interventions(model) == during
    undo()
    assert interventions(model) == before
    intervene(model)
    assert interventions(model) not in (before, during)  # another one in the same place


def test_switched_loras_are_told() -> None:
    model = flux_transformer()
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    model.set_adapter("first")
    first = interventions(model)
    model.set_adapter("second")
    assert interventions(model) != first
    model.set_adapter("first")
    assert interventions(model) == first
    model.disable_adapters()
    assert interventions(model) != first
