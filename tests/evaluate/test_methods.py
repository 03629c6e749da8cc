"""Schedules, method lists and their files."""

import json

import pytest

from ddit_rt import ConfigError, DDiTConfig, TeaCacheConfig
from ddit_rt.evaluate.methods import (
    Method,
    adapter_methods,
    cache_methods,
    check_methods,
    fitted_methods,
    fixed_methods,
    policy_methods,
    read_methods,
)
from ddit_rt.schedule.spacing import one_in, pattern


def test_patterns():
    assert one_in(10, 3, 2) == [1, 1, 1, 2, 2, 1, 2, 2, 1, 1]
    assert one_in(50, 6, 0)[:10] == [1] * 7 + [0] * 3
    assert pattern(10, [1, 0, 4], initial=2, tail=0) == [1, 1, 0, 4, 1, 0, 4, 1, 0, 4]
    assert pattern(3, [1, 0]) == [1, 1, 1]
    for steps in (1, 2, 5, 28):
        assert len(pattern(steps, [1, 0, 0, 2])) == steps


def test_standard_methods_are_valid_settings():
    methods = fixed_methods(50) + fixed_methods(28, full=False)
    methods += cache_methods(50, {"a": 0.2}, (1.0, 0.0)) + policy_methods(50, "ddit", "DDiT", {"2x": 0.01})
    for method in check_methods(methods):
        if method.settings is not None:
            DDiTConfig(**method.arguments())
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
    assert method.arguments()["cache"] == TeaCacheConfig(0.3, (2.0, 1.0))
    with pytest.raises(ConfigError, match="none of"):
        Method("x", "x", 5, 5, {"cache": {"type": "nope"}}).arguments()


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
    with pytest.raises(ConfigError, match="no such file"):
        read_methods(tmp_path / "none.json")
