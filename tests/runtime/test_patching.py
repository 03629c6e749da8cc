"""MethodPatch among other patches: accelerate's and diffusers' hooks come and go above and below it."""

import inspect

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn

from ddit_rt.runtime import MethodPatch


class Double(nn.Module):
    def forward(self, x, y=0):
        return 2 * x + y


def add_one(inner, *args, **kwargs):
    return inner(*args, **kwargs) + 1


@pytest.fixture
def module():
    return Double()


@pytest.fixture
def patch(module):
    patch = MethodPatch(module, "forward", add_one)
    patch.ensure_outermost()
    return patch


def test_a_patch_serves_the_instance_and_not_the_class(module, patch):
    assert module(3) == 7 and Double()(3) == 6
    assert inspect.signature(module.forward) == inspect.signature(Double().forward)


def test_removal_leaves_nothing(module, patch):
    patch.remove()
    patch.remove()
    assert "forward" not in module.__dict__ and module(3) == 6


def test_it_is_installed_once(module, patch):
    patch.ensure_outermost()
    assert module(3) == 7


def test_an_instance_attribute_that_was_there_comes_back(module):
    module.forward = before = lambda x: -x
    patch = MethodPatch(module, "forward", add_one)
    patch.ensure_outermost()
    assert module(3) == -2
    patch.remove()
    assert module.forward is before


def test_two_patches_come_off_in_any_order(module, patch):
    second = MethodPatch(module, "forward", lambda inner, x: 10 * inner(x))
    second.ensure_outermost()
    assert module(3) == 70
    patch.remove()
    assert module(3) == 60
    second.remove()
    assert module(3) == 6


def test_a_patch_that_was_covered_moves_to_the_top_and_runs_once(module, patch):
    below = module.forward
    module.forward = lambda x: 10 * below(x)
    assert module(3) == 70
    patch.ensure_outermost()
    assert module(3) == 61
    patch.remove()
    assert module(3) == 60


def test_accelerates_hooks_may_wipe_it(module, patch):
    add_hook_to_module(module, ModelHook())
    assert module(3) == 7
    remove_hook_from_module(module)
    add_hook_to_module(module, ModelHook())
    patch.ensure_outermost()
    assert module(3) == 7
    remove_hook_from_module(module)  # takes forward back to what it was before the hook, and the patch with it
    patch.ensure_outermost()
    assert module(3) == 7
    patch.remove()
    assert module(3) == 6


def test_it_is_removed_from_below_an_accelerate_hook(module, patch):
    add_hook_to_module(module, ModelHook())
    patch.remove()
    assert module(3) == 6
    remove_hook_from_module(module)
    assert module(3) == 6


def test_a_hook_of_diffusers_may_come_and_go_above_it(module, patch):
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(DiffusersHook(), "any")
    patch.ensure_outermost()
    assert module(3) == 7
    registry.remove_hook("any")
    patch.ensure_outermost()
    assert module(3) == 7
    patch.remove()
    assert module(3) == 6


def test_exceptions_pass_through(module, patch):
    with pytest.raises(TypeError):
        module("a", torch.zeros(1), 3)
    assert module(3) == 7
