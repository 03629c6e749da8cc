"""Sweeps: fair turns, resumed after a kill, shared between shards, and summed up rightly."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from prompted import CALL, prompted

from ddit_rt import ConfigError
from ddit_rt.evaluate import Method, Plan, references, run_sweep, summarise, sweep
from ddit_rt.evaluate.flops import counted_flops
from ddit_rt.evaluate.settings import run_settings
from ddit_rt.evaluate.standard import standard_plan, with_adapter
from ddit_rt.evaluate.summary import worst_tenth
from ddit_rt.evaluate.sweep import PLAN, pictures_of, read_rows, turns
from ddit_rt.families import family_of, fresh_adapter
from ddit_rt.granularity import save_adapter

METHODS = [
    Method("base", "base", 6, 6),
    Method("fewer", "fewer steps", 3, 6),
    Method("skipped", "mixed", 6, 6, {"schedule": [1, 1, 0, 2, 0, 1]}),
    Method("tea", "TeaCache", 6, 6, {"multiples": [1], "cache": {"type": "teacache", "threshold": 1e9}}),
]


@pytest.fixture(scope="module")
def pipe():
    return prompted()


def plan(prompts=("a b", "c d", "e f"), **changes):
    return Plan(**{"model": "tiny", "methods": METHODS, "prompts": list(prompts), "call": CALL, **changes})


def timed(folder):
    return sorted((row["method"], row["prompt"], row["seed"]) for row in read_rows(folder) if "seconds" in row)


EVERY = sorted((method.name, prompt, 0) for method in METHODS for prompt in range(3))


def test_turns_put_references_first_and_rotate():
    orders = [[method.name for method in turns(METHODS, turn)] for turn in range(4)]
    assert all(order[0] == "base" and sorted(order) == sorted(m.name for m in METHODS) for order in orders)
    assert len({tuple(order) for order in orders}) > 2


def test_a_folder_takes_further_prompts_and_runs_those_alone(pipe, tmp_path, monkeypatch):
    first = run_sweep(pipe, plan(prompts=["a b", "c d"]), tmp_path, progress=False)
    original, seen = sweep.generate, []
    monkeypatch.setattr(sweep, "generate", lambda *a, **k: seen.append(k["prompt"]) or original(*a, **k))
    rows = run_sweep(pipe, plan(prompts=["a b", "c d", "e f"]), tmp_path, progress=False)
    assert set(seen) == {"e f"} and rows[: len(first)] == first and timed(tmp_path) == EVERY
    for other in (["a b"], ["a b", "e f", "c d"]):
        with pytest.raises(ConfigError, match="other prompts"):
            plan(prompts=other).write(tmp_path)


def test_a_folder_takes_further_methods_and_nothing_else(tmp_path):
    plan().write(tmp_path)
    more = plan(methods=[*METHODS, Method("less", "fewer steps", 2, 6)])
    more.write(tmp_path)
    assert Plan.read(tmp_path) == more
    for other in (plan(), plan(prompts=("x",), methods=more.methods)):
        with pytest.raises(ConfigError, match=r"other (methods|prompts)"):
            other.write(tmp_path)
    assert Plan.read(tmp_path) == more


def test_an_adapter_joins_a_plan_once(pipe, tmp_path):
    fresh = fresh_adapter(family_of(pipe), pipe.transformer, rank=2)
    path = str(save_adapter(fresh, tmp_path / "a.safetensors"))
    joined = with_adapter(plan(), path, pipe, ["g h"])
    added = joined.methods[len(METHODS) :]
    assert {method.settings["adapter"] for method in added} == {path}
    (own,) = [method for method in added if method.name == "fitted-adapter-1.5x@6"]
    assert own.settings["coarse"] == "adapter" and own.settings["schedule"][:2] == [1, 1]
    assert with_adapter(joined, path, pipe, ["g h"]) == joined
    given = tmp_path / "methods.json"
    given.write_text(json.dumps([method.to_dict() for method in METHODS]))
    values = (plan().prompts, [6], plan().seeds, CALL, plan().metrics)
    assert standard_plan(pipe, "tiny", *values, apart=["g h"], methods_file=given, adapter=Path(path)) == replace(
        joined, model="tiny"
    )
    sweep.generate(pipe, run_settings(own), 0, prompt="a b", **CALL, num_inference_steps=6)


def test_killed_sweep_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    original, calls = sweep.generate, 0
    converged, again = references.generate_converged, []

    def counted_converged(*args, **kwargs):
        again.append(kwargs["prompt"])
        return converged(*args, **kwargs)

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == len(METHODS) + 7:  # FLOP runs, one prompt, and half of the next
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(sweep, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(pipe, plan(), tmp_path, progress=False)
    assert len(timed(tmp_path)) == 6 and len(list((tmp_path / "converged").iterdir())) == 2
    monkeypatch.setattr(references, "generate_converged", counted_converged)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"method": "fewer", "prom')  # what a kill in mid-write leaves
    seen = []
    monkeypatch.setattr(sweep, "generate", lambda *a, **k: seen.append(k) or original(*a, **k))
    rows = run_sweep(pipe, plan(), tmp_path, progress=False)
    assert timed(tmp_path) == EVERY
    # the missing rows, and the base of the half-done prompt once more to compare with
    assert len(seen) == len(EVERY) - 6 + 1
    run_sweep(pipe, plan(), tmp_path, progress=False)
    assert len(seen) == len(EVERY) - 6 + 1, "a finished sweep runs nothing"
    assert again == ["e f"], "of the half-done prompt it is kept"
    assert {row["method"] for row in rows if "flops" in row} == {method.name for method in METHODS}
    assert "forward" not in pipe.transformer.__dict__


def test_rows_are_the_same_whoever_runs_them(pipe, tmp_path):
    whole = run_sweep(pipe, plan(), tmp_path / "whole", progress=False)
    for index in (1, 0):
        run_sweep(pipe, plan(), tmp_path / "shards", shard=(index, 2), progress=False)
    shards = read_rows(tmp_path / "shards")
    assert timed(tmp_path / "shards") == EVERY

    def values(rows):
        kept = ("psnr", "psnr_converged", "schedule")
        return {(r["method"], r["prompt"]): [r.get(name) for name in kept] for r in rows if "seconds" in r}

    assert values(shards) == values(whole)
    assert len(list(pictures_of(tmp_path / "whole", plan(), METHODS[2]))) == 3


def test_another_plan_is_refused(pipe, tmp_path):
    plan(prompts=["a"]).write(tmp_path)
    assert Plan.read(tmp_path).to_dict() == json.loads(json.dumps(plan(prompts=["a"]).to_dict()))
    with pytest.raises(ConfigError, match="other prompts"):
        run_sweep(pipe, plan(prompts=["b"]), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=PLAN):
        Plan.read(tmp_path / "none")
    with pytest.raises(ConfigError, match="metrics"):
        plan(metrics=["beauty"])


def test_a_folder_goes_on_in_its_own_dtype(tmp_path):
    half = prompted()
    half.transformer.to(torch.bfloat16)
    plan().write(tmp_path, prompted())
    with pytest.raises(ConfigError, match="in float32, this pipeline is in bfloat16: go on with --dtype float32, or"):
        run_sweep(half, plan(), tmp_path, progress=False)
    assert not read_rows(tmp_path)
    plan(prompts=("a b", "c d", "e f", "g h")).write(tmp_path, prompted())
    content = json.loads((tmp_path / PLAN).read_text())
    assert content["machine"].pop("dtype") == "float32" and len(content["plan"]["prompts"]) == 4
    (tmp_path / PLAN).write_text(json.dumps(content))
    plan(prompts=("a b", "c d", "e f", "g h")).write(tmp_path, half)  # one of an earlier version


def test_a_plan_is_whole_or_absent(tmp_path, monkeypatch):
    found = []
    replaced = os.replace

    def watched(part, path):
        found.append((path.exists(), json.loads(part.read_text())["plan"]["model"]))
        replaced(part, path)

    monkeypatch.setattr(os, "replace", watched)
    plan().write(tmp_path)
    plan(prompts=("a b", "c d", "e f", "g h")).write(tmp_path)
    assert found == [(False, "tiny"), (True, "tiny")] and [path.name for path in tmp_path.iterdir()] == [PLAN]


def test_flops_are_what_the_families_say(pipe):
    from ddit_rt import accelerated, report

    with counted_flops(pipe) as count, accelerated(pipe, schedule=[1, 1, 0, 2, 4, 1]):
        pipe("a", num_inference_steps=6, output_type="latent", **CALL)
        expected = sum(step.flops for step in report(pipe).steps)
    assert expected <= count.total < 1.05 * expected


def test_summary_by_hand():
    rows = [{"method": "base", "flops": 100.0}, {"method": "fewer", "flops": 50.0}]
    for prompt, (base, fewer, value) in enumerate([(4.0, 2.0, 30.0), (8.0, 2.0, 34.0), (6.0, 2.0, 35.0)]):
        shared = {"prompt": prompt, "seed": 0, "reference_seconds": base}
        rows.append({"method": "base", "seconds": base, "psnr": 100.0, **shared})
        rows.append({"method": "fewer", "seconds": fewer, "psnr": value, **shared})
    base, fewer = summarise(plan(methods=METHODS[:2]), rows)
    assert (base.seconds, base.seconds_low, base.seconds_high, base.speedup, base.metrics) == (6.0, 5.0, 7.0, 1.0, {})
    assert (fewer.seconds, fewer.speedup, fewer.flops_speedup, fewer.runs) == (2.0, 3.0, 2.0, 3)
    assert fewer.metrics == {"psnr": 33.0} and fewer.spread["psnr"] == pytest.approx(2.1602, abs=1e-4)


def test_rows_hold_the_distance_to_both_references(pipe, tmp_path):
    methods = [METHODS[0], Method("unipc-18@6", "UniPC", 18, 6, {"solver": {"type": "unipc"}})]
    rows = run_sweep(pipe, plan(methods=methods), tmp_path, progress=False)
    runs = [row for row in rows if "seconds" in row]
    assert all({"psnr", "ssim", "psnr_converged", "ssim_converged"} <= set(row) for row in runs) and len(runs) == 6
    base, unipc = summarise(plan(methods=methods), rows)
    assert set(base.metrics) == set(base.worst) == {"psnr_converged", "ssim_converged"}
    assert unipc.metrics["psnr_converged"] > base.metrics["psnr_converged"] + 5, "solved better"
    assert unipc.metrics["psnr"] < unipc.metrics["psnr_converged"], "and the plain picture is not where it goes"
    assert unipc.worst["psnr"] == min(row["psnr"] for row in runs if row["method"] == "unipc-18@6")
    flops = {row["method"]: row["flops"] for row in rows if "flops" in row}
    assert flops["unipc-18@6"] / flops["base"] == pytest.approx(18 / 6)


def test_a_cut_short_converged_picture_is_made_again(pipe, tmp_path):
    found = references.ConvergedPictures(tmp_path, pipe)
    call = {**CALL, "prompt": "a", "num_inference_steps": 50}
    frames = found.get(0, 0, 7, call)
    (path,) = (tmp_path / "converged").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(found.get(0, 0, 7, call), frames)
    assert not torch.equal(found.get(1, 0, 8, call), frames)


def test_a_folder_from_before_the_converged_picture_goes_on_without(pipe, tmp_path):
    old = plan(prompts=["a"], methods=METHODS[:2], converged=False)
    old.write(tmp_path)
    content = json.loads((tmp_path / PLAN).read_text())
    del content["plan"]["converged"]
    (tmp_path / PLAN).write_text(json.dumps(content))
    assert Plan.read(tmp_path) == old
    rows = run_sweep(pipe, Plan.read(tmp_path), tmp_path, progress=False)
    assert not (tmp_path / "converged").exists() and not any("psnr_converged" in row for row in rows)
    with pytest.raises(ConfigError, match="other converged"):
        plan(prompts=["a"], methods=METHODS[:2]).write(tmp_path)


def test_a_pipeline_without_a_converged_picture_is_refused_before_anything_runs(tmp_path):
    pipe = prompted()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(ConfigError, match=r"stochastic_sampling=True .*--no-converged"):
        run_sweep(pipe, plan(), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    run_sweep(pipe, plan(prompts=["a"], methods=METHODS[:1], converged=False), tmp_path, progress=False)


def test_the_worst_tenth_is_rounded_up_and_knows_which_way_is_worse():
    assert worst_tenth([5.0]) == 5.0 and worst_tenth([float(n) for n in range(10)]) == 0.0
    assert worst_tenth([float(n) for n in range(11)]) == 0.5
    assert worst_tenth([float(n) for n in range(11)], lower_is_better=True) == 9.5
