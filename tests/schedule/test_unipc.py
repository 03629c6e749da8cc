"""UniPC's step on host coefficients against diffusers' own."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny import latents_of, smooth, wan, wan_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddit_rt
from ddit_rt.schedule import unipc
from ddit_rt.schedule.unipc import is_known, unipc_step, without_waiting

aten = torch.ops.aten
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def scheduler(**settings):
    return UniPCMultistepScheduler(**{**FLOW, **settings})


def trajectory(made, step, count, dtype=torch.float32):
    """All latents of a run whose velocity depends on the latent, in float32."""
    generator = torch.Generator().manual_seed(0)
    latent, bias = torch.randn(2, 1, 4, 2, 8, 8, generator=generator).unbind()
    made.set_timesteps(count)
    latents = []
    for timestep in made.timesteps:
        velocity = (torch.tanh(2 * latent + bias) + bias * timestep / 1000).to(dtype)
        latent = step(velocity, timestep, latent, return_dict=False)[0]
        latents.append(latent)
    return torch.stack(latents)


@pytest.mark.parametrize("settings", [{}, {"lower_order_final": False}, {"disable_corrector": [0, 3]}], ids=str)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_its_steps_are_those_of_diffusers(order, solver_type, final, settings):
    made = scheduler(solver_order=order, solver_type=solver_type, final_sigmas_type=final, **settings)
    assert is_known(made)
    if order == 3 and final == "zero" and settings == {"lower_order_final": False}:
        with pytest.raises(torch.linalg.LinAlgError):  # as in diffusers, whose last step lies at infinity
            trajectory(made, lambda *a, **k: unipc_step(made, *a, **k), 5)
        return
    for count in (2, 5, 20):
        theirs, ours = copy.deepcopy(made), copy.deepcopy(made)
        wanted = trajectory(theirs, theirs.step, count)
        found = trajectory(ours, lambda *a, ours=ours, **k: unipc_step(ours, *a, **k), count)
        if order < 3:
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        state = ("step_index", "lower_order_nums", "this_order", "timestep_list")
        assert all(getattr(ours, name) == getattr(theirs, name) for name in state)


def test_a_step_of_order_three_differs_by_the_rounding_of_one_sum():
    theirs, worst = scheduler(solver_order=3), 0.0

    def both(velocity, timestep, latent, **kwargs):
        nonlocal worst
        ours = copy.deepcopy(theirs)
        found = unipc_step(ours, velocity, timestep, latent).prev_sample
        wanted = theirs.step(velocity, timestep, latent).prev_sample
        ulp = torch.finfo(torch.float32).eps * torch.maximum(wanted.abs(), latent.abs()).amax()
        worst = max(worst, float((found - wanted).abs().amax() / ulp))
        return (wanted,)

    trajectory(theirs, both, 20)
    assert worst <= 1


def test_predictions_of_the_models_dtype_count_the_same():
    theirs, ours = scheduler(), scheduler()
    wanted = trajectory(theirs, theirs.step, 10, torch.bfloat16)
    found = trajectory(ours, lambda *a, **k: unipc_step(ours, *a, **k), 10, torch.bfloat16)
    assert torch.equal(found, wanted)


def test_either_step_may_follow_the_other():
    theirs, mixed = scheduler(), scheduler()
    wanted = trajectory(theirs, theirs.step, 12)

    def step(*args, **kwargs):
        own = mixed.step_index is None or mixed.step_index % 2
        return mixed.step(*args, **kwargs) if own else unipc_step(mixed, *args, **kwargs)

    assert torch.equal(trajectory(mixed, step, 12), wanted)


class Copies(TorchDispatchMode):
    """Counts what crosses between host and device, and linear systems that are solved on the device."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        crosses = len({tensor.device for tensor in tensors}) > 1 and func.overloadpacket in (aten._to_copy, aten.copy_)
        self.found += crosses or (func is aten._local_scalar_dense.default and tensors[0].is_meta)
        return result


@pytest.mark.parametrize("own", [False, True])
def test_nothing_is_sent_to_the_device(own):
    """Numbers of the host enter as 0-dim tensors, which kernels take as arguments; nothing is copied or read back."""
    made = scheduler()
    made.set_timesteps(4)
    made.set_begin_index(0)
    latent = torch.empty(1, 4, 2, 8, 8, device="meta")
    with Copies() as copies:
        for timestep in made.timesteps[:2]:
            step = made.step if own else partial(unipc_step, made)
            latent = step(latent, timestep, latent).prev_sample
    assert latent.is_meta and made.step_index == 2
    assert copies.found == (2 + 5 if own else 0)  # the first step only predicts, to order 1


class Unknown(UniPCMultistepScheduler):
    pass


@pytest.mark.parametrize(
    "made",
    [
        scheduler(thresholding=True),
        scheduler(predict_x0=False),
        UniPCMultistepScheduler(),
        scheduler(prediction_type="epsilon"),
        Unknown(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda made: type(made).__name__,
)
def test_what_is_not_known_is_left_to_diffusers(made):
    assert not is_known(made)


def test_a_setting_of_a_later_diffusers_is_not_known():
    made = scheduler()
    assert is_known(made)
    made.register_to_config(churn=0.5)
    assert not is_known(made)


def test_it_takes_the_place_of_diffusers_own_step_on_cuda_alone(monkeypatch):
    made = scheduler()
    sample = torch.zeros(1)
    assert without_waiting(made.step, made, sample) == made.step
    monkeypatch.setattr(unipc, "WAITS_ON", {"cpu"})
    assert without_waiting(made.step, made, sample).func is unipc_step
    assert without_waiting(made.step, made, sample.double()) == made.step

    def patched(*args):
        """Somebody else's."""

    assert without_waiting(patched, made, sample) is patched


@pytest.mark.parametrize("settings", [{"schedule": [1, 1, 2, 4, 0, 2, 0, 1]}, {"threshold": 0}], ids=str)
def test_a_pipeline_that_approximates_takes_it_and_the_picture_stays(monkeypatch, settings):
    pipe, inputs = smooth(wan()), wan_inputs()
    with ddit_rt.accelerated(pipe, **settings):
        wanted = latents_of(pipe, inputs)
    taken, own = [], unipc.unipc_step
    monkeypatch.setattr(unipc, "WAITS_ON", {"cpu"})
    monkeypatch.setattr(unipc, "unipc_step", lambda *a, **k: taken.append(1) or own(*a, **k))
    with ddit_rt.accelerated(pipe, **settings):
        assert torch.equal(latents_of(pipe, inputs), wanted)
    assert len(taken) == (8 if "schedule" in settings else 0)  # what approximates nothing is the plain pipeline's
