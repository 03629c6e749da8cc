"""The measuring program's code path, at tiny sizes on the CPU."""

import json
import sys
from types import ModuleType, SimpleNamespace

import gpu_suite
import pipe_ends
import pipe_models
import pipe_providers
import pipe_schedules
import pipelines
import pytest
import store
import torch

FP8 = "ours+graphs+compile+fp8+cudnn"


class Quantised(torch.nn.Parameter):
    """Stands for a weight in FP8."""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """The package's code stays the same from call to call, whoever works on it meanwhile."""
    monkeypatch.setattr(store, "_source", lambda: "0")


@pytest.fixture
def quantised(monkeypatch):
    """Stands for torchao; holds the names of the layers that were quantised."""
    names = []

    def quantize_(model, config, filter_fn):
        for name, layer in model.named_modules():
            if filter_fn(layer, name):
                names.append(name)
                layer.weight = Quantised(layer.weight.detach(), requires_grad=False)

    quantization = ModuleType("torchao.quantization")
    quantization.quantize_ = quantize_
    quantization.PerRow = SimpleNamespace
    quantization.Float8DynamicActivationFloat8WeightConfig = SimpleNamespace
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    monkeypatch.setattr(pipe_models, "fp8_obstacle", lambda device: "")
    return names


def rows_of(folder, part):
    return json.loads((folder / "dry-run" / f"{part}.json").read_text())["rows"]


def test_a_dry_run_walks_through_every_part_and_the_next_call_measures_nothing_again(
    tmp_path, monkeypatch, quantised, capsys
):
    call = ["--dry-run", "--runs", "1", "--out", str(tmp_path), "--providers", "stock", "ours+graphs", "ends", FP8]
    assert gpu_suite.main(call) == 0
    assert "mean nothing" in capsys.readouterr().out
    assert {row["kernel"] for row in rows_of(tmp_path, "kernels")} == {"decision", "embed", "deembed"}
    for model in ("flux", "wan"):
        content = json.loads((tmp_path / "dry-run" / f"{model}.json").read_text())
        assert content["dry_run"]
        rows = {(row["provider"], row["schedule"], row["steps"]): row for row in content["rows"]}
        names = [schedule for provider, schedule, _ in rows if provider == "ours+graphs"]
        assert set(names) == {"p", "2p", "4p", "mixed", "fitted", "switching", "decided"}
        switching = rows["ours+graphs", "switching", 25]["step_ms"]
        assert set(switching["switching"]) == set(switching["repeating"]) == {"1", "2", "4"}
        assert rows["ours+graphs", "decided", 8]["multiples"] == [1] * 8
        assert rows["stock", "p", 8]["gap_us"]["count"] == 3
        assert rows[FP8, "2p", 8]["flop_speedup"] > 1
        assert all(rows["ends", end, 0]["wall_s"]["count"] == 1 for end in pipe_ends.ENDS)
        flops = {int(k): value for k, value in content["flops"]["per_model_run"].items()}
        for row in content["rows"]:
            if row.get("coarse") == "delta":
                estimate = pipe_schedules.speedup(row["multiples"], flops)
                assert row["flop_speedup"] == pytest.approx(estimate, rel=1e-6)
    assert any(name.startswith("transformer_blocks.0.") for name in quantised)
    assert not any("x_embedder" in name or name == "proj_out" for name in quantised)

    before = {part: rows_of(tmp_path, part) for part in gpu_suite.PARTS}
    monkeypatch.setattr(pipelines, "measure", lambda *args: pytest.fail("measured again"))
    assert gpu_suite.main(call) == 0
    assert before == {part: rows_of(tmp_path, part) for part in gpu_suite.PARTS}


@pytest.fixture
def instant(monkeypatch):
    """Measurements that take no time; ``failing`` names schedules that raise."""
    failing = set()

    def measure(pipe, inputs, provider, plan, timeline, runs, device):
        if plan.name in failing:
            raise RuntimeError("out of memory")
        return {"wall_s": {"median": 1.0}}

    monkeypatch.setattr(pipelines, "measure", measure)
    return failing


def test_a_part_ends_when_its_seconds_are_over_and_goes_on_with_the_next_call(tmp_path, instant, capsys):
    call = ["--dry-run", "--out", str(tmp_path), "--providers", "ours"]
    assert gpu_suite.main([*call, "--parts", "flux=0"]) == 0
    assert "out of time before flux ours mixed" in capsys.readouterr().out
    assert gpu_suite.main([*call, "--parts", "flux"]) == 0
    assert [row["schedule"] for row in rows_of(tmp_path, "flux")] == ["mixed", "fitted", "4p", "2p"]


