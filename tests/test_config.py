import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers import FirstBlockCacheConfig
from hypothesis import given, settings
from hypothesis import strategies as st

import ddit_rt
from ddit_rt import ConfigError, DDiTConfig, DDiTError, FittedSchedule, ScheduleError, TeaCacheConfig


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


@pytest.mark.parametrize(
    "schedule", ["1124", 3, {1: 2}, torch.ones(4), np.ones(4), np.array([[1, 2], [1, 2]]), np.int64(2), torch.tensor(2)]
)
def test_a_schedule_is_a_sequence_or_a_callable(schedule):
    with pytest.raises(ScheduleError, match="one multiple per step"):
        DDiTConfig(schedule=schedule)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_an_array_of_whole_numbers_is_a_schedule(make):
    config = DDiTConfig(schedule=make([1, 1, 2, 0]))
    assert config == DDiTConfig(schedule=[1, 1, 2, 0]) and type(config.schedule[0]) is int
    with pytest.raises(ScheduleError, match=r"schedule\[1\]=3 is not among"):
        DDiTConfig(schedule=make([1, 3]))


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


def test_settings_are_values():
    config = DDiTConfig(threshold=0.1, schedule=[1, 2], cache="teacache")
    same = DDiTConfig(threshold=0.1, schedule=(1, 2), cache=TeaCacheConfig())
    assert config == same and hash(config) == hash(same) and config != DDiTConfig()
    assert config == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config)
    with pytest.raises(ConfigError, match=r"threshold=3.*replace"):
        config.threshold = 3
    assert config.replace(threshold=3) == DDiTConfig(threshold=3, schedule=[1, 2], cache="teacache")
    with pytest.raises(ConfigError, match="threshold=-3"):
        config.replace(threshold=-3)
    with pytest.raises(ConfigError, match="unknown setting 'tau'"):
        config.replace(tau=3)


@pytest.mark.parametrize("name, value", [("merge_adapter", 1), ("max_graphs", 0), ("threshold", 10**400), ("tau", 1)])
def test_further_bad_values_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        DDiTConfig(**{name: value})


@pytest.mark.parametrize("bad", [{"retention": 1}, {"coefficients": 3}, {"threshold": "much"}])
def test_bad_settings_of_teacache_are_named(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ConfigError, match=f"TeaCacheConfig.{name}={value!r}"):
        TeaCacheConfig(**bad)
    with pytest.raises(ConfigError, match=f"TeaCacheConfig.{name}={value!r}"):
        DDiTConfig(cache={"type": "teacache", **bad})


def test_teacache_as_a_mapping():
    mapping = {"type": "teacache", "threshold": 0.4, "coefficients": [2, 1.0]}
    assert DDiTConfig(cache=mapping).cache == TeaCacheConfig(0.4, (2.0, 1.0))
    with pytest.raises(ConfigError, match=r"unknown setting 'rate'.*TeaCacheConfig has coefficients"):
        DDiTConfig(cache={"type": "teacache", "rate": 1})
    with pytest.raises(ConfigError, match=r"cache=.*FirstBlockCacheConfig.*only Python can pass"):
        DDiTConfig(cache={"type": "FirstBlockCacheConfig"})


def test_the_settings_load_without_torch():
    code = "import sys, ddit_rt.config; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_json_schema_describes_every_field():
    schema = DDiTConfig.model_json_schema()
    assert set(schema["properties"]) == set(DDiTConfig.model_fields)
    assert all(entry["description"] for entry in schema["properties"].values())
    assert schema["properties"]["quantile"]["maximum"] == 1
    assert "band-split" in schema["properties"]["coarse"]["enum"]
    assert schema["properties"]["cache"]["anyOf"][1]["properties"]["threshold"]


# -- files --------------------------------------------------------------------------------------------------------

CONFIGS = [
    DDiTConfig(),
    DDiTConfig(threshold=1e-7, schedule=[1, 2, 4, 0], coarse="naive", max_consecutive_coarse=None, cuda_graphs=False),
    DDiTConfig(multiples=(1, 2), cache=TeaCacheConfig(0.3, (2.0, 1e-9), True), max_consecutive_coarse=3),
]


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json", "folder/c.yaml"])
@pytest.mark.parametrize("config", CONFIGS)
def test_saved_settings_are_loaded(tmp_path, config, name):
    path = config.save(tmp_path / name)
    assert path == tmp_path / name
    assert DDiTConfig.load(path) == DDiTConfig.load(str(path)) == config
    assert DDiTConfig.make(path, {"max_graphs": 3}) == config.replace(max_graphs=3)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_hand_written_file(tmp_path):
    path = write(
        tmp_path / "ddit.yaml", "# mine\nthreshold: 1e-3\nmultiples: [1, 2]\ncuda_graphs: off\ncache: teacache\n"
    )
    config = DDiTConfig(threshold=1e-3, multiples=(1, 2), cuda_graphs=False, cache="teacache")
    assert DDiTConfig.load(path) == config
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert DDiTConfig.load(path) == config


