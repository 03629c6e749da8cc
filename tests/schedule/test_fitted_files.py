"""Files of fitted schedules: whatever is in one, it is a schedule or an error of ours."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddit_rt import ConfigError, FittedSchedule, ScheduleError, hub
from ddit_rt.settings import MAX_FILE_BYTES

GOOD = FittedSchedule([1, 1, 2, 0, 4, 1], 1.9, 41.5, 3, [9.0, 4.0, 2.5, 2.0, 1.5, 1.0])
VALUES = json.loads(json.dumps(GOOD.__dict__))
TEXT = json.dumps(VALUES).encode()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules") / "s.json"


def load(path: Path, data: bytes) -> FittedSchedule | None:
    """What the file gives: a schedule that can be saved and loaded again, or None for an error that names the file."""
    path.write_bytes(data)
    try:
        found = FittedSchedule.load(path)
    except (ConfigError, ScheduleError) as error:
        assert str(path) in str(error) and len(str(error)) < 1000
        return None
    assert set(found.schedule) <= {0, 1, 2, 4} and 0 < found.speedup < math.inf
    assert FittedSchedule.load(found.save(path)) == found
    return found


def test_what_was_saved_is_loaded(tmp_path):
    for schedule in (GOOD, replace(GOOD, psnr=math.inf, sensitivity=[])):
        assert schedule.save(tmp_path) == tmp_path / "schedule.json"
        assert FittedSchedule.load(tmp_path) == FittedSchedule.load(tmp_path / "schedule.json") == schedule


@settings(deadline=None)
@given(st.integers(0, len(TEXT) - 1))
def test_cut_short(path, length):
    assert load(path, TEXT[:length]) is None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(TEXT) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(path, flips):
    data = bytearray(TEXT)
    for place, value in flips:
        data[place] = value
    load(path, bytes(data))


numbers = st.integers() | st.integers(2**31, 2**60) | st.floats() | st.sampled_from([10**400, -(2**63), 1e308])
plain = st.none() | st.booleans() | numbers | st.text(max_size=5)
wrong = plain | st.lists(plain, max_size=8) | st.dictionaries(st.text(max_size=3), plain, max_size=3)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from([*VALUES, "more"]), wrong, min_size=1, max_size=3),
    st.sets(st.sampled_from([*VALUES]), max_size=2),
)
def test_wrong_values(path, changes, missing):
    values = {name: value for name, value in {**VALUES, **changes}.items() if name not in missing}
    found = load(path, json.dumps(values).encode())
    required = {"schedule", "speedup", "psnr", "prompts"}
    if "more" in values or not required <= set(values) or not isinstance(values["schedule"], list):
        assert found is None


@settings(deadline=None)
@given(wrong)
def test_other_json(path, value):
    assert load(path, json.dumps(value).encode()) is None


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"schedule": []}, ScheduleError, r"schedule=\[\]"),
        ({"schedule": [1, 3]}, ScheduleError, r"schedule\[1\]=3"),
        ({"schedule": [1, "2"]}, ConfigError, "schedule: 1"),
        ({"schedule": [1, 2.0]}, ConfigError, "schedule: 1"),
        ({"schedule": [1, True]}, ConfigError, "schedule: 1"),
        ({"schedule": 2**60}, ConfigError, "schedule: "),
        ({"speedup": 0}, ConfigError, "speedup=0"),
        ({"speedup": math.nan}, ConfigError, "speedup=nan"),
        ({"speedup": "2"}, ConfigError, "speedup: "),
        ({"psnr": math.nan}, ConfigError, "psnr=nan"),
        ({"prompts": -1}, ConfigError, "prompts=-1"),
        ({"prompts": 2**60}, ConfigError, "prompts="),
        ({"sensitivity": [1.0]}, ConfigError, "sensitivity has 1 entries, schedule has 6"),
        ({"sensitivity": [1.0, 1.0, math.inf, 1.0, 1.0, 1.0]}, ConfigError, r"sensitivity\[2\]=inf"),
        ({"reference": "best"}, ConfigError, "reference='best'"),
        ({"psnr_converged": math.nan}, ConfigError, "psnr_converged=nan"),
        ({"sigmas": [1.0, 0.5, 0.0], "reference": "converged"}, ConfigError, "sigmas has 3 entries, schedule has 6"),
        ({"sigmas": [1.0, 0.9, 0.7, 0.8, 0.3, 0.2, 0.0], "reference": "converged"}, ConfigError, r"sigmas\[3\]=0.8"),
        ({"sigmas": [1.5, 0.9, 0.8, 0.7, 0.3, 0.2, 0.0], "reference": "converged"}, ConfigError, r"sigmas\[0\]=1.5"),
        ({"sigmas": [1.0, 0.9, 0.8, 0.7, 0.3, 0.2, 0.0]}, ConfigError, "reference='plain'"),
        ({"sigmas": [1.0] * 7, "reference": "converged"}, ConfigError, "all of them are 1.0"),
        ({"sigmas": [0.0] * 7, "reference": "converged"}, ConfigError, "all of them are 0.0"),
        ({"psnr": -math.inf}, ConfigError, "psnr=-inf"),
        ({"more": 1}, ConfigError, "more"),
    ],
)
def test_a_wrong_value_is_named(path, change, error, match):
    path.write_text(json.dumps({**VALUES, **change}))
    with pytest.raises(error, match=match) as caught:
        FittedSchedule.load(path)
    assert str(path) in str(caught.value)


def test_a_schedule_is_checked_when_it_is_made():
    with pytest.raises(ScheduleError, match=r"schedule\[1\]=3"):
        FittedSchedule([1, 3], 2.0, 40.0, 1)
    with pytest.raises(ConfigError, match="speedup=nan"):
        FittedSchedule([1, 2], math.nan, 40.0, 1)


def test_deep_and_large_files(path):
    assert load(path, b"[" * 100_000) is None
    assert load(path, b'{"schedule": ' + b"[" * 100_000) is None
    with path.open("wb") as file:
        file.truncate(2**34)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="larger than"):
        FittedSchedule.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    path.unlink()
    assert peak < 4 * MAX_FILE_BYTES


def test_hub(monkeypatch, tmp_path):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return f"address of {repo_id}"

    def download(repo_id, name, revision=None):
        if (repo_id, revision) != ("someone/schedule", "v2"):
            raise OSError("not found")
        file = tmp_path / f"hub-{name}"
        file.write_bytes(uploaded[name])
        return str(file)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert GOOD.push_to_hub("someone/schedule", private=True, token="t") == "address of someone/schedule"
    assert uploaded["repo"] == ("someone/schedule", True, True) and uploaded["token"] == "t"
    assert set(uploaded) == {"repo", "token", "schedule.json", "README.md"}
    assert b'FittedSchedule.load("someone/schedule")' in uploaded["README.md"]
    assert FittedSchedule.load("someone/schedule", revision="v2") == GOOD
    with pytest.raises(ConfigError, match=r"nobody/nothing.*neither a local path nor"):
        FittedSchedule.load("nobody/nothing")
    with pytest.raises(ConfigError, match="no such file"):
        FittedSchedule.load("folder/none.json")
