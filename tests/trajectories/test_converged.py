"""Other solvers on a pipeline's own noise levels, and the converged picture that they lead to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from specimens import SPECIMENS
from tiny import flux, flux_inputs, latents_of, picture, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError
from ddit_rt.trajectories import UNIPC, Solver, generate, generate_converged, psnr, respaced, solved_by
from ddit_rt.trajectories.solving import refined

EULER = Solver(FlowMatchEulerDiscreteScheduler)
HEUN = Solver(FlowMatchHeunDiscreteScheduler, order=2)
LEVELS = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64)


def call(steps: int) -> dict[str, Any]:
    inputs = flux_inputs(height=32, width=32, steps=steps)
    return {name: value for name, value in inputs.items() if name not in ("generator", "output_type")}


def solved(pipe: Any, inputs: dict[str, Any], solver: Solver, factor: int = 1) -> torch.Tensor:
    with solved_by(pipe, solver, partial(refined, factor=factor)):
        return latents_of(pipe, inputs)


def test_levels_are_cut_evenly() -> None:
    assert refined(LEVELS, 2).tolist() == pytest.approx([1.0, 0.9, 0.8, 0.65, 0.5, 0.25, 0.0])
    assert torch.equal(refined(LEVELS, 1), LEVELS)


def test_a_spacing_of_one_changes_nothing_and_a_larger_one_moves_levels_towards_noise() -> None:
    assert respaced(LEVELS, 1) is LEVELS
    moved = respaced(LEVELS, 1.4)
    assert (moved[0], moved[-1]) == (1.0, 0.0) and bool((moved[1:-1] > LEVELS[1:-1]).all())
    assert moved[1] == pytest.approx(1 - 0.2 * 3 * (1 / 3) ** 1.4)
    for power in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"spacing=.*above 0"):
            respaced(LEVELS, power)


@pytest.mark.parametrize("pipe, inputs", [(flux(), flux_inputs(steps=5)), (wan(euler=True), wan_inputs(steps=5))])
def test_the_pipelines_own_solver_gives_its_own_picture(pipe: Any, inputs: dict[str, Any]) -> None:
    assert torch.equal(solved(pipe, inputs, EULER), latents_of(pipe, inputs))


@pytest.mark.parametrize("make", [flux, wan, partial(wan, euler=True), partial(wan, two=True)])
def test_solvers_agree_once_they_have_steps_enough(make: Any) -> None:
    pipe = make()
    inputs = (flux_inputs if pipe.__class__.__name__ == "FluxPipeline" else wan_inputs)(steps=8)
    plain, fine = latents_of(pipe, inputs), solved(pipe, inputs, UNIPC, 8)

    def off(latents: torch.Tensor) -> float:
        return float((latents - fine).square().mean().sqrt())

    assert off(solved(pipe, inputs, HEUN, 8)) < 0.1 * off(plain)
    assert off(solved(pipe, inputs, EULER, 16)) < 0.4 * off(plain)


FROM_PICTURES = ["chroma-image", "qwen-image-to-image", "sd3-inpaint", "wan-video", "z-image-from-image"]


@pytest.mark.parametrize("kind", ["flux-image", *FROM_PICTURES])
@pytest.mark.parametrize("strength", [0.6, 0.55, 0.95])
def test_a_run_from_a_picture_begins_where_the_plain_one_does(kind: str, strength: float) -> None:
    """Also where the strength is no whole number of steps: of finer ones it may be, and of Wan's it is another."""
    if kind == "flux-image":
        pipe, inputs = flux("image"), flux_inputs(height=32, width=32, steps=10, image=picture(32, 32))
    else:
        specimen = SPECIMENS[kind]
        height, width = specimen.size
        pipe, inputs = specimen.make(), specimen.call(height=height, width=width, steps=10)
    inputs = {**inputs, "strength": strength}
    if kind != "wan-video":  # whose own solver is another
        assert torch.equal(solved(pipe, inputs, EULER), latents_of(pipe, inputs))
    levels: list[float] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        told = kwargs["timestep"] if "timestep" in kwargs else args[1]
        levels.append(float(told.flatten()[0]))

    pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
    latents_of(pipe, inputs)
    plain, levels[:] = levels[:], []
    calls = len(plain) // len(set(plain))  # guidance
    for solver, factor in ((UNIPC, 4), (HEUN, 1)):
        solved(pipe, inputs, solver, factor)
        assert levels[0] == pytest.approx(plain[0], rel=2e-3 if kind == "wan-video" else 0)  # UniPC's are rounded
        assert len(levels) == calls * solver.evaluations(factor * len(set(plain)))
        levels.clear()
    assert "get_timesteps" not in vars(pipe)


