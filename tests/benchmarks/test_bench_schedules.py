"""The schedules that whole pipelines are measured with, at the real configurations."""

from itertools import pairwise

import pipe_models
import pytest
import torch
from pipe_schedules import PAPER_SPEEDUP, Plan, mixed, plans, speedup


@pytest.fixture(scope="module", params=["flux", "wan"])
def flops(request):
    pipe, inputs = pipe_models.build(request.param, torch.device("meta"), tiny=False)
    return pipe_models.flops(pipe, inputs)


@pytest.mark.parametrize("steps", [28, 50])
def test_mixed_needs_the_papers_share_of_the_flop(flops, steps):
    multiples = mixed(steps, flops)
    assert len(multiples) == steps and set(multiples) == {1, 2, 4}
    assert speedup(multiples, flops) == pytest.approx(PAPER_SPEEDUP, abs=0.02)
    assert set(multiples[: steps // 8]) == {1} and multiples[-1] == 1


def test_probes_of_coarse_steps_count():
    flops = {1: 1.0, 2: 0.25, 4: 0.1}
    assert speedup([1, 1, 1], flops) == 1
    assert speedup([2, 2], flops) == 4  # nothing to lean on
    assert speedup([1, 1, 2, 2], flops) == pytest.approx(4 / (2 + 2 * 0.25 + 2 * 0.25))
    assert speedup([1, 2, 1, 2, 1, 2], flops) == pytest.approx(6 / (3 + 3 * 0.25 + 3 * 0.25))


def test_the_initial_full_steps_meets_every_size_after_every_other():
    plan = Plan("mixed", 28, mixed(28, {1: 1.0, 2: 0.3, 4: 0.15}))
    short = plan.short()

    def pairs(multiples):
        return set(pairwise(multiples))

    assert pairs(short) == pairs(plan.multiples) and len(short) < plan.steps
    assert Plan("decided", 10, None).short() == (1,) * 7


def test_every_provider_has_the_runs_that_the_targets_compare():
    flops = {1: 1.0, 2: 0.3, 4: 0.15}
    names = {provider: [(p.name, p.steps) for p in plans(provider, 28, 50, flops)] for provider in ("stock", "ours")}
    assert names["stock"] == [("p", 28), ("p", 50)] and names["ours"][0] == ("mixed", 28)
    found = plans("ours+graphs", 28, 50, flops)
    assert {p.name for p in found} == {"mixed", "fitted", "p", "2p", "4p", "switching", "decided"}
    switching = next(p for p in found if p.name == "switching").multiples
    assert {(a, b) for a, b in pairwise(switching)} == {(a, b) for a in (1, 2, 4) for b in (1, 2, 4)}
    assert [(p.name, p.steps) for p in plans("stock+compile", 28, 50, flops)] == [("p", 28)]
    for provider in ("ours+graphs+batch4", "ours+graphs+adapter"):
        assert plans(provider, 28, 50, flops)[0].name == "mixed"
    fitted = next(p for p in found if p.name == "fitted").multiples
    assert len(fitted) == 28 and set(fitted) == {0, 1} and sum(fitted) == round(28 / PAPER_SPEEDUP)
