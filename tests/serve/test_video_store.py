"""Video jobs: every change of state, several processes, kills at bad moments, full disks, lists."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt import ConfigError
from ddit_rt.serve.video_database import VideoDatabase
from ddit_rt.serve.video_store import QueueFullError, StorageError, VideoJob, VideoNotFoundError, VideoPage, VideoStore

KEEP = 1000.0
ELSEWHERE = "video_" + "0" * 38


class Clock:
    """Stands still until it is set."""

    def __init__(self, now: float = 5000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[VideoStore]:
    with VideoStore(tmp_path / "videos", KEEP, clock) as store:
        yield store


def queue(store: VideoStore, prompt: str = "a fox", owner: str = "") -> VideoJob:
    return store.create({"prompt": prompt, "steps": 8}, "demo", "128x128", "4", prompt, owner)


def finish(store: VideoStore, files: tuple[str, ...] = ("video.mp4",)) -> VideoJob:
    job = store.claim()
    assert job is not None
    for name in files:
        assert store.write(job.id, name, b"frames")
    assert store.complete(job.id, files, {"speedup": 3.0})
    return store.get(job.id, job.owner)


def on_disk(folder: Path) -> list[str]:
    """Everything below the folder of files, hidden and partial files among it."""
    return sorted(str(path.relative_to(folder / "files")) for path in (folder / "files").rglob("*"))


# -- states ---------------------------------------------------------------------------------------------------------


def test_a_job_is_queued_then_in_progress_then_completed(store: VideoStore, clock: Clock) -> None:
    job = queue(store)
    assert job == VideoJob(
        id=job.id, model="demo", status="queued", progress=0, created_at=5000, completed_at=None, expires_at=None,
        seconds="4", size="128x128", prompt="a fox", error=None, ddit=None, request={"prompt": "a fox", "steps": 8},
        attempts=0, owner="", files=(),
    )  # fmt: skip
    assert job.id.startswith("video_") and store.get(job.id) == job and not store.is_wanted(job.id)

    running = store.claim()
    assert running == replace(job, status="in_progress", attempts=1) and store.is_wanted(job.id)
    assert store.claim() is None
    assert store.progress(job.id, 40) and store.get(job.id).progress == 40

    clock.now = 5060.5
    path = store.write(job.id, "video.mp4", b"frames")
    assert store.path(job.id, "", "video.mp4") is None  # not before it is completed
    assert store.complete(job.id, ["video.mp4"], {"speedup": 3.0})
    done = store.get(job.id)
    assert done == replace(
        job, status="completed", progress=100, attempts=1, completed_at=5060, expires_at=6060, files=("video.mp4",),
        ddit={"speedup": 3.0},
    )  # fmt: skip
    assert path is not None and path == store.path(job.id, "", "video.mp4") and path.read_bytes() == b"frames"
    assert store.path(job.id, "", "other.mp4") is None


def test_a_failed_job_has_a_reason_no_files_and_an_end(store: VideoStore, tmp_path: Path) -> None:
    job = queue(store)
    store.claim()
    store.write(job.id, "video.mp4", b"frames")
    assert store.fail(job.id, "out_of_memory", "Too large for this GPU.")
    failed = store.get(job.id)
    assert failed.status == "failed" and failed.error == {"code": "out_of_memory", "message": "Too large for this GPU."}
    assert failed.completed_at is None and failed.expires_at == 6000 and failed.files == ()
    assert on_disk(tmp_path / "videos") == []


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_nothing_changes_a_job_that_has_ended(store: VideoStore, end: str) -> None:
    job = queue(store)
    store.claim()
    store.write(job.id, "video.mp4", b"first")
    if end == "complete":
        store.complete(job.id, ["video.mp4"], {})
    else:
        store.fail(job.id, "internal", "why")
    before = store.get(job.id)
    assert not store.progress(job.id, 5)
    assert store.write(job.id, "video.mp4", b"second") is None
    assert not store.complete(job.id, ["video.mp4"], {"late": True})
    assert not store.fail(job.id, "late", "late")
    assert store.get(job.id) == before and not store.is_wanted(job.id)
    if end == "complete":
        assert store.path(job.id, "", "video.mp4").read_bytes() == b"first"


def test_a_queued_job_takes_no_progress_and_no_end(store: VideoStore) -> None:
    job = queue(store)
    assert not store.progress(job.id, 5) and not store.complete(job.id, [], {}) and not store.fail(job.id, "a", "b")
    assert store.write(job.id, "video.mp4", b"frames") is None
    assert store.get(job.id) == job


def test_completing_without_the_files_is_refused(store: VideoStore) -> None:
    job = queue(store)
    store.claim()
    with pytest.raises(ConfigError, match=r"\['thumbnail.webp'\]"):
        store.complete(job.id, ["thumbnail.webp"], {})
    assert store.is_wanted(job.id)


def test_completing_removes_what_is_left_of_an_earlier_attempt(store: VideoStore, tmp_path: Path) -> None:
    job = queue(store)
    store.claim()
    store.write(job.id, "old.mp4", b"old")
    (tmp_path / "videos" / "files" / job.id / ".part-1").write_bytes(b"ol")
    store.write(job.id, "video.mp4", b"new")
    store.complete(job.id, ["video.mp4"], {})
    assert on_disk(tmp_path / "videos") == [job.id, f"{job.id}/video.mp4"]


@pytest.mark.parametrize("percent", [-1, 101, 0.5, "1"])
def test_progress_is_percent(store: VideoStore, percent: object) -> None:
    with pytest.raises(ConfigError, match="percent="):
        store.progress(queue(store).id, percent)  # type: ignore[arg-type]


def test_counts_are_those_of_every_state(store: VideoStore) -> None:
    assert store.counts() == {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0}
    for _ in range(5):
        queue(store)
    finish(store)
    store.fail(store.claim().id, "internal", "why")
    store.claim()
    assert store.counts() == {"queued": 2, "in_progress": 1, "completed": 1, "failed": 1}


# -- deletion, owners, limits ---------------------------------------------------------------------------------------


def test_queued_and_completed_jobs_are_deleted_with_their_files(store: VideoStore, tmp_path: Path) -> None:
    done, waiting = queue(store), queue(store)
    finish(store)
    for job in (done, waiting):
        store.delete(job.id)
        with pytest.raises(VideoNotFoundError, match=job.id):
            store.get(job.id)
        with pytest.raises(VideoNotFoundError):
            store.delete(job.id)
    assert store.claim() is None and on_disk(tmp_path / "videos") == []


@pytest.mark.parametrize("late", ["complete", "fail", "progress"])
def test_the_worker_of_a_deleted_job_learns_it_and_leaves_no_files(
    store: VideoStore, tmp_path: Path, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue(store)
    store.claim()
    store.delete(job.id)
    assert not store.is_wanted(job.id) and store.write(job.id, "video.mp4", b"frames") is None
    assert on_disk(tmp_path / "videos") == []
    # deleted between the look and the write
    with monkeypatch.context() as patch:
        patch.setattr(store, "is_wanted", lambda id: True)
        store.write(job.id, "video.mp4", b"frames")
    assert on_disk(tmp_path / "videos") != []
    calls: dict[str, Callable[[], bool]] = {
        "complete": lambda: store.complete(job.id, ["video.mp4"], {}),
        "fail": lambda: store.fail(job.id, "internal", "why"),
        "progress": lambda: store.progress(job.id, 50),
    }
    assert not calls[late]()
    assert on_disk(tmp_path / "videos") == []


def test_a_folder_removed_in_mid_write_is_no_error_of_a_deleted_job(
    store: VideoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue(store)
    store.claim()
    real = os.fsync

    def deleted_meanwhile(file: int) -> None:
        store.delete(job.id)
        real(file)

    monkeypatch.setattr(os, "fsync", deleted_meanwhile)
    assert store.write(job.id, "video.mp4", b"frames") is None


def test_owners_see_their_own_jobs_only(store: VideoStore) -> None:
    mine, theirs = queue(store, owner="a"), queue(store, owner="b")
    assert [job.id for job in store.list("a").data] == [mine.id]
    for call in (store.get, store.delete, lambda id, owner: store.path(id, owner, "video.mp4")):
        with pytest.raises(VideoNotFoundError):
            call(theirs.id, "a")
    assert store.get(theirs.id, "b") == theirs


def test_claims_go_round_the_owners_and_by_age_within_one(store: VideoStore) -> None:
    for owner, number in (("a", 4), ("b", 2), ("c", 1)):
        for i in range(number):
            queue(store, f"{owner}{i}", owner)
    taken = [store.claim().prompt for _ in range(4)]
    assert taken == ["a0", "b0", "c0", "a1"]
    queue(store, "d0", "d")  # who was never served comes next
    assert [store.claim().prompt for _ in range(4)] == ["d0", "b1", "a2", "a3"]


def test_deleting_what_was_served_brings_nobody_forward(store: VideoStore) -> None:
    for owner in "aabb":
        queue(store, owner=owner)
    first = store.claim()
    assert first.owner == "a"
    store.delete(first.id, "a")
    assert store.claim().owner == "b"


def test_a_full_queue_is_refused_per_owner_and_in_all(tmp_path: Path) -> None:
    with VideoStore(tmp_path, KEEP, max_queued=3, max_queued_per_owner=2) as store:
        queue(store, owner="a"), queue(store, owner="a")
        with pytest.raises(QueueFullError, match="2 of your videos"):
            queue(store, owner="a")
        queue(store, owner="b")
        with pytest.raises(QueueFullError, match="3 videos are queued"):
            queue(store, owner="c")
        store.claim()  # what runs is not queued
        queue(store, owner="c")
        assert store.counts()["queued"] == 3


def test_a_request_that_is_no_json_is_refused(store: VideoStore) -> None:
    for request in ({"seed": float("nan")}, {"image": b"raw"}):
        with pytest.raises((ValueError, TypeError)):
            store.create(request, "demo", "128x128", "4", "a fox")
    assert store.counts()["queued"] == 0


@pytest.mark.parametrize(
    "id", ["../../etc/passwd", "video_../../jobs", ELSEWHERE + "/..", ELSEWHERE + "\n", ELSEWHERE.upper(), "", "video_"]
)
def test_ids_of_another_form_reach_no_file(store: VideoStore, tmp_path: Path, id: str) -> None:
    queue(store)
    for call in (store.get, store.delete, lambda id: store.path(id, "", "video.mp4"), lambda id: store.list("", id)):
        with pytest.raises(VideoNotFoundError):
            call(id)
    assert not store.is_wanted(id)
    for call in (lambda id: store.write(id, "video.mp4", b""), lambda id: store.fail(id, "a", "b")):
        with pytest.raises(ConfigError, match="id="):
            call(id)
    assert (tmp_path / "videos" / "jobs.sqlite3").is_file() and on_disk(tmp_path / "videos") == []


@pytest.mark.parametrize("name", ["../video.mp4", "/etc/passwd", ".part-1", "a/b", "", "video.mp4.", "video.mp4\n"])
def test_names_that_leave_the_folder_are_refused(store: VideoStore, name: str) -> None:
    job = queue(store)
    store.claim()
    with pytest.raises(ConfigError, match="name="):
        store.write(job.id, name, b"frames")


# -- lists ----------------------------------------------------------------------------------------------------------


def test_pages_follow_each_other_though_the_last_job_is_deleted(store: VideoStore) -> None:
    ids = [queue(store).id for _ in range(5)]
    seen = []
    page = store.list(limit=2)
    while page.data:  # as a client does that deletes all it lists
        for job in page.data:
            seen.append(job.id)
            store.delete(job.id)
        page = store.list(after=page.last_id, limit=2)
    assert seen == ids[::-1]
    assert (page.data, page.has_more, page.first_id, page.last_id) == ((), False, None, None)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("create"), st.sampled_from("ab"), st.integers(-5, 5)),
            st.tuples(st.just("delete"), st.integers(0, 20)),
            st.tuples(
                st.just("list"),
                st.sampled_from("ab"),
                st.none() | st.integers(0, 20),
                st.integers(1, 6),
                st.sampled_from(["asc", "desc"]),
            ),
        ),
        max_size=40,
    )
)
def test_lists_are_those_of_a_plain_list(steps: list[tuple]) -> None:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, VideoStore(Path(folder), KEEP, clock) as store:
        created: list[tuple[str, str]] = []  # (id, owner), also of deleted jobs
        alive: set[str] = set()
        for step in steps:
            if step[0] == "create":
                clock.now += step[2] * 1e-6  # a clock that is put back, too
                created.append((queue(store, owner=step[1]).id, step[1]))
                alive.add(created[-1][0])
            elif step[0] == "delete" and created:
                id, owner = created[step[1] % len(created)]
                if id in alive:
                    store.delete(id, owner)
                    alive.remove(id)
            elif step[0] == "list":
                _, owner, after, limit, order = step
                cursor = created[after % len(created)][0] if after is not None and created else None
                line = created if order == "asc" else created[::-1]
                begin = next((i + 1 for i, (id, _) in enumerate(line) if id == cursor), 0)
                rest = [id for id, whose in line[begin:] if whose == owner and id in alive]
                page = store.list(owner, cursor, limit, order)
                assert [job.id for job in page.data] == rest[:limit]
                assert page.has_more == (len(rest) > limit)
                assert page.first_id == (rest[0] if rest else None)
                assert page.last_id == (rest[:limit][-1] if rest else None)


@pytest.mark.parametrize(
    ("arguments", "names"), [({"limit": 0}, "limit=0"), ({"limit": 101}, "limit=101"), ({"order": "up"}, "order='up'")]
)
def test_a_page_out_of_range_is_refused(store: VideoStore, arguments: dict, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        store.list(**arguments)


def test_an_empty_page_has_no_ids() -> None:
    assert VideoPage((), False).first_id is None


# -- expiry ---------------------------------------------------------------------------------------------------------


def test_jobs_and_files_go_when_their_time_is_over(store: VideoStore, clock: Clock, tmp_path: Path) -> None:
    done, failed, running, waiting = (queue(store) for _ in range(4))
    finish(store)
    store.fail(store.claim().id, "internal", "why")
    store.claim()
    store.write(running.id, "video.mp4", b"frames")
    clock.now += KEEP - 1
    assert store.expire() == () and store.path(done.id, "", "video.mp4").is_file()
    clock.now += 1
    assert store.expire() == (done.id, failed.id)
    assert [job.id for job in store.list(order="asc").data] == [running.id, waiting.id]
    clock.now += 100 * KEEP  # what has not ended does not expire
    assert store.expire() == ()
    assert on_disk(tmp_path / "videos") == [running.id, f"{running.id}/video.mp4"]


def test_files_whose_job_is_gone_are_swept(store: VideoStore, tmp_path: Path) -> None:
    lost = tmp_path / "videos" / "files" / ELSEWHERE
    lost.mkdir()
    (lost / "video.mp4").write_bytes(b"frames")
    assert store.expire() == () and not lost.exists()


# -- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_partial_file(
    store: VideoStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    job = queue(store)
    store.claim()
    store.write(job.id, "video.mp4", b"first")

    def full(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StorageError, match="no room for 6 bytes"):
        store.write(job.id, "video.mp4", b"second")
    monkeypatch.undo()
    assert on_disk(tmp_path / "videos") == [job.id, f"{job.id}/video.mp4"]
    assert (tmp_path / "videos" / "files" / job.id / "video.mp4").read_bytes() == b"first"
    assert store.fail(job.id, "insufficient_storage", "The disk is full.")


def test_another_fault_of_the_disk_is_no_matter_of_room(store: VideoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = queue(store)
    store.claim()

    def broken(file: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError) as caught:
        store.write(job.id, "video.mp4", b"frames")
    assert not isinstance(caught.value, StorageError)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Mounts a small disk on a folder."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_of_64_kib_takes_what_fits(small_disk: Callable[[Path, str], None], tmp_path: Path) -> None:
    small_disk(tmp_path / "videos" / "files", "64k")
    with VideoStore(tmp_path / "videos", KEEP) as store:
        job = queue(store)
        store.claim()
        assert store.write(job.id, "video.mp4", bytes(40_000))
        with pytest.raises(StorageError):
            store.write(job.id, "thumbnail.webp", bytes(40_000))
        assert on_disk(tmp_path / "videos") == [job.id, f"{job.id}/video.mp4"]
        assert store.write(job.id, "thumbnail.webp", bytes(8_000))  # the room came back


def test_a_disk_full_of_other_things_refuses_jobs_and_recovers(
    small_disk: Callable[[Path, str], None], tmp_path: Path
) -> None:
    small_disk(tmp_path / "videos", "512k")
    with VideoStore(tmp_path / "videos", KEEP) as store:
        job = queue(store)
        store.claim()
        with pytest.raises(StorageError):
            store.write(job.id, "video.mp4", bytes(600_000))
        assert store.fail(job.id, "insufficient_storage", "The disk is full.")  # what was written in vain is free again
        (tmp_path / "videos" / "other").write_bytes(bytes(_free(tmp_path / "videos")))
        accepted = 0
        with pytest.raises(StorageError, match="free some room"):
            for _ in range(100):
                queue(store)
                accepted += 1
        (tmp_path / "videos" / "other").unlink()
        assert store.counts()["queued"] == accepted
        queue(store)
        assert store.counts()["queued"] == accepted + 1


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


# -- threads, processes, kills --------------------------------------------------------------------------------------

CLAIM_ALL = """
import sys
from pathlib import Path
from ddit_rt.serve.video_database import VideoDatabase
from ddit_rt.serve.video_store import VideoStore

