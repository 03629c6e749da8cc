"""The graph runner on a capture back-end that plays by CUDA's rules on the CPU."""

import logging

import pytest
import torch
from torch import nn

from ddit_rt.runtime import CaptureRefused, GraphRunner, Recording


class Scale(nn.Module):
    """y = x · weight, counting how often its Python runs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]), requires_grad=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.weight


class Bench:
    """A runner with one module and one function."""

    def __init__(self, limit=8):
        self.recording, self.module = Recording(), Scale()
        self.runner = GraphRunner(self.recording, limit)

    def __call__(self, x, label="scale", obstacle="", **more):
        self.runner.refresh(self.module)

        def function(inputs):
            return {"y": self.module(inputs["x"]), "also": inputs["x"] + 1}

        result, replayed = self.runner.run((self.module,), label, function, {"x": x, **more}, obstacle)
        return result["y"], replayed


@pytest.fixture
def bench():
    return Bench()


def vector(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_a_replay_computes_from_new_inputs_without_running_python(bench):
    assert torch.equal(bench(vector(1, 1))[0], vector(2, 3))
    calls = bench.module.calls
    y, replayed = bench(vector(5, -1))
    assert replayed and torch.equal(y, vector(10, -3))
    assert bench.module.calls == calls and bench.recording.captures == 1


def test_outputs_that_are_held_stay_as_they_were(bench):
    held = [bench(vector(i, i), label=i % 3)[0] for i in range(9)]
    assert bench.recording.captures == 3
    assert all(torch.equal(y, vector(2 * i, 3 * i)) for i, y in enumerate(held))


def test_inputs_are_copied_and_left_alone(bench):
    x = vector(1, 2)
    bench(x)
    x.add_(10)
    assert torch.equal(bench(x)[0], vector(22, 36)) and torch.equal(x, vector(11, 12))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(3, 2)},
        {"x": torch.ones(2, dtype=torch.float64)},
        {"x": torch.ones(2, 2).T},
        {"label": "other"},
        {"extra": torch.ones(1)},
        {"extra": 0.5},
        {"extra": None},
        {"nested": {"scale": True}},
    ],
    ids=str,
)
def test_every_part_of_the_signature_selects_its_own_graph(bench, changed):
    first = {"x": torch.ones(2, 2)} if changed.get("x") is not None and changed["x"].ndim == 2 else {"x": vector(1, 1)}
    bench(**first)
    bench(**{**first, **changed})
    assert bench.recording.captures == 2
    bench(**first)
    bench(**{**first, **changed})
    assert bench.recording.captures == 2 and len(bench.runner) == 2


@pytest.mark.parametrize("values", [(1, 1.0, True), (0, 0.0, -0.0, False), (0j, -0j)], ids=str)
def test_values_that_are_equal_and_differ_have_graphs_of_their_own(bench, values):
    for value in (*values, *values):
        bench(vector(1, 1), extra=value)
    assert bench.recording.captures == len(values)


def test_nan_selects_one_graph_however_often_it_is_made(bench):
    for _ in range(3):
        bench(vector(1, 1), extra=float("nan"))
    assert bench.recording.captures == 1


def test_the_least_recently_used_graph_goes_first():
    bench = Bench(limit=2)
    for label in "abacab":  # c takes the place of b, then b that of c: a was used in between
        bench(vector(1, 1), label=label)
    assert bench.recording.captures == 4 and bench.recording.released == 2 and len(bench.runner) == 2


def test_strides_and_mixed_dtypes_arrive_intact(bench):
    sparse = torch.arange(8.0).reshape(4, 2)[::2]
    inputs = {
        "x": torch.ones(1).expand(2),
        "sparse": sparse,
        "half": vector(1, 2, dtype=torch.bfloat16),
        "whole": torch.arange(3),
        "level": torch.tensor(0.25, dtype=torch.float64),
    }
    bench.runner.refresh(bench.module)
    for shift in range(3):
        given = {name: tensor + shift for name, tensor in inputs.items()}
        given["sparse"] = (torch.arange(8.0).reshape(4, 2) + shift)[::2]
        result, replayed = bench.runner.run((bench.module,), "all", lambda x: {k: v + 0 for k, v in x.items()}, given)
        assert replayed
        assert all(torch.equal(result[name], given[name]) and result[name].dtype == given[name].dtype for name in given)
    assert bench.recording.captures == 1


def test_dicts_are_given_anew_to_every_run_of_the_function(bench):
    def takes_apart(inputs):
        return inputs["kwargs"].pop("x") + 1

    bench.runner.refresh(bench.module)
    kwargs = {"x": vector(1)}
    for value in (1, 2, 3):
        kwargs["x"] = vector(value)
        assert bench.runner.run((bench.module,), "pop", takes_apart, {"kwargs": kwargs})[0] == value + 1
        assert "x" in kwargs


# -- staleness ------------------------------------------------------------------------------------------------------


def test_weights_changed_in_place_need_no_new_graph(bench):
    bench(vector(1, 1))
    bench.module.weight.mul_(10)
    assert torch.equal(bench(vector(1, 1))[0], vector(20, 30)) and bench.recording.captures == 1


def change_data(module):
    module.weight.data = module.weight.data * 10


def change_parameter(module):
    module.weight = nn.Parameter(module.weight * 10, requires_grad=False)


def change_module(module):
    module.child = nn.Linear(1, 1).requires_grad_(False)
    module.weight.data = module.weight.data * 10


def test_weights_laid_out_anew_where_they_were_are_noticed(bench):
    bench.module.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), requires_grad=False)
    bench(vector(1, 1))
    bench.module.weight.data = bench.module.weight.data.t()
    assert torch.equal(bench(vector(1, 1))[0], torch.tensor([[1.0, 3.0], [2.0, 4.0]]))


def test_dropout_is_in_no_graph_of_evaluation_and_the_other_way_round(bench):
    bench.module.dropout = nn.Dropout(1.0)  # all of it, so that nothing is by chance
    bench.module.eval()

    def drops():
        bench.runner.refresh(bench.module)
        given = {"x": vector(1, 1)}
        return bench.runner.run(
            (bench.module,), "drop", lambda inputs: bench.module.dropout(bench.module(inputs["x"])), given
        )[0]

    assert torch.equal(drops(), vector(2, 3))
    bench.module.train()
    assert torch.equal(drops(), vector(0, 0))
    bench.module.eval()
    assert torch.equal(drops(), vector(2, 3)) and bench.recording.captures == 2


@pytest.mark.parametrize("change", [change_data, change_parameter, change_module])
def test_weights_that_moved_are_noticed_and_their_graphs_dropped(bench, change):
    bench(vector(1, 1))
    change(bench.module)
    y, replayed = bench(vector(1, 1))
    assert replayed and torch.equal(y, vector(20, 30))
    assert bench.recording.captures == 2 and bench.recording.released == 1 and len(bench.runner) == 1


def test_without_looking_the_recorder_shows_the_stale_weights(bench):
    """The recorder is as unforgiving as CUDA, so the tests above mean something."""
    bench(vector(1, 1))
    change_data(bench.module)
    bench.runner.refresh = lambda *modules: None
    assert torch.equal(bench(vector(1, 1))[0], vector(2, 3))


def test_other_modules_keep_their_graphs(bench):
    other = Scale()
    bench(vector(1, 1))
    bench.runner.refresh(other)
    bench.runner.run((other,), "other", lambda x: other(x["x"]), {"x": vector(1, 1)})
    change_data(other)
    bench.runner.refresh(other)
    assert len(bench.runner) == 1 and bench.recording.released == 1


def test_clear_releases_everything(bench):
    for label in "abc":
        bench(vector(1, 1), label=label)
    bench.runner.clear()
    assert len(bench.runner) == 0 and not bench.recording.live
    assert bench(vector(1, 1))[1]


# -- falling back ---------------------------------------------------------------------------------------------------


def reads_on_the_host(inputs):
    return inputs["x"] * inputs["x"].sum().item()


def makes_tensors_from_lists(inputs):
    return inputs["x"] * torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("function", [reads_on_the_host, makes_tensors_from_lists])
def test_what_cannot_be_captured_runs_eagerly_and_is_not_tried_again(bench, caplog, function):
    bench.runner.refresh(bench.module)
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 2.0, 3.0):
            x = vector(value, 1)
            result, replayed = bench.runner.run((bench.module,), "no", function, {"x": x})
            assert not replayed and torch.equal(result, function({"x": x}))
    assert [record.message for record in caplog.records if "CaptureRefused" in record.message] == [
        caplog.records[0].message
    ]
    assert CaptureRefused.__name__ in caplog.text and bench.recording.warmups == 1


def test_every_reason_is_logged_once(bench, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not bench(vector(1, 1), obstacle="it decides anew")[1]
            elsewhere = {"x": torch.ones(2, device="meta")}
            assert not bench.runner.run((bench.module,), "meta", lambda x: x["x"] + 1, elsewhere)[1]
    assert len(caplog.records) == 2 and "it decides anew" in caplog.text and "meta" in caplog.text


def test_errors_of_the_function_reach_the_caller(bench):
    def wrong(inputs):
        raise ValueError("the user's own mistake")

    bench.runner.refresh(bench.module)
    with pytest.raises(ValueError, match="own mistake"):
        bench.runner.run((bench.module,), "wrong", wrong, {"x": vector(1)})


def test_values_that_cannot_select_a_graph_run_eagerly(bench, caplog):
    class Unhashable:
        __hash__ = None

    assert not bench(vector(1, 1), extra=Unhashable())[1]
    assert "Unhashable" in caplog.text


def test_recorded_gradients_run_eagerly(bench, caplog):
    x = vector(1, 1).requires_grad_()
    y, replayed = bench(x)
    assert not replayed and y.requires_grad and "autograd" in caplog.text
    with torch.no_grad():
        y, replayed = bench(x)
    assert replayed and not y.requires_grad


def test_inference_mode_and_no_grad_share_a_graph(bench):
    with torch.inference_mode():
        first = bench(vector(1, 1))[0]
    with torch.no_grad():
        second = bench(vector(2, 2))[0]
    with torch.inference_mode():
        third = bench(vector(3, 3))[0]
    assert [y[0].item() for y in (first, second, third)] == [2, 4, 6] and bench.recording.captures == 1
    assert not second.is_inference()


def test_autocast_keeps_no_weights_in_a_graph(bench):
    """What autocast made of a weight goes when its context ends; a graph that read it there would read freed memory."""
    bench.module.linear = nn.Linear(2, 2, bias=False)  # its weight records gradients, as pipelines leave weights

    def function(inputs):
        return bench.module.linear(inputs["x"])

    results = []
    for factor in (1.0, 2.0):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            bench.module.linear.weight.copy_(torch.eye(2) * factor)
            bench.runner.refresh(bench.module)
            result, replayed = bench.runner.run((bench.module,), "linear", function, {"x": vector(1, 2)})
            assert replayed and torch.is_autocast_cache_enabled()
        results.append(result.tolist())
    assert results == [[1, 2], [2, 4]] and bench.recording.captures == 1
