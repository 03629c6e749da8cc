"""cache-dit's DBCache among the methods: with a stand-in for the library, and with the library where it is there."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from prompted import CALL, prompted
from tiny import negative, randomise, smooth, wan, wan_inputs

from ddit_rt import ConfigError
from ddit_rt.evaluate import Method, Plan, generate, run_sweep
from ddit_rt.evaluate.baselines import Listing, find_library
from ddit_rt.evaluate.baselines.dbcache import DBCache, block_count, runs_twice
from ddit_rt.evaluate.settings import check_methods
from ddit_rt.evaluate.standard import standard_plan
from ddit_rt.trajectories.fidelity import psnr

LIBRARY = {"type": "dbcache", "residual_diff_threshold": 0.1, "Fn_compute_blocks": 1, "max_warmup_steps": 3}
METHODS = [Method("base", "base", 12, 12), Method("db", "DBCache", 12, 12, {"library": LIBRARY})]
GUIDED = {"negative_prompt": "z", "true_cfg_scale": 2.0}


def deep():
    """A tiny FLUX of eight blocks, which leaves a step cache something to skip."""
    pipe = prompted()
    config = {**pipe.transformer.config, "num_layers": 2, "num_single_layers": 6}
    pipe.transformer = randomise(FluxTransformer2DModel.from_config(config))
    return smooth(pipe)


def image(pipe, settings=None, **call):
    return generate(pipe, settings, 0, prompt="a b", **{"num_inference_steps": 12, **CALL, **call})


def state(pipe):
    """All that says whether a pipeline is plain, names and order of its parts included."""
    modules = list(pipe.transformer.modules())
    return [[vars(pipe).keys(), dict(vars(type(pipe)))], *([dict(vars(m)), list(m._modules)] for m in modules)]


@pytest.fixture
def stub(monkeypatch):
    """A module that has cache-dit's names, marks the pipeline untidily, and remembers what was asked of it."""
    module = ModuleType("cache_dit")
    module.calls = []

    class DBCacheConfig(SimpleNamespace):
        def __init__(self, residual_diff_threshold=0.08, Fn_compute_blocks=8, Bn_compute_blocks=0,
                     max_warmup_steps=8, enable_separate_cfg=None):  # fmt: skip
            given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
            super().__init__(**given)

    def enable_cache(pipe, cache_config):
        module.calls.append(("enable", cache_config))
        transformer = pipe.transformer
        plain = transformer.forward
        transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
        transformer._modules["norm_out"] = transformer._modules.pop("norm_out")
        type(pipe)._is_cached = True
        return pipe

    def summary(transformer, logging):
        return [SimpleNamespace(cached_steps=[3, 4, 5], cfg_cached_steps=[4])]

    module.DBCacheConfig, module.enable_cache, module.summary = DBCacheConfig, enable_cache, summary
    module.disable_cache = lambda pipe: module.calls.append(("disable", pipe))
    monkeypatch.setitem(sys.modules, "cache_dit", module)
    return module


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)


def test_the_library_is_put_on_and_taken_off(stub):
    pipe = prompted()
    plain = image(pipe)
    before = state(pipe)
    outcome = image(pipe, {"library": LIBRARY}, count_flops=True)
    (enable, config), (disable, disabled) = stub.calls
    assert (enable, disable) == ("enable", "disable") and disabled is pipe
    assert (config.residual_diff_threshold, config.max_warmup_steps, config.enable_separate_cfg) == (0.1, 3, False)
    assert outcome.cached == 3 and outcome.report is None and outcome.flops > 0
    assert state(pipe) == before and torch.equal(image(pipe).frames, plain.frames)


def test_the_library_knows_of_a_second_run_per_step(stub):
    pipe = prompted()
    assert image(pipe, {"library": LIBRARY}, **GUIDED).cached == 2, "the mean of both"
    assert stub.calls[0][1].enable_separate_cfg is True
    image(pipe, {"library": {**LIBRARY, "enable_separate_cfg": False}}, **GUIDED)
    assert stub.calls[2][1].enable_separate_cfg is False, "what is given counts"
    embeds = negative({"prompt_embeds": torch.ones(1), "pooled_prompt_embeds": torch.ones(1)})
    assert runs_twice(pipe, embeds) and not runs_twice(pipe, {**embeds, "true_cfg_scale": 1.0})
    assert not runs_twice(pipe, {"true_cfg_scale": 3.0})
    assert runs_twice(wan(), {}) and not runs_twice(wan(), {"guidance_scale": 1.0})


def test_an_error_leaves_the_pipeline_plain(stub):
    pipe = prompted()
    image(pipe)
    before = state(pipe)

    def fail(*args):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        image(pipe, {"library": LIBRARY}, callback_on_step_end=fail)
    assert stub.calls[-1][0] == "disable" and state(pipe) == before
    original, stub.enable_cache = stub.enable_cache, lambda *a, **k: (original(*a, **k), fail())
    with pytest.raises(RuntimeError, match="in the middle"):
        image(pipe, {"library": LIBRARY})
    assert stub.calls[-1][0] == "disable" and state(pipe) == before


def test_wrong_settings(stub):
    with pytest.raises(ConfigError, match=r"db: library type 'nope' is none of dbcache"):
        check_methods([METHODS[0], Method("db", "x", 12, 12, {"library": {"type": "nope"}})])
    with pytest.raises(ConfigError, match="take away threshold"):
        check_methods([METHODS[0], Method("db", "x", 12, 12, {"library": LIBRARY, "threshold": 0.1})])
    for option, value in (("residual_diff_threshold", -1), ("Fn_compute_blocks", 1.5), ("max_warmup_steps", "3")):
        with pytest.raises(ConfigError, match=f"db: {option}={value!r}: a "):
            check_methods([METHODS[0], Method("db", "x", 12, 12, {"library": {**LIBRARY, option: value}})])
    pipe = prompted()
    with pytest.raises(ConfigError, match="leave nothing to skip of 2 blocks"):
        image(pipe, {"library": {**LIBRARY, "Fn_compute_blocks": 2}})
    assert not stub.calls


