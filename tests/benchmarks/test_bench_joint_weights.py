"""Joint weights: the solver's are read off it rightly, and least squares finds what it should."""

import joint_weights
import pytest
import torch
from joint_weights import Change, Weights, answers, by_solver, changed, changes_of, of_solver, run, solved, subsets

SIGMAS = [1.0, 0.95, 0.9, 0.82, 0.75, 0.66, 0.57, 0.45, 0.33, 0.2, 0.0]
M = 5


class Flow:
    """Something that can be solved, for three prompts; ``bent`` makes it depend on the latent."""

    def __init__(self, bent):
        self.noise, self.bent = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), bent

    def velocity(self, latent, level):
        base = torch.linspace(0.5, 2, 8).reshape(4, 2) * level + torch.tensor([1.0, -2.0])
        return self.noise * level**2 + base + (torch.sin(latent) if self.bent else 0.0)


@pytest.mark.parametrize("reference", ["plain", "converged"])
def test_weights_of_the_solver_make_the_run_that_it_makes(reference):
    flow = Flow(True)
    last = by_solver(flow.noise, SIGMAS, M, reference, flow.velocity)
    assert torch.allclose(run(flow, of_solver(SIGMAS, M, reference))[1], last, atol=1e-5)


def test_answers_are_those_of_whole_runs():
    flow, weights = Flow(True), of_solver(SIGMAS, M, "converged")
    changes = changes_of(M, levels=True)
    assert len(changes) == M * (M + 1) // 2 + M - 1
    found = answers(flow, weights, changes)
    last, size = run(flow, weights)[1], 1e-2
    for change, answer in zip(changes, found):
        whole = (run(flow, change.applied(weights, size))[1] - last) / size
        assert torch.allclose(answer, whole, atol=0.02 * float(whole.abs().max()) + 1e-3), change


def test_one_step_reaches_what_is_linear_in_the_weights():
    flow, weights = Flow(False), of_solver(SIGMAS, M, "converged")
    changes = changes_of(M, levels=False)
    wanted = run(flow, Change(2, 0).applied(Change(4, 3).applied(weights, 0.1), -0.05))[1]
    missed = run(flow, weights)[1] - wanted
    new = changed(weights, changes, solved(answers(flow, weights, changes), missed, 1e-9))
    left = run(flow, new)[1] - wanted
    assert float(left.square().mean()) < 1e-4 * float(missed.square().mean())


def test_levels_that_would_cross_are_no_run():
    weights = Weights(torch.tensor([1.0, 0.5, 0.2]).double(), torch.eye(3).double())
    assert changed(weights, [Change(1)], torch.tensor([-0.1])) is not None
    for size in (0.6, -0.4):
        assert changed(weights, [Change(1)], torch.tensor([size])) is None


def test_subsets_are_nested():
    found = list(subsets(changes_of(4, levels=True)).values())
    assert [len(part) for part in found] == [7, 10, 13]
    assert set(found[0]) < set(found[1]) < set(found[2])
    assert len(subsets(changes_of(4, levels=False))) == 2


def test_rows_say_what_the_others_gained():
    row = joint_weights._row([[40.0, 41.0], [30.0, 33.0, 35.0]], [[39.0, 40.0], [29.0, 33.5, 34.0]])
    assert row["fit"] == {"psnr": 40.5, "worst": 40.0} and row["others"]["worst"] == 30.0 and row["better"] == 2
    assert "p" not in joint_weights._row([[1.0], [1.0]], [[1.0], [1.0]])
