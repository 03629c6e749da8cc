"""The store of fitted schedules: what it finds, and that nothing on the disk can break it."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ddit_rt import ConfigError, FittedSchedule
from ddit_rt.schedule import CallKey, ScheduleStore, StoredSchedule, cache_directory

KEY = CallKey("0123456789abcdef", "Euler(shift=3)", 4, "none", 256, 1)
OTHER = replace(KEY, guidance="cfg")


def fitted(speedup: float = 2.0, psnr: float = 40.0) -> FittedSchedule:
    return FittedSchedule([1, 1, 0, 1], speedup, psnr, 4)


@pytest.fixture
def store(tmp_path):
    return ScheduleStore(tmp_path / "store")


# -- finding --------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_found_by_its_key_alone(store):
    one = FittedSchedule([1, 2, 0, 4], 2.0, math.inf, 3, [3.0, 2.0, 1.5, 1.0])
    path = store.save(KEY, one, "owner/model")
    assert path is not None and path.is_relative_to(store.root)
    assert store.find(KEY, speedup=2.0) == one
    (entry,) = store.entries(KEY)
    assert (entry.key, entry.fitted, entry.name) == (KEY, one, "owner/model")
    assert abs((datetime.now(UTC) - entry.saved).total_seconds()) < 60
    for changed in [
        {"model": "f" * 16}, {"scheduler": "Euler(shift=1)"}, {"steps": 5}, {"guidance": "cfg"}, {"tokens": 512},
        {"frames": 2}, {"reference": "converged"}, {"adapter": "a" * 32},
    ]:  # fmt: skip
        assert store.find(replace(KEY, **changed), speedup=2.0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        FittedSchedule([1, 1, 0], 2.0, 45.0, 4),
        FittedSchedule([0, 1, 0, 1], 2.0, 45.0, 4),
        FittedSchedule([1, 0, 0, 1], 2.0, 45.0, 4, reference="converged"),
    ],
    ids=["length", "begins", "aim"],
)
def test_what_serves_no_call_of_its_key_is_skipped(store, wrong, caplog):
    store.save(KEY, wrong)
    store.save(KEY, fitted())
    assert store.find(KEY, speedup=2.0) == fitted()
    (said,) = [record.message for record in caplog.records]
    assert "serves no call of 4 steps that aims at plain" in said


def test_schedules_of_sizes_that_a_call_has_not_are_left_aside(store):
    store.save(KEY, FittedSchedule([1, 2, 0, 4], 3.0, 50.0, 3))
    assert store.find(KEY, speedup=2.0, multiples=(1, 2)) is None
    store.save(KEY, FittedSchedule([1, 2, 0, 1], 2.0, 40.0, 3))
    assert store.find(KEY, speedup=2.0, multiples=(1, 2)).schedule == [1, 2, 0, 1]
    assert store.find(KEY, speedup=2.0).schedule == [1, 2, 0, 4]


def test_schedules_that_are_much_faster_than_wanted_can_be_left_aside(store):
    for speedup, psnr in [(2.1, 40.0), (3.1, 45.0)]:
        store.save(KEY, fitted(speedup, psnr))
    assert store.find(KEY, speedup=2.0).speedup == 3.1
    assert store.find(KEY, speedup=2.0, fastest=2.3).speedup == 2.1
    assert store.find(KEY, speedup=2.5, fastest=2.9) is None


def test_the_key_can_be_read_in_the_file(store):
    content = json.loads(store.save(KEY, fitted()).read_text())
    assert content["key"] == {
        "model": "0123456789abcdef", "scheduler": "Euler(shift=3)", "steps": 4, "guidance": "none", "tokens": 256,
        "frames": 1, "reference": "plain", "adapter": "", "costs": "flops", "machine": "",
    }  # fmt: skip
    assert content["format"] == 1 and content["fitted"]["schedule"] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"speedup": 2.0}, (2.5, 45.0)),  # faster and nearer than what was asked for
        ({"speedup": 2.6}, (3.0, 38.0)),
        ({"speedup": 3.09}, (3.0, 38.0)),  # 3 % short
        ({"speedup": 3.1}, (4.0, 30.0)),
        ({"speedup": 4.2}, None),
        ({"quality": 39.0}, (2.5, 45.0)),
        ({"quality": 38.1}, (3.0, 38.0)),  # 0.1 dB short
        ({"quality": 38.2}, (2.5, 45.0)),
        ({"quality": 45.5}, None),
        ({"quality": 10}, (4.0, 30.0)),
    ],
)
def test_which_schedule_is_best(store, wanted, found):
    for speedup, psnr in [(1.9, 44.0), (2.0, 40.0), (2.5, 45.0), (3.0, 38.0), (4.0, 30.0)]:
        store.save(KEY, fitted(speedup, psnr))
    best = store.find(KEY, **wanted)
    assert (best and (best.speedup, best.psnr)) == found


def test_of_equals_the_faster_and_the_nearer_are_best(store):
    for speedup, psnr in [(2.0, 40.0), (2.2, 40.0), (2.2, 39.0)]:
        store.save(KEY, fitted(speedup, psnr))
    assert store.find(KEY, speedup=2.0) == store.find(KEY, quality=38.0) == fitted(2.2, 40.0)


@dataclass(frozen=True)
class Measured(FittedSchedule):
    psnr_converged: float | None = None


def test_nearness_to_the_converged_pictures_counts_where_it_is_asked_for():
    now = datetime.now(UTC)
    converged = replace(KEY, reference="converged")
    one = Measured([1, 1, 0, 1], 2.0, 40.0, 4, psnr_converged=33.0)
    assert StoredSchedule(KEY, one, now).quality == 40.0
    assert StoredSchedule(converged, one, now).quality == 33.0
    assert StoredSchedule(converged, replace(one, psnr_converged=None), now).quality == 40.0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "speedup=None, quality=None: give one"),
        ({"speedup": 2.0, "quality": 40.0}, "give one of the two"),
        ({"speedup": 1.0}, "speedup=1.0"),
        ({"quality": math.nan}, "quality=nan"),
    ],
)
def test_targets_that_are_none(store, targets, message):
    with pytest.raises(ConfigError, match=message):
        store.find(KEY, **targets)


def test_shipped_schedules_are_found_and_never_written(store, tmp_path):
    shipped = ScheduleStore(tmp_path / "shipped")
    shipped.save(KEY, fitted(2.0, 41.0))
    before = sorted((tmp_path / "shipped").rglob("*"))
    both = ScheduleStore(store.root, [tmp_path / "none", shipped.root])
    assert both.find(KEY, speedup=2.0) == fitted(2.0, 41.0) and both.own_entries() == []
    both.save(KEY, fitted(2.0, 40.0))
    assert both.find(KEY, speedup=2.0) == fitted(2.0, 41.0)
    assert [entry.fitted.psnr for entry in both.entries(KEY)] == [40.0, 41.0]
    assert both.clear() == 1 and both.find(KEY, speedup=2.0) == fitted(2.0, 41.0)
    assert sorted((tmp_path / "shipped").rglob("*")) == before


def test_the_same_schedule_twice_is_one_file(store):
    assert store.save(KEY, fitted()) == store.save(KEY, fitted())
    assert len(store.entries(KEY)) == 1


def test_clear_removes_schedules_and_nothing_else(store):
    for key in (KEY, OTHER):
        store.save(key, fitted())
    (store.root / KEY.directory / "broken.json").write_text("{")
    (store.root / KEY.directory / ".left.tmp").write_text("{")
    (store.root / "notes.txt").write_text("mine")
    (store.root / OTHER.directory / "notes.txt").write_text("mine")
    assert len(store.own_entries()) == 2
    assert store.clear() == 3 and store.own_entries() == []
    left = [path for path in store.root.rglob("*") if path.is_file()]
    assert sorted(left) == sorted([store.root / "notes.txt", store.root / OTHER.directory / "notes.txt"])
    assert store.clear() == 0
    for path in left:
        path.unlink()
    assert store.clear() == 0 and not store.root.exists()


# -- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DDIT_RT_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"DDIT_RT_CACHE": "~/b"}, "/home/me/b"),
        ({"DDIT_RT_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/ddit_rt"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/ddit_rt"),
        ({}, "/home/me/.cache/ddit_rt"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="paths of POSIX")
def test_the_folder_follows_the_environment(monkeypatch, variables, expected):
    for name in ("DDIT_RT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)
    assert ScheduleStore().root == Path(expected) / "schedules"


def test_without_a_home_directory_the_variable_is_named(monkeypatch):
    monkeypatch.setenv("DDIT_RT_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(ConfigError, match="Set DDIT_RT_CACHE"):
        cache_directory()


# -- a disk with something wrong ------------------------------------------------------------------------------------


def broken(store: ScheduleStore, name: str, text: str | bytes) -> Path:
    path = store.root / KEY.directory / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("what", ["half", "empty", "binary", "other json", "later format", "wrong value", "huge"])
def test_a_file_that_is_no_schedule_is_skipped_with_one_warning(store, caplog, what):
    good = store.save(KEY, fitted()).read_text()
    texts = {
        "half": good[: len(good) // 2],
        "empty": "",
        "binary": b"\xff\x00\xfe",
        "other json": '{"a": [1]}',
        "later format": good.replace('"format": 1', '"format": 2'),
        "wrong value": good.replace('"speedup": 2.0', '"speedup": -2.0'),
        "huge": good + " " * 2**19,
    }
    assert what in ("half", "empty") or texts[what] != good
    path = broken(store, "9.00x-broken.json", texts[what])
    for _ in range(3):
        assert [entry.fitted for entry in ScheduleStore(store.root).entries(KEY)] == [fitted()]
    (text,) = warnings(caplog)
    assert str(path) in text and "skipped" in text


def test_a_file_in_another_calls_folder_is_skipped(store, caplog):
    path = broken_from = store.save(OTHER, fitted(9.0, 90.0))
    store.save(KEY, fitted())
    path = broken(store, "moved.json", broken_from.read_bytes())
    assert store.find(KEY, speedup=2.0) == fitted()
    (text,) = warnings(caplog)
    assert str(path) in text


def test_a_folder_in_place_of_a_file_is_skipped(store, caplog):
    store.save(KEY, fitted())
    (store.root / KEY.directory / "a.json").mkdir()
    assert store.find(KEY, speedup=2.0) == fitted() and len(warnings(caplog)) == 1


def test_a_folder_that_cannot_be_written_gives_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")  # root may write into read-only folders, but not into a file
    store = ScheduleStore(tmp_path / "file" / "store")
    assert store.save(KEY, fitted()) is None and store.save(OTHER, fitted()) is None
    (text,) = warnings(caplog)
    assert str(store.root) in text
    assert store.find(KEY, speedup=2.0) is None and store.own_entries() == [] and store.clear() == 0


@contextmanager
def no_superuser():
    """Root may write into read-only folders: gives that up for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder_is_read_and_gives_one_warning(caplog):
    with tempfile.TemporaryDirectory() as directory:  # tmp_path is closed to other users
        os.chmod(directory, 0o755)
        store = ScheduleStore(Path(directory) / "store")
        store.save(KEY, fitted())
        folder = store.root / KEY.directory
        folder.chmod(0o555)
        with no_superuser():
            assert store.save(KEY, fitted(3.0)) is None and store.save(KEY, fitted(4.0)) is None
            assert store.find(KEY, speedup=2.0) == fitted()
            with pytest.raises(PermissionError):
                store.clear()
        (text,) = warnings(caplog)
        assert str(store.root) in text
        folder.chmod(0o755)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_or_read_only_disk_leaves_no_half_file(store, caplog, monkeypatch, call):
    store.save(KEY, fitted())
    before = sorted(store.root.rglob("*"))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert store.save(KEY, fitted(3.0)) is None and store.save(KEY, fitted(4.0)) is None
    (text,) = warnings(caplog)
    assert "No space left" in text and str(store.root) in text
    assert sorted(store.root.rglob("*")) == before and store.find(KEY, speedup=2.0) == fitted()


