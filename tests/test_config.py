import json
import threading

import numpy as np
import pytest
import torch

from ddit_rt import ConfigError, DDiTConfig, DDiTError, ScheduleError


@pytest.mark.parametrize("threshold", [-1e-9, -1, float("nan"), float("inf"), "0.1", None, True])
def test_a_bad_threshold_is_named(threshold):
    with pytest.raises(ConfigError, match=f"threshold={threshold!r}"):
        DDiTConfig(threshold=threshold)


@pytest.mark.parametrize("quantile", [-0.01, 1.01, float("nan"), "half", None])
def test_a_bad_quantile_is_named(quantile):
    with pytest.raises(ConfigError, match=f"quantile={quantile!r}"):
        DDiTConfig(quantile=quantile)


@pytest.mark.parametrize("order", [0, 4, -1, 1.5, "3", None])
def test_a_bad_order_is_named(order):
    with pytest.raises(ConfigError, match=f"order={order!r}"):
        DDiTConfig(order=order)


@pytest.mark.parametrize(
    "multiples", [(), (2, 4), (1, 3), (1, 1, 2), (1, 8), (0, 1), (1.0, 2.0), (True, 2), "124", 2, None]
)
def test_bad_multiples_are_named(multiples):
    with pytest.raises(ConfigError, match="multiples="):
        DDiTConfig(multiples=multiples)


def test_multiples_are_sorted():
    assert DDiTConfig(multiples=[4, 1, 2]).multiples == (1, 2, 4)


@pytest.mark.parametrize(
    "name, value",
    [
        ("coarse", "bilinear"),
        ("residual", "cubic"),
        ("positions", "learned"),
        ("backend", "cuda"),
        ("cuda_graphs", "yes"),
        ("cuda_graphs", None),
        ("max_consecutive_coarse", 0),
        ("max_consecutive_coarse", 1.5),
        ("skip_below", -1),
        ("max_consecutive_skipped", 0),
        ("cache", "fbc"),
        ("cache", 3),
    ],
)
def test_other_bad_values_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        DDiTConfig(**{name: value})


@pytest.mark.parametrize("schedule", ["1124", 3, {1: 2}, torch.ones(4)])
def test_a_schedule_is_a_sequence_or_a_callable(schedule):
    with pytest.raises(ScheduleError, match="one multiple per step"):
        DDiTConfig(schedule=schedule)


@pytest.mark.parametrize("entry", [3, -1, "2", None, 2.0])
def test_a_bad_entry_of_a_schedule_is_named(entry):
    with pytest.raises(ScheduleError, match=rf"schedule\[2\]={entry!r}"):
        DDiTConfig(schedule=[1, 2, entry])


def test_a_schedule_keeps_to_the_multiples():
    with pytest.raises(ScheduleError, match=r"schedule\[1\]=4 is not among multiples=\(1, 2\)"):
        DDiTConfig(multiples=(1, 2), schedule=[1, 4])


def test_whole_numbers_of_numpy_are_taken_and_written():
    config = DDiTConfig(
        multiples=np.array([1, 2, 4]),
        schedule=[np.int64(1), np.int32(2)],
        threshold=np.float32(0.5),
        order=np.int64(2),
    )
    assert config.schedule == (1, 2) and config.threshold == 0.5
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == [1, 2]


def test_an_unknown_setting_is_named_with_those_known():
    for make in (lambda: DDiTConfig.make({"tau": 1}, {}), lambda: DDiTConfig.make(None, {"tau": 1})):
        with pytest.raises(ConfigError, match=r"unknown setting 'tau'.*threshold"):
            make()
    with pytest.raises(ConfigError, match="config=3"):
        DDiTConfig.make(3, {})


def test_overrides_win_over_the_config():
    base = DDiTConfig(threshold=0.1, order=2)
    assert DDiTConfig.make(base, {"order": 1}) == DDiTConfig(threshold=0.1, order=1)
    assert DDiTConfig.make({"threshold": 0.1}, {"order": 1}) == DDiTConfig(threshold=0.1, order=1)
    assert DDiTConfig.make(base, {}) is base
    assert DDiTConfig.make(None, {}) == DDiTConfig()
    with pytest.raises(ConfigError, match="order=9"):
        DDiTConfig.make(base, {"order": 9})


def test_every_config_error_is_a_ddit_error_and_a_value_error():
    for kind in (ConfigError, ScheduleError):
        assert issubclass(kind, DDiTError) and issubclass(kind, ValueError)


def test_to_dict_takes_a_callable_schedule_that_cannot_be_copied():
    class Scheduler:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, index, patch_std):
            return 1

        def __repr__(self):
            return "Scheduler()"

    assert DDiTConfig(schedule=Scheduler()).to_dict()["schedule"] == "Scheduler()"


def test_the_defaults_are_the_papers():
    config = DDiTConfig()
    assert (config.multiples, config.threshold, config.quantile, config.order) == ((1, 2, 4), 1e-3, 0.4, 3)
