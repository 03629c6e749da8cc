"""Schedules, method lists and their files."""

import json

import pytest
import torch
from prompted import CALL, prompted

from ddit_rt import ConfigError, DDiTConfig, TeaCacheConfig
from ddit_rt.evaluate import BASELINES, Listing, Method, StepCache
from ddit_rt.evaluate.own_methods import adapter_methods, fitted_methods, policy_methods
from ddit_rt.evaluate.settings import check_methods, read_methods, run_settings
from ddit_rt.schedule.spacing import one_in, pattern


def test_patterns():
    assert one_in(10, 3, 2) == [1, 1, 1, 2, 2, 1, 2, 2, 1, 1]
    assert one_in(50, 6, 0)[:10] == [1] * 7 + [0] * 3
    assert pattern(10, [1, 0, 4], initial=2, tail=0) == [1, 1, 0, 4, 1, 0, 4, 1, 0, 4]
    assert pattern(3, [1, 0]) == [1, 1, 1]
    for steps in (1, 2, 5, 28):
        assert len(pattern(steps, [1, 0, 0, 2])) == steps


def test_standard_methods_are_valid_settings():
    methods = [Method("base@50", "base", 50, 50), Method("base@28", "base", 28, 28)]
    listings = [Listing(prompted(), 50, CALL), Listing(prompted(), 28, CALL, full=False)]
    methods += [m for listing in listings for baseline in BASELINES for m in baseline.methods(listing)]
    methods += policy_methods(50, "ddit", "DDiT", {"2x": 0.01})
    for method in check_methods(methods):
        if method.settings is not None and not {"library", "solver"} & set(method.settings):
            DDiTConfig(**run_settings(method))
    names = [method.name for method in methods]
    assert {"base@50", "25-steps@50", "extrapolate-3@50", "delta-2p-3@50", "base@28"} <= set(names)
    assert [m.settings["adapter"] for m in adapter_methods(50, "a.safetensors")] == ["a.safetensors"] * 4
    assert [m.name for m in adapter_methods(28, "a", full=False)] == ["adapter-2p-3@28", "adapter-4p-3@28"]
    fitted = fitted_methods(50, "fitted", "DDiT, fitted", {"2x": [1, 1] + [0, 4] * 24})
    (joined,) = [m for m in adapter_methods(50, "a.safetensors", fitted) if m.name == "adapter-fitted-2x@50"]
    assert joined.settings["coarse"] == "adapter" and joined.settings["schedule"] == fitted[0].settings["schedule"]


def test_cache_of_a_method():
    cache = {"type": "teacache", "threshold": 0.3, "coefficients": [2.0, 1.0]}
    (method,) = policy_methods(50, "both", "DDiT + TeaCache", {"2x": 0.01}, {"cache": cache})
    assert method.name == "both-2x@50" and method.settings["threshold"] == 0.01
    assert run_settings(method)["cache"] == TeaCacheConfig(0.3, (2.0, 1.0))
    with pytest.raises(ConfigError, match="none of"):
        run_settings(Method("x", "x", 5, 5, {"cache": {"type": "nope"}}))
    with pytest.raises(ConfigError, match=r"x: cache type 'first-block' refuses its options: .*colour"):
        run_settings(Method("x", "x", 5, 5, {"cache": {"type": "first-block", "colour": 1}}))


def test_every_step_cache_makes_its_config():
    options = {"magcache": {"num_inference_steps": 5, "mag_ratios": [1.0] * 5}, "taylorseer": {"cache_interval": 2}}
    caches = [baseline for baseline in BASELINES if isinstance(baseline, StepCache)]
    made = {
        c.name: run_settings(Method("x", "x", 5, 5, {"cache": {"type": c.name, **options.get(c.name, {})}}))
        for c in caches
    }
    assert {name: type(given["cache"]).__name__ for name, given in made.items()} == {
        "teacache": "TeaCacheConfig",
        "first-block": "FirstBlockCacheConfig",
        "taylorseer": "TaylorSeerCacheConfig",
        "magcache": "MagCacheConfig",
    }
    assert made["taylorseer"]["cache"].taylor_factors_dtype == torch.float32


def test_a_solver_is_checked_and_runs_alone():
    def asked(**settings):
        return run_settings(Method("odd", "x", 5, 5, settings))

    assert asked(solver={"type": "unipc", "spacing": 1.4}) == {"solver": {"type": "unipc", "spacing": 1.4}}
    with pytest.raises(ConfigError, match="odd: solver type 'nope' is none of euler, heun, dpmsolver\\+\\+, unipc"):
        asked(solver="nope")
    with pytest.raises(ConfigError, match="odd: spacing=0: a number above 0"):
        asked(solver={"type": "unipc", "spacing": 0})
    with pytest.raises(ConfigError, match="odd: solver 'heun' has no option colour"):
        asked(solver={"type": "heun", "colour": 1})
    with pytest.raises(ConfigError, match="odd: another solver runs on the plain pipeline, take away threshold"):
        asked(solver={"type": "unipc"}, threshold=0.1)


def test_checks():
    base = Method("base", "base", 5, 5)
    with pytest.raises(ConfigError, match="unique"):
        check_methods([base, base])
    with pytest.raises(ConfigError, match="no method runs"):
        check_methods([base, Method("x", "x", 7, 9)])


def test_methods_file(tmp_path):
    path = tmp_path / "methods.json"
    path.write_text(json.dumps([{"name": "base", "kind": "base", "steps": 4, "reference": 4}]))
    assert read_methods(path) == [Method("base", "base", 4, 4)]
    path.write_text(json.dumps([{"name": "base"}]))
    with pytest.raises(ConfigError, match="methods="):
        read_methods(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"methods=.*utf-8"):
        read_methods(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_methods(tmp_path / "none.json")
