"""The loop that does video jobs, on a gateway that makes one at once and a store that fails."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ddit_rt.serve import Limits, ModelConfig, ServeConfig
from ddit_rt.serve.keys import Keys
from ddit_rt.serve.metrics import Metrics
from ddit_rt.serve.picture_store import PictureStore
from ddit_rt.serve.state import Server, keep_expiring
from ddit_rt.serve.video_store import StorageError, VideoJob
from ddit_rt.serve.video_workers import VideoWorkers
from ddit_rt.serve.work import Event, ModelFacts, Work

FILM = ModelFacts(
    name="film",
    kind="video",
    sizes=("64x48",),
    side=16,
    frame_step=4,
    steps=2,
    guidance=None,
    frames=5,
    fps=16,
    negative=True,
    speedup=2.0,
    loras=(),
    edits=False,
    inpaints=False,
    prompts=(),
    created=0,
)
SECONDS = dict.fromkeys(("queued", "encoding", "denoising", "decoding"), 0.0)
FACTS = {"speedup": 1.0, "steps": [1, 1], "sizes": {"p": 2}, "seconds": SECONDS, "batch": 1, "seed": 1}


class Gateway:
    """Makes a video at once, or raises ``error``; ``asked`` are the works."""

    def __init__(self) -> None:
        self.asked: list[Work] = []
        self.error: Exception | None = None

    async def facts(self) -> dict[str, ModelFacts]:
        return {"film": FILM}

    async def run(self, model: str, work: Work) -> AsyncGenerator[Event]:
        self.asked.append(work)
        yield Event("accepted", 0, 2)
        if self.error is not None:
            raise self.error
        yield Event("done", 2, 2, b"video", b"thumbnail", {**FACTS, "tokens": 1, "text_tokens": 1})


class Failing:
    """A method that raises the first times that it is called."""

    def __init__(self, method: Callable[..., Any], error: Exception, times: int = 1) -> None:
        self.method, self.error, self.left = method, error, times

    def __call__(self, *arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            raise self.error
        return self.method(*arguments)


def _work(seconds: float = 60) -> Work:
    return Work("req", "a red apple", 1, 64, 48, 2, time.time() + seconds, kind="video", frames=5, format="mp4")


async def _ended(workers: VideoWorkers, job: VideoJob) -> VideoJob:
    end = time.monotonic() + 20
    while (now := workers.store.get(job.id, "")).status in ("queued", "in_progress"):
        assert time.monotonic() < end, now
        await asyncio.sleep(0.02)
    return now


def _run(folder: Path, test: Callable[[VideoWorkers, Gateway], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """A test with workers that have not begun yet."""

    async def around() -> None:
        config = ServeConfig(models=(ModelConfig(name="film", model="x"),), **settings)
        gateway = Gateway()
        server = Server(config, gateway, Metrics(), Keys(), PictureStore(folder / "pictures", 60), {"film": FILM})  # type: ignore[arg-type]
        workers = VideoWorkers(server, folder / "videos", 60)
        try:
            await test(workers, gateway)
        finally:
            workers.close()

    asyncio.run(around())


async def _working(workers: VideoWorkers, job: VideoJob) -> VideoJob:
    """What becomes of a job."""
    task = asyncio.create_task(workers.work())
    try:
        return await _ended(workers, job)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("method", ["recover", "counts", "claim"])
@pytest.mark.parametrize("error", [StorageError("no room"), sqlite3.OperationalError("locked")])
def test_a_store_that_fails_for_a_moment_ends_no_work(
    tmp_path: Path, method: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(workers: VideoWorkers, gateway: Gateway) -> None:
        setattr(workers.store, method, Failing(getattr(workers.store, method), error))
        job = workers.add(_work(), "film", "1")
        assert (await _working(workers, job)).status == "completed"

    _run(tmp_path, test)
    assert "could not be looked at" in caplog.text and str(error) in caplog.text


def test_the_end_of_a_job_is_stored_once_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(workers: VideoWorkers, gateway: Gateway) -> None:
        gateway.error = StorageError("no room for a video")
        workers.store.fail = Failing(workers.store.fail, StorageError("nor for this"), 2)  # type: ignore[method-assign]
        failed = await _working(workers, workers.add(_work(), "film", "1"))
        assert failed.status == "failed" and dict(failed.error or {})["code"] == "insufficient_storage"
        gateway.error = None
        assert (await _working(workers, workers.add(_work(), "film", "1"))).status == "completed"

    _run(tmp_path, test)
    assert caplog.text.count("could not be stored") == 2


@pytest.mark.parametrize("timeout, seconds", [(None, 50), (7.5, 7.5), (1000, 50)])
def test_a_run_has_the_time_that_was_asked_for_within_the_limit(
    tmp_path: Path, timeout: float | None, seconds: float
) -> None:
    async def test(workers: VideoWorkers, gateway: Gateway) -> None:
        job = workers.add(_work(seconds=0), "film", "1", timeout)  # the time in the queue does not count
        began = time.time()
        assert (await _working(workers, job)).status == "completed"
        (work,) = gateway.asked
        assert began + seconds <= work.deadline <= time.time() + seconds

    _run(tmp_path, test, limits=Limits(seconds=50))


def test_expiring_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        expire = Failing(lambda: loop.call_soon_threadsafe(done.set), OSError("no room"))
        task = asyncio.create_task(keep_expiring(expire, 0.1))
        await asyncio.wait_for(done.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(test())
    assert "no room" in caplog.text