store = VideoStore(Path(sys.argv[1]), 1000)
print("ready", flush=True)
sys.stdin.readline()
while (job := store.claim()) is not None:
    print(job.id, flush=True)
    store.write(job.id, "video.mp4", job.id.encode())
    store.complete(job.id, ["video.mp4"], {})
"""

CLAIM_AND_HANG = """
import sys, time
from pathlib import Path
from ddit_rt.serve.video_database import VideoDatabase
from ddit_rt.serve.video_store import VideoStore

store = VideoStore(Path(sys.argv[1]), 1000)
if sys.argv[2] == "recover":
    store.recover()
job = store.claim()
store.write(job.id, "video.mp4", b"frames")
store.progress(job.id, 30)
print(job.id, flush=True)
time.sleep(600)
"""

HANG_IN_MID_WRITE = """
import os, sys, time
from pathlib import Path
from ddit_rt.serve.video_database import VideoDatabase
from ddit_rt.serve.video_store import VideoStore

store = VideoStore(Path(sys.argv[1]), 1000)
job = store.claim()
store.write(job.id, "video.mp4", b"first")
real = os.write

def half(file, data):
    real(file, data[: len(data) // 2])
    real(1, b"half\\n")
    time.sleep(600)

os.write = half
store.write(job.id, "video.mp4", b"second, longer")
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_at_first_line(worker: subprocess.Popen[str]) -> str:
    """Waits for a worker's first line, kills it there and returns the line."""
    line = worker.stdout.readline().strip()
    worker.send_signal(signal.SIGKILL)
    _, error = worker.communicate()
    assert line, error
    return line


def test_two_processes_share_forty_jobs(tmp_path: Path) -> None:
    workers = [start(CLAIM_ALL, tmp_path) for _ in range(2)]  # both make the database
    for worker in workers:
        assert worker.stdout.readline() == "ready\n", worker.communicate()
    with VideoStore(tmp_path, KEEP) as store:
        ids = [queue(store).id for _ in range(40)]
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        taken = [worker.communicate()[0].split() for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0]
        assert sorted(taken[0] + taken[1]) == ids
        for id in ids:
            job = store.get(id)
            assert (job.status, job.attempts) == ("completed", 1)
            assert store.path(id, "", "video.mp4").read_text() == id


def test_threads_of_one_store_share_jobs(store: VideoStore) -> None:
    ids = [queue(store).id for _ in range(40)]
    taken: list[str] = []

    def work() -> None:
        while (job := store.claim()) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == ids


def test_jobs_outlive_kills_and_run_twice_at_most(tmp_path: Path) -> None:
    with VideoStore(tmp_path, KEEP) as store:
        first, second = queue(store, "first"), queue(store, "second")

    assert kill_at_first_line(start(CLAIM_AND_HANG, tmp_path, "go on")) == first.id
    with VideoStore(tmp_path, KEEP) as store:
        assert (store.get(first.id).status, store.get(first.id).progress) == ("in_progress", 30)
    # the second server takes the job up again, in its old place, and is killed with it
    assert kill_at_first_line(start(CLAIM_AND_HANG, tmp_path, "recover")) == first.id

    with VideoStore(tmp_path, KEEP) as store:
        recovery = store.recover()
        assert (recovery.queued, recovery.failed, recovery.removed) == ((), (first.id,), 1)
        failed = store.get(first.id)
        assert (failed.status, failed.attempts, failed.error["code"]) == ("failed", 2, "server_restarted")
        assert "restarted" in failed.error["message"] and failed.expires_at is not None
        assert store.get(second.id) == second
        assert on_disk(tmp_path) == []
        assert store.claim().id == second.id


def test_recovery_queues_again_and_keeps_what_is_completed(store: VideoStore, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for _ in range(3):
        queue(store)
    done, running = finish(store), store.claim()
    store.write(running.id, "video.mp4", b"half done")
    (folder / "files" / done.id / ".part-1").write_bytes(b"")
    (folder / "files" / ELSEWHERE).mkdir()
    recovery = store.recover()
    assert (recovery.queued, recovery.failed, recovery.removed) == ((running.id,), (), 2)
    assert store.get(running.id) == replace(running, status="queued")
    assert on_disk(folder) == [done.id, f"{done.id}/video.mp4"]
    assert store.recover() == replace(recovery, queued=(), removed=0)


def test_a_kill_in_mid_write_shows_no_half_file(tmp_path: Path) -> None:
    with VideoStore(tmp_path, KEEP) as store:
        job = queue(store)
    assert kill_at_first_line(start(HANG_IN_MID_WRITE, tmp_path)) == "half"
    assert (tmp_path / "files" / job.id / "video.mp4").read_bytes() == b"first"
    assert len(on_disk(tmp_path)) == 3  # the folder, the file, and the partial one that is swept
    with VideoStore(tmp_path, KEEP) as store:
        store.recover()
        assert on_disk(tmp_path) == []
        assert store.claim().attempts == 2


# -- the database ---------------------------------------------------------------------------------------------------


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    VideoStore(tmp_path, KEEP).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(ConfigError, match="has version 7, this release reads 1"):
        VideoStore(tmp_path, KEEP)


def test_opening_waits_for_another_process_that_makes_the_database(tmp_path: Path) -> None:
    # SQLite answers "database is locked" at once here, whatever its timeout
    other = sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    end = threading.Timer(0.3, other.execute, ["COMMIT"])
    end.start()
    with VideoStore(tmp_path, KEEP) as store:
        assert store.get(queue(store).id).status == "queued"
    end.join()
    other.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_text("a note, long enough to be read as the head of a database " * 20)
    with pytest.raises(ConfigError, match="not a database"):
        VideoStore(tmp_path, KEEP)


@pytest.mark.parametrize("setting", ["keep_seconds", "max_queued", "max_queued_per_owner"])
def test_settings_out_of_range_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}=0"):
        VideoStore(tmp_path, **{"keep_seconds": 1, setting: 0})


def test_closing_waits_for_a_statement_of_another_thread(tmp_path: Path) -> None:
    """A thread that asyncio left behind may still be in one; SQLite crashes where its connection goes meanwhile."""
    database = VideoDatabase(tmp_path / "jobs.sqlite")
    began, closed = threading.Event(), threading.Event()

    def close() -> None:
        began.set()
        database.close()
        closed.set()

    with database.transaction() as connection:
        closing = threading.Thread(target=close)
        closing.start()
        assert began.wait(5) and not closed.wait(0.2)
        assert connection.execute("SELECT 1").fetchone()[0] == 1
    closing.join(5)
    assert closed.is_set()
    with pytest.raises(sqlite3.ProgrammingError), database.reading() as connection:
        connection.execute("SELECT 1")