@pytest.mark.parametrize(
    "name, text, error, match",
    [
        ("c.yaml", "tau: 1\n", ConfigError, r"unknown setting 'tau'.*threshold"),
        ("c.yaml", "1: 1\n", ConfigError, "unknown setting 1"),
        ("c.yaml", "threshold: high\n", ConfigError, r"threshold='high': τ is a number"),
        ("c.yaml", "threshold: .nan\n", ConfigError, "threshold=nan"),
        ("c.yaml", "order: 2.0\n", ConfigError, "order=2.0"),
        ("c.yaml", "schedule: [1, 3]\n", ScheduleError, r"schedule\[1\]=3"),
        ("c.yaml", "schedule: '1124'\n", ScheduleError, "one multiple per step"),
        ("c.yaml", "cache: FirstBlockCacheConfig\n", ConfigError, "only Python can pass"),
        ("c.yaml", "- 1\n", ConfigError, r"holds \[1\]: write a mapping"),
        ("c.yaml", "", ConfigError, "write a mapping"),
        ("c.yaml", "a: [1\n", ConfigError, "holds no YAML"),
        ("c.yaml", "threshold: 2020-13-45\n", ConfigError, "holds no YAML"),
        ("c.yaml", "threshold: !!bool maybe\n", ConfigError, "holds no YAML"),
        ("c.yaml", "threshold: !!python/object:os.system {}\n", ConfigError, "holds no YAML"),
        ("c.yaml", "cache: &a [*a]\n", ConfigError, "aliases"),
        ("c.yaml", "threshold: " + "[" * 2000 + "\n", ConfigError, "holds no YAML"),
        ("c.json", "{", ConfigError, "holds no JSON"),
        ("c.json", "[" * 20000, ConfigError, "holds no JSON"),
        ("c.json", '{"threshold": NaN}', ConfigError, "threshold=nan"),
        ("c.json", '{"threshold": 1' + "0" * 5000 + "}", ConfigError, "holds no JSON"),
        ("c.json", '{"quantile": 2}', ConfigError, "quantile=2"),
        ("c.json", "null", ConfigError, "holds None"),
        ("c.toml", "", ConfigError, "yaml"),
        ("c", "", ConfigError, "yaml"),
    ],
)
def test_a_bad_file_is_named_with_its_setting(tmp_path, name, text, error, match):
    path = write(tmp_path / name, text)
    with pytest.raises(error, match=match) as caught:
        DDiTConfig.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1500


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml.*no such file"):
        DDiTConfig.load(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder.yaml.*no such file"):
        DDiTConfig.load(tmp_path / "folder.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        DDiTConfig.load("a\0b.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml.*UTF-8"):
        DDiTConfig.load(tmp_path / "latin.yaml")
    for name in ("large.yaml", "large.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(ConfigError, match=rf"{name}.*larger than"):
            DDiTConfig.load(tmp_path / name)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_gives_a_config_or_an_error_of_ours(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    for ending in ("yaml", "json"):
        path = folder / f"fuzz.{ending}"
        path.write_bytes(data)
        try:
            assert isinstance(DDiTConfig.load(path), DDiTConfig)
        except DDiTError as error:
            assert str(path) in str(error)


known = st.sampled_from(sorted(DDiTConfig.model_fields))
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "line", "delta", "a.json"])
nested = plain | st.lists(plain, max_size=4) | st.dictionaries(st.sampled_from(["type", "threshold"]), plain)


@settings(deadline=None)
@given(st.dictionaries(known, nested, max_size=3))
def test_any_value_gives_a_config_or_an_error_that_names_the_setting(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        config = DDiTConfig.load(path)
    except DDiTError as error:
        assert any(name in str(error) for name in values)
    else:
        assert DDiTConfig.load(config.save(path.with_name("again.json"))) == config


def test_what_no_file_can_hold_is_named(tmp_path):
    for name, value in (("schedule", lambda index, patch_std: 1), ("cache", FirstBlockCacheConfig())):
        with pytest.raises(ConfigError, match=rf"{name}=.* cannot be saved.*replace\({name}=None\)"):
            DDiTConfig(**{name: value}).save(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"c.toml.*\.yaml"):
        DDiTConfig().save(tmp_path / "c.toml")
    assert not list(tmp_path.iterdir())


def test_a_schedule_is_read_from_its_file(tmp_path, monkeypatch):
    schedule = FittedSchedule([1, 1, 2, 0], 2.0, 40.0, 1)
    path = schedule.save(tmp_path / "schedules" / "s.json")
    assert DDiTConfig(schedule=path).schedule == DDiTConfig(schedule=str(path)).schedule == (1, 1, 2, 0)
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "schedules" / "c.yaml", "schedule: s.json\n")
    assert DDiTConfig.load(config) == DDiTConfig(schedule=[1, 1, 2, 0])
    with pytest.raises(ConfigError, match=r"schedule='none.json': there is no such file"):
        DDiTConfig(schedule="none.json")
    with pytest.raises(ScheduleError, match=r"s.json: schedule\[2\]=2"):
        DDiTConfig(multiples=(1,), schedule=path)
    for text, error, match in (
        ("[1, 2]", ConfigError, "no entry 'schedule'"),
        ('{"schedule": 3}', ScheduleError, "one multiple per step"),
        ('{"schedule": [1, "2"]}', ScheduleError, r"schedule\[1\]='2'"),
    ):
        write(path, text)
        with pytest.raises(error, match=match) as caught:
            DDiTConfig(schedule=path)
        assert "s.json" in str(caught.value)


def test_accelerate_takes_files(tmp_path):
    schedule = FittedSchedule([1, 2] * 4, 1.5, 40.0, 1).save(tmp_path / "schedule.json")
    config = write(tmp_path / "ddit.yaml", "schedule: schedule.json\ncoarse: naive\n")
    pipe = tiny.flux()
    pictures = []
    for options in ({"config": str(config)}, {"schedule": str(schedule), "coarse": "naive"}):
        ddit_rt.accelerate(pipe, **options)
        pictures.append(pipe(**tiny.flux_inputs()).images)
        assert ddit_rt.report(pipe).schedule == [1, 2] * 4
    assert torch.equal(*pictures)
    FittedSchedule([1, 2], 1.5, 40.0, 1).save(schedule)
    ddit_rt.accelerate(pipe, config=config)
    with pytest.raises(ScheduleError, match="the schedule has 2 entries, this run has 8"):
        pipe(**tiny.flux_inputs())
