"""Takes video jobs out of their store and sees them through."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from contextlib import aclosing, suppress
from dataclasses import asdict
from pathlib import Path

from .errors import ApiError
from .state import Server
from .video_store import StorageError, VideoJob, VideoStore
from .wire import facts_of
from .work import Event, Work

logger = logging.getLogger(__name__)

POLL = 0.5
"""Seconds between looks at the store while nothing says that a job has come."""


class VideoWorkers:
    """As many jobs at once as there may be replicas of video models.

    Args:
        server: What works are asked of.
        folder: For jobs and files.
        keep_seconds: How long they are kept.
    """

    def __init__(self, server: Server, folder: Path, keep_seconds: float) -> None:
        self._server = server
        most = server.config.limits.videos
        self.store = VideoStore(folder, keep_seconds, max_queued=most, max_queued_per_owner=max(most // 4, 1))
        self._running: dict[str, asyncio.Task[None]] = {}
        self._come = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def add(self, work: Work, model: str, seconds: str, timeout: float | None = None) -> VideoJob:
        """Queues a job.

        Args:
            work: The video; its deadline is set anew when it runs.
            model: Name of a served one.
            seconds: Length of the video, for the client.
            timeout: Seconds that the run may take; None for the limit of the server.

        Raises:
            QueueFullError, StorageError: as of the store.
        """
        request = {**asdict(work), "model": model, "timeout": timeout}
        request["images"] = [base64.b64encode(data).decode("ascii") for data in work.images]
        job = self.store.create(request, model, f"{work.width}x{work.height}", seconds, work.prompt, work.owner)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._come.set)
        return job

    def stop(self, id: str) -> None:
        """Stops a job that runs here."""
        task = self._running.get(id)
        if task is not None:
            task.cancel()

    async def work(self) -> None:
        """Does jobs for ever, whatever befalls the store; those that an earlier server began are first."""
        self._loop = asyncio.get_running_loop()
        recovered = False
        try:
            while True:
                try:
                    if not recovered:
                        await self._recover()
                        recovered = True
                    await self._take()
                except Exception:  # a disk that is full has room again some time
                    logger.exception("the video jobs could not be looked at; trying again")
                    await asyncio.sleep(POLL)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _recover(self) -> None:
        recovery = await asyncio.to_thread(self.store.recover)
        if recovery.queued or recovery.failed:
            logger.warning("%d video jobs run again, %d have failed", len(recovery.queued), len(recovery.failed))

    async def _take(self) -> None:
        """Begins the next job, or waits a while for one."""
        await self._count()
        while not self._server.models or len(self._running) >= self._places():
            await asyncio.sleep(POLL)
        job = None if self._server.draining else await asyncio.to_thread(self.store.claim)
        if job is None:
            self._come.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._come.wait(), POLL)
            return
        self._running[job.id] = asyncio.create_task(self._do(job))

    def _places(self) -> int:
        videos = {name for name, facts in self._server.models.items() if facts.kind == "video"}
        models = [model for model in self._server.config.models if model.name in videos]
        return max(sum(model.max_replicas or model.replicas for model in models), 1)

    async def _count(self) -> None:
        counts = await asyncio.to_thread(self.store.counts)
        for status, count in counts.items():
            self._server.metrics.video_jobs.labels(status).set(count)

    async def _do(self, job: VideoJob) -> None:
        try:
            await self._make(job)
        except ApiError as error:
            await self._fail(job, error.code, error.message)
        except StorageError as error:
            await self._fail(job, "insufficient_storage", str(error))
        except Exception as error:
            logger.exception("video job %s failed", job.id)
            text = f"the server failed ({type(error).__name__}); see its log."
            await self._fail(job, "internal_error", text)
        finally:
            del self._running[job.id]
            self._come.set()

    async def _fail(self, job: VideoJob, code: str, message: str) -> None:
        """Ends a job, as soon as the store takes it: one left in progress would be polled until a restart."""
        while True:
            try:
                await asyncio.to_thread(self.store.fail, job.id, code, message)
                return
            except Exception:
                logger.exception("the end of video job %s (%s) could not be stored; trying again", job.id, code)
                await asyncio.sleep(POLL)

    async def _make(self, job: VideoJob) -> None:
        model = str(job.request["model"])
        if model not in self._server.models:
            raise ApiError(404, "model_not_found", f"{model} is not served any more.")
        told = 0
        async with aclosing(self._server.run(model, self._work_of(job))) as events:
            async for event in events:
                if event.type == "step":
                    percent = min(int(100 * event.index / event.steps), 99)
                    if percent > told:
                        told = percent
                        if not await asyncio.to_thread(self.store.progress, job.id, percent):
                            return  # deleted
                elif event.type == "done":
                    await asyncio.to_thread(self._keep_result, job, event)

    def _keep_result(self, job: VideoJob, event: Event) -> None:
        files = {"video.mp4": event.data, "thumbnail.webp": event.thumbnail}
        for name, data in files.items():
            if self.store.write(job.id, name, data) is None:
                return  # deleted
        self.store.complete(job.id, list(files), facts_of([event], str(job.request["request_id"])))

    def _work_of(self, job: VideoJob) -> Work:
        fields = {name: value for name, value in job.request.items() if name not in ("model", "timeout")}
        fields["images"] = tuple(base64.b64decode(data) for data in fields["images"])
        settings = ((name, tuple(v) if isinstance(v, list) else v) for name, v in fields["settings"])
        limit = self._server.config.limits.seconds
        # its time begins when it runs; jobs of an earlier release have none of their own
        deadline = time.time() + min(job.request.get("timeout") or limit, limit)
        return Work(**{**fields, "settings": tuple(settings), "deadline": deadline})