def test_what_fails_is_told_and_costs_the_others_nothing(tmp_path, instant, monkeypatch):
    instant.add("4p")
    call = ["--dry-run", "--out", str(tmp_path), "--parts", "flux", "--providers", "ours"]
    assert gpu_suite.main(call) == 1
    rows = {row["schedule"]: row for row in rows_of(tmp_path, "flux")}
    assert rows["4p"]["error"] == "RuntimeError: out of memory" and "error" not in rows["2p"]
    instant.clear()
    assert gpu_suite.main([*call, "--again"]) == 0


def test_a_provider_that_cannot_be_had_is_skipped_and_one_that_fails_says_so_in_all_its_rows(
    tmp_path, instant, monkeypatch, capsys
):
    monkeypatch.setattr(pipe_models, "fp8_obstacle", lambda device: "torchao is not installed")
    call = ["--dry-run", "--out", str(tmp_path), "--parts", "flux", "--providers"]
    assert gpu_suite.main([*call, "ours+graphs+fp8"]) == 0
    assert {row["skipped"] for row in rows_of(tmp_path, "flux")} == {"torchao is not installed"}
    assert "skipped: torchao is not installed" in capsys.readouterr().out

    def broken(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(pipe_providers, "prepared", broken)
    assert gpu_suite.main([*call, "ours"]) == 1
    assert {row["error"] for row in rows_of(tmp_path, "flux") if row["provider"] == "ours"} == {"RuntimeError: no"}


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--parts", "flax=3"])
    assert "none of kernels, flux, wan" in capsys.readouterr().err


def test_fp8_needs_torchao_and_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(pipe_models.importlib.util, "find_spec", lambda name: None)
    assert "torchao" in pipe_models.fp8_obstacle(torch.device("cuda"))
    monkeypatch.setattr(pipe_models.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "8.9" in pipe_models.fp8_obstacle(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert pipe_models.fp8_obstacle(torch.device("cuda")) == ""


def test_modulations_are_made_ahead_where_there_are_some():
    cpu, provider = torch.device("cpu"), "ours+graphs+ahead"
    assert pipe_providers.obstacle("flux", provider, cpu) == ""
    assert "no modulations" in pipe_providers.obstacle("wan", provider, cpu)
    pipe, _ = pipe_models.build("flux", cpu, tiny=True)
    assert pipe_providers.settings(provider, pipe, cuda=False)["modulation"] == "ahead"


def test_memory_in_graphs_is_that_of_their_pools(monkeypatch):
    segments = [{"total_size": 2**30, "segment_pool_id": pool} for pool in ((0, 0), (0, 1), (0, 1))]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert pipelines._Memory(cuda=True).graphs() == 2.0
    assert pipelines._Memory(cuda=False).graphs() is None


@pytest.mark.parametrize(
    "provider, lost", [("ours+cudnn", "attention backend"), ("ours+fp8", "FP8 did not take effect")]
)
def test_a_setting_that_takes_no_effect_is_an_error(monkeypatch, quantised, provider, lost):
    cpu = torch.device("cpu")
    pipe_providers.prepared("flux", provider, cpu, tiny=True)
    monkeypatch.setattr("diffusers.FluxTransformer2DModel.set_attention_backend", lambda *_: None)
    monkeypatch.setattr(sys.modules["torchao.quantization"], "quantize_", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=lost):
        pipe_providers.prepared("flux", provider, cpu, tiny=True)


def test_without_git_rows_have_no_commit(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(store.subprocess, "run", missing)
    rows = store.Store(tmp_path / "rows.json", ("provider",), cuda=False)
    rows.put({"provider": "stock"})
    assert rows.rows[0]["commit"] is None


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_adapters_caches_and_batches_are_what_their_names_say(tmp_path, model):
    providers = ["ours+graphs+adapter+merged", "ours+graphs+adapter", "ours+graphs+teacache", "stock+batch2"]
    call = ["--dry-run", "--runs", "1", "--out", str(tmp_path), "--parts", model, "--providers"]
    assert gpu_suite.main([*call, *providers, "ours+graphs+batch4"]) == 0
    rows = {(row["provider"], row["schedule"]): row for row in rows_of(tmp_path, model)}
    merged, beside = (rows[provider, "mixed"] for provider in providers[:2])
    assert merged["coarse"] == beside["coarse"] == "adapter"
    assert merged["flop_speedup"] > beside["flop_speedup"]
    assert rows["ours+graphs+teacache", "p"]["executed"] == ["cached", "eager"]
    assert rows["ours+graphs+teacache", "p"]["flop_speedup"] > 1.3
    for provider, batch in (("stock+batch2", 2), ("ours+graphs+batch4", 4), ("ours", 1)):
        _, inputs = pipe_providers.prepared(model, provider, torch.device("cpu"), tiny=True)
        assert inputs["prompt_embeds"].shape[0] == batch == pipe_providers.batch_of(provider)