def test_a_strength_that_leaves_no_step_is_refused_by_the_pipeline() -> None:
    with pytest.raises(ValueError, match="strength parameter: 0"):
        generate_converged(flux("image"), 0, **call(10), image=picture(32, 32), strength=0.0)


def test_the_converged_picture_is_nearer_to_that_of_twice_the_steps_than_the_plain_one_is() -> None:
    pipe = flux()
    plain = generate(pipe, None, 3, **call(8)).frames
    found, twice = (generate_converged(pipe, 3, least_steps=n, **call(8)).frames for n in (100, 200))
    assert psnr(found, twice) > max(45, psnr(plain, twice) + 10)


@pytest.mark.parametrize(
    "kind, more",
    [("text", {})] + [("image", {"image": picture(32, 32), "strength": strength}) for strength in (0.6, 0.55)],
)
def test_it_begins_at_the_plain_runs_noise_and_goes_denser_where_there_is_most(kind: str, more: dict[str, Any]) -> None:
    pipe, seen = flux(kind), []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: seen.append(float(kwargs["timestep"][0])) or forward(**kwargs)
    generate(pipe, None, 3, **call(10), **more)
    plain, seen[:] = seen[:], []
    generate_converged(pipe, 3, least_steps=40, **call(10), **more)
    assert len(seen) == 4 * len(plain) and seen[0] == plain[0]
    assert (seen[4] == pytest.approx(plain[1])) == (kind == "image"), "a run from a picture keeps the plain levels"
    assert kind == "image" or seen[4] > plain[1]


def test_the_default_number_of_steps_is_that_of_the_pipeline() -> None:
    pipe, counted = flux(), []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: counted.append(1) or forward(*args, **kwargs)
    own = {name: value for name, value in call(1).items() if name != "num_inference_steps"}
    generate_converged(pipe, 0, least_steps=30, **own)
    assert len(counted) == 2 * 28
    with pytest.raises(ConfigError, match="least_steps=0"):
        generate_converged(pipe, 0, least_steps=0, **own)


def test_the_scheduler_is_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = ddit_rt.accelerate(flux(), threshold=0.0), flux_inputs(steps=4)
    plain = latents_of(ddit_rt.restore(pipe), inputs)
    own, before, registered = pipe.scheduler, dict(vars(pipe.scheduler)), pipe.config.scheduler
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_converged(pipe, 0, **call(4))
    assert pipe.scheduler is own and pipe.config.scheduler == registered
    assert {name: value for name, value in vars(own).items() if value is not before[name]} == {}
    assert torch.equal(latents_of(pipe, inputs), plain)


@pytest.mark.parametrize(
    "scheduler, named",
    [
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True adds noise"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "predicts no flow from"),
        (FlowMatchLCMScheduler(), "FluxPipeline with FlowMatchLCMScheduler cannot be run by another solver"),
        (DPMSolverMultistepScheduler(), "predicts no flow"),
        (
            DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
            ),
            "algorithm_type='sde-dpmsolver\\+\\+' adds noise",
        ),
    ],
)
def test_pipelines_without_a_limit_are_refused(scheduler: Any, named: str) -> None:
    pipe = flux()
    pipe.scheduler = scheduler
    with pytest.raises(ConfigError, match=named):
        generate_converged(pipe, 0, **call(4))
    assert pipe.scheduler is scheduler