def test_a_sweep_asks_for_the_library_before_it_runs_anything(stub, tmp_path, monkeypatch):
    pipe = prompted()
    odd = Method("odd", "DBCache", 12, 12, {"library": {**LIBRARY, "colour": 1}})
    with pytest.raises(ConfigError, match=r"odd: cache-dit refuses its options: .*colour"):
        run_sweep(pipe, Plan("tiny", [METHODS[0], odd], ["a"], call=CALL), tmp_path, progress=False)
    plan = Plan("tiny", METHODS, ["a"], call=CALL)
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ConfigError, match=r"db needs cache-dit, .*ddit-rt\[baselines\]"):
        run_sweep(pipe, plan, tmp_path, progress=False)
    assert not stub.calls and not list(tmp_path.iterdir())
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan, "results can be read where the library is missing"
    with pytest.raises(ConfigError, match=r"ddit-rt\[baselines\]"):
        image(pipe, {"library": LIBRARY})


def planned(monkeypatch):
    monkeypatch.setattr("ddit_rt.evaluate.standard.policies", lambda steps: [])
    return standard_plan(prompted(), "some/model", ["a"], [50, 28], [0], CALL, ["psnr"])


def first(blocks, monkeypatch):
    """How many blocks always run in a model of ``blocks``."""
    monkeypatch.setattr("ddit_rt.evaluate.baselines.dbcache.block_count", lambda pipe: blocks)
    return DBCache().methods(Listing(None, 50, CALL))[0].other_library["Fn_compute_blocks"]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("ddit_rt")]


def test_the_standard_plan_compares_the_library(stub, monkeypatch, caplog):
    plan = planned(monkeypatch)
    listed = [method for method in plan.methods if method.other_library is not None]
    assert [m.name for m in listed] == ["dbcache-0.08@50", "dbcache-0.12@50", "dbcache-0.24@50", "dbcache-0.12@28"]
    assert {m.kind for m in listed} == {"DBCache"} and not said(caplog)
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert [first(blocks, monkeypatch) for blocks in (8, 30, 57)] == [1, 8, 8]


def test_the_standard_plan_says_what_is_missing(absent, monkeypatch, caplog):
    assert not [method for method in planned(monkeypatch).methods if method.other_library is not None]
    (line,) = said(caplog)
    assert "pip install 'ddit-rt[baselines]'" in line


class TestTheLibrary:
    @pytest.fixture(autouse=True)
    def _installed(self):
        if importlib.util.find_spec("cache_dit") is None:
            pytest.skip("cache-dit is not installed (extra baselines)")

    @pytest.mark.parametrize("guided", [{}, GUIDED], ids=["plain", "true CFG"])
    def test_dbcache_saves_blocks_and_leaves_flux_plain(self, guided, capfd):
        pipe = deep()
        base = image(pipe, count_flops=True, **guided)
        before = state(pipe)
        never = image(pipe, {"library": {**LIBRARY, "residual_diff_threshold": 0.0}}, count_flops=True, **guided)
        assert torch.equal(never.frames, base.frames) and never.flops == base.flops and never.cached == 0
        settings = {"library": {**LIBRARY, "residual_diff_threshold": 10.0}}
        outcome = image(pipe, settings, count_flops=True, **guided)
        assert outcome.cached == 9 and psnr(outcome.frames, base.frames) > 30
        # nine of twelve steps run one of the eight blocks, all of the same size but for the text's own weights
        assert 0.3 < outcome.flops / base.flops < 0.4
        assert torch.equal(image(pipe, settings, **guided).frames, outcome.frames), "no state left from the first call"
        assert state(pipe) == before and torch.equal(image(pipe, **guided).frames, base.frames)
        assert not capfd.readouterr().out

    def test_an_error_leaves_flux_plain(self):
        pipe = deep()
        plain = image(pipe)
        before = state(pipe)

        def fail(*args):
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            image(pipe, {"library": LIBRARY}, callback_on_step_end=fail)
        assert state(pipe) == before and torch.equal(image(pipe).frames, plain.frames)

    @pytest.mark.parametrize("two, scale, cached", [(False, 3.0, 5), (False, 1.0, 5), (True, 3.0, 4)])
    def test_wan(self, two, scale, cached):
        pipe = wan(two=two)
        inputs = {**wan_inputs(), "guidance_scale": scale}
        assert block_count(pipe) == 2
        setting = {**LIBRARY, "residual_diff_threshold": 1e9, "max_warmup_steps": 2 if two else 3}
        library, options = find_library("wan", setting)
        with library.enabled(pipe, options, inputs) as steps:
            pipe(**inputs)
            assert steps() == cached
        assert type(pipe).__call__.__module__.startswith("diffusers")

    def test_a_sweep_measures_it(self, tmp_path):
        rows = run_sweep(deep(), Plan("tiny", METHODS, ["a", "b"], call=CALL), tmp_path, progress=False)
        flops = {row["method"]: row["flops"] for row in rows if "flops" in row}
        assert flops["base"] > 1.5 * flops["db"]
        timed = [row for row in rows if row["method"] == "db" and "seconds" in row]
        assert len(timed) == 2 and all(row["cached"] > 0 and {"psnr", "ssim", "seconds"} <= row.keys() for row in timed)
        assert not any("schedule" in row for row in timed)
