"""Better solvers as baselines: evaluations counted, noise levels spaced, and the pipeline as it was."""

import logging

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from prompted import CALL, prompted

from ddit_rt.evaluate import BASELINES, Listing, Method, OtherSolver, generate
from ddit_rt.evaluate.settings import run_settings
from ddit_rt.runtime import MethodPatch

SOLVERS = {baseline.name: baseline for baseline in BASELINES if isinstance(baseline, OtherSolver)}


def run(pipe, method):
    """Frames and the timesteps that the model was evaluated at."""
    seen = []

    def watch(inner, *args, **kwargs):
        seen.append(float(kwargs["timestep"][0]))
        return inner(*args, **kwargs)

    patch = MethodPatch(pipe.transformer, "forward", watch)
    patch.ensure_outermost()
    frames = generate(pipe, run_settings(method), 0, prompt="a", num_inference_steps=method.steps, **CALL).frames
    patch.remove()
    return frames, seen


@pytest.mark.parametrize("name", ["euler", "heun", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("evaluations", [1, 6, 7])
def test_evaluations_are_what_the_name_says(name, evaluations):
    pipe, solver = prompted(), SOLVERS[name]
    method = solver.method(evaluations, 12, 1.0)
    frames, seen = run(pipe, method)
    made = solver.solver.evaluations(method.steps)
    assert len(seen) == made and made in (evaluations, evaluations - 1) and method.name == f"{name}-{made}@12"
    assert bool(torch.isfinite(frames).all()) and "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", ["heun", "dpmsolver++", "unipc"])
def test_levels_are_the_plain_ones_unless_they_are_spaced_anew(name):
    pipe, solver = prompted(), SOLVERS[name]
    method = solver.method(9, 12, 1)
    plain = sorted(set(run(pipe, Method("base", "base", method.steps, method.steps))[1]))
    same, spaced = (sorted(set(run(pipe, solver.method(9, 12, w))[1])) for w in (1, 1.4))
    assert same == plain
    assert len(spaced) == len(plain) and spaced[-1] == plain[-1]
    assert all(new > old for new, old in zip(spaced[:-1], plain[:-1]))


def test_euler_as_it_is_spaced_is_the_plain_pipeline_at_fewer_steps():
    pipe, own = prompted(), SOLVERS["euler"]
    plain, _ = run(pipe, Method("6-steps@12", "fewer steps", 6, 12))
    assert torch.equal(run(pipe, own.method(6, 12, 1))[0], plain)
    assert not torch.equal(run(pipe, own.method(6, 12, 1.4))[0], plain)


def test_every_solver_is_listed_at_the_speed_ups_of_fewer_steps():
    listed = {m.name for solver in SOLVERS.values() for m in solver.methods(Listing(prompted(), 50, CALL))}
    assert {f"{name}-{n}@50" for name in ("unipc", "dpmsolver++") for n in (25, 17, 12)} <= listed
    assert {"heun-25@50", "heun-17@50", "heun-11@50", "euler-25-w1.4@50", "unipc-12-w1.4@50"} <= listed
    few = [m.name for solver in SOLVERS.values() for m in solver.methods(Listing(prompted(), 5, CALL))]
    assert len(set(few)) == len(few) and "heun-1@5" in few
    assert "euler-25@50" not in listed, "that is 25-steps@50"


def test_a_pipeline_that_no_solver_can_run_is_compared_without(caplog):
    pipe = prompted()
    pipe.scheduler = FlowMatchLCMScheduler()
    with caplog.at_level(logging.WARNING):
        assert SOLVERS["unipc"].methods(Listing(pipe, 50, CALL)) == []
    assert "unipc is not compared" in caplog.text and "FlowMatchLCMScheduler" in caplog.text