# -- several processes ----------------------------------------------------------------------------------------------

SPAWN = multiprocessing.get_context("spawn")
ROUNDS = 40
LONG = replace(KEY, steps=9000)
SHARED = FittedSchedule([1] * 9000, 1.5, 20.0, 4, [1.25] * 9000)  # long: a write that is not atomic takes a while


def write_and_read(root: Path, writer: int, start, failures) -> None:
    """Saves many schedules, and after each checks that all of its own are there and every file is whole."""
    caught = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())
    logging.getLogger("ddit_rt").addHandler(handler)
    store = ScheduleStore(root)
    start.wait()
    for i in range(ROUNDS):
        store.save(KEY, fitted(2.0 + i, 30.0 + writer))
        store.save(LONG, SHARED)  # what the other process is reading or writing right now
        if store.find(LONG, speedup=1.5) != SHARED:
            failures.put(f"writer {writer} misses the shared schedule in round {i}")
        own = {entry.fitted.speedup for entry in store.entries(KEY) if entry.fitted.psnr == 30.0 + writer}
        if own != {2.0 + j for j in range(i + 1)}:
            failures.put(f"writer {writer} misses {i + 1 - len(own)} after round {i}")
    for text in caught:
        failures.put(text)


def test_processes_that_write_and_read_at_once_lose_nothing(store):
    start, failures = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [SPAWN.Process(target=write_and_read, args=(store.root, i, start, failures)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert len(store.entries(KEY)) == 2 * ROUNDS
    assert not list(store.root.rglob("*.tmp"))


def save_forever(root: Path, started) -> None:
    store = ScheduleStore(root)
    for i in range(10**6):
        store.save(KEY, fitted(2.0 + i % 50, 40.0 + i))
        started.set()


def die_in_mid_write(root: Path) -> None:
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # written, not in place yet
    ScheduleStore(root).save(KEY, fitted(9.0))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_writer_killed_in_mid_write_leaves_the_store_usable(store, caplog):
    store.save(KEY, fitted())
    process = multiprocessing.get_context("fork").Process(target=die_in_mid_write, args=(store.root,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (left,) = store.root.rglob("*.tmp")
    assert [entry.fitted for entry in store.entries(KEY)] == [fitted()] and not warnings(caplog)
    store.save(KEY, fitted(3.0))
    assert left.exists()  # its writer could still be at work
    old = time.time() - 4000
    os.utime(left, (old, old))
    store.save(KEY, fitted(4.0))
    assert not left.exists()
    assert [entry.fitted.speedup for entry in store.entries(KEY)] == [2.0, 3.0, 4.0]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_writer_killed_at_any_time_leaves_whole_files(store, caplog):
    started = SPAWN.Event()
    process = SPAWN.Process(target=save_forever, args=(store.root, started))
    process.start()
    assert started.wait(120)
    time.sleep(0.3)
    process.kill()
    process.join(60)
    files = list(store.root.rglob("*.json"))
    assert files and len(store.entries(KEY)) == len(files) and not warnings(caplog)
    assert len(list(store.root.rglob("*.tmp"))) <= 1


def test_a_store_cleared_under_a_writer_is_made_anew(store, monkeypatch):
    real, cleared = os.replace, []

    def replace_after_clear(source, target):
        if not cleared:
            cleared.append(store.clear())
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_after_clear)
    assert store.save(KEY, fitted()) is not None
    assert cleared == [0] and store.find(KEY, speedup=2.0) == fitted()
