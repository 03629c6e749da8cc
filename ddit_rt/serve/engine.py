"""One accelerated pipeline that works for many: batches, previews, stopping, and what to do when memory runs out."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import DDiTError
from ..pipeline import Progress, configured, find_accelerated, report, settings_of_call, watched
from ..schedule import Report
from .encode import picture_bytes, to_uint8, video_bytes
from .errors import ApiError
from .preview import PARTIALS, Pace, PreviewDecoder, middle_frame
from .queue import Item, Told, WorkQueue
from .variants import Variants
from .work import Event, Work

logger = logging.getLogger(__name__)


class _NobodyWaitsError(Exception):
    """Ends a run whose clients have all gone."""


class Engine:
    """Runs works on one pipeline, in one thread of its own; everything else belongs to the event loop.

    Args:
        variants: Of the accelerated model.
        waiting: Works that may wait.

    Attributes:
        out_of_memory: How often memory has run out.
        broken: Why the process has to be replaced, if so.
    """

    def __init__(self, variants: Variants, waiting: int) -> None:
        config = variants.config
        self.variants = variants
        self._config = config
        found = find_accelerated(variants.pipe)
        assert found is not None
        self._accelerated, self._settings = found, found.config
        self.queue = WorkQueue(waiting, config.max_batch, config.max_batch_tokens)
        self.decoder, self.pace = PreviewDecoder(), Pace()
        self._lora = ""
        self._device = ThreadPoolExecutor(1, "device")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._running: list[Item] = []
        self.out_of_memory = 0
        self.broken = ""

    async def start(self) -> None:
        """Begins to take works."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Stops; works that wait get an error, the batch that runs ends at its next step."""
        for item in [*self.queue.drop(lambda item: True), *self._running]:
            item.wanted = False
            item.events.put_nowait(ApiError(503, "unavailable", "the server is stopping."))
        if self._task is not None:
            self._task.cancel()
        await asyncio.to_thread(self._device.shutdown)

    def busy(self) -> int:
        """Works that wait or run."""
        return len(self.queue) + len(self._running)

    async def run(self, work: Work) -> AsyncGenerator[Event]:
        """Does a work. Whoever stops listening stops it, at the latest within one step.

        Yields:
            "accepted" at once, a "step" for every step of a video, previews, and "done" at last.

        Raises:
            ApiError: it cannot be done, there is no room, or the deadline has come.
        """
        self._check(work)
        item = Item(work, self.variants.tokens(work), alone=not self.variants.together(work))
        self.queue.put(item)
        try:
            yield Event("accepted", 0, work.steps)
            while True:
                left = work.deadline - time.time()
                told = await asyncio.wait_for(item.events.get(), max(left, 0.0))
                if isinstance(told, BaseException):
                    raise told
                event = told if isinstance(told, Event) else await self._made(told)
                yield event
                if event.type == "done":
                    return
        except TimeoutError:
            raise ApiError(504, "deadline_exceeded", "the picture was not ready in time.", "timeout") from None
        finally:
            item.wanted = False
            self.queue.drop(lambda other: other is item)

    async def _made(self, make: Callable[[], Event]) -> Event:
        """An event that takes its time to make, which the device does not wait for."""
        try:
            return await asyncio.to_thread(make)
        except Exception as error:
            raise self._answer(1, error) from None

    def _check(self, work: Work) -> None:
        self.variants.check(work)
        try:
            # not by the pipeline's settings of the moment, which may be those of the batch that runs
            config = settings_of_call(self._settings, dict(work.settings))
            policy = self._accelerated.policy_of(config)
            if self.variants.strength(work) in (None, 1.0):  # with less, its steps are the pipeline's to find
                policy.start(work.steps)
        except DDiTError as error:
            param = "schedule" if "schedule" in dict(work.settings) else "speedup"
            raise ApiError(400, "invalid_value", str(error), param) from None

    # -- batches ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self.queue.next_batch(self._config.batch_wait)
            batch = [item for item in batch if item.alive()]
            if not batch:
                continue
            self._running = batch
            began = time.monotonic()
            for item in batch:
                item.started = began
            try:
                await loop.run_in_executor(self._device, self._run, batch)
            except Exception:  # the next batch is not to wait for ever
                logger.exception("a batch of %d was given up", len(batch))
                for item in batch:
                    item.events.put_nowait(ApiError(500, "internal_error", "the engine failed; see the log."))
            finally:
                self._running = []
                self.queue.took(len(batch), time.monotonic() - began)

    def _run(self, batch: list[Item]) -> None:
        """On the device's thread: every item of the batch gets a result or an error."""
        try:
            self._call(batch)
        except _NobodyWaitsError:
            pass
        except Exception as error:
            if not _is_out_of_memory(error):
                answer = self._answer(len(batch), error)
                for item in batch:
                    self.tell(item, answer)
                return
            # what the traceback holds has to go before memory is free
            error.__traceback__ = None
            self._split(batch)

    def _split(self, batch: list[Item]) -> None:
        """Runs a batch that was too large in halves, and makes no such batch again."""
        self.out_of_memory += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            message = f"{batch[0].work.width}x{batch[0].work.height} does not fit into the device's memory."
            self.tell(batch[0], ApiError(507, "out_of_memory", message, "size"))
            return
        half = len(batch) // 2
        tokens = sum(item.tokens for item in batch[:half])
        known = self.queue.max_tokens
        self.queue.max_tokens = tokens if known is None else min(known, tokens)
        logger.warning("out of memory with %d pictures: batches have at most %d tokens from now on", len(batch), tokens)
        for part in (batch[:half], batch[half:]):
            self._run(part)

    def _answer(self, works: int, error: Exception) -> ApiError:
        """What clients are told of an error."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, DDiTError):
            return ApiError(400, "invalid_value", str(error))
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            self.broken = str(error).splitlines()[0]  # nothing works on the device in this process any more
        logger.error("a batch of %d failed", works, exc_info=error)
        return ApiError(500, "internal_error", f"the pipeline failed ({type(error).__name__}); see the log.")

    def tell(self, item: Item, told: Told) -> None:
        """Tells whoever waits for a work; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(item.events.put_nowait, told)

    def _call(self, batch: list[Item]) -> None:
        works = [item.work for item in batch]
        first = works[0]
        self._use_lora(first.lora)
        pipe, arguments = self.variants.arguments(works)
        run = _Run(self, batch)
        began = time.perf_counter()
        with configured(self.variants.pipe, dict(first.settings)), watched(self.variants.pipe, run.step):
            output = pipe(**arguments)
        seconds = run.seconds(began)
        made = report(self.variants.pipe)
        self.pace.learn(first.settings, [step.seconds for step in made.steps])
        pictures = np.asarray(next(iter(output.values())) if isinstance(output, dict) else output[0])
        for index, item in enumerate(batch):
            if not np.isfinite(pictures[index]).all():
                self.tell(item, ApiError(500, "not_finite", "the picture holds NaN: try another seed or dtype."))
                continue
            # tokens are counted here and not where the picture is encoded: the next batch uses the tokenizer, too, each
            # call of which sets its padding and truncation
            facts = _facts(item, made, seconds, len(batch), self.variants.text_tokens(item.work.prompt))
            self.tell(item, partial(_finished, item.work, pictures[index], facts))
        run.learn(pictures)

    def _use_lora(self, name: str) -> None:
        """Turns on one of the loaded LoRAs, or none."""
        if name == self._lora or not self._config.loras:
            return
        if name:
            self.variants.pipe.enable_lora()
            self.variants.pipe.set_adapters([name])
        else:
            self.variants.pipe.disable_lora()
        self._lora = name


class _Run:
    """One batch while it runs: who still waits, which previews are due, and when its parts began."""

    def __init__(self, engine: Engine, batch: list[Item]) -> None:
        self._engine, self._batch = engine, batch
        self._sent = [0] * len(batch)
        self._ends: list[float] = []
        self._last: torch.Tensor | None = None
        device = engine.variants.pipe._execution_device
        self._cuda = device if device.type == "cuda" else None

    def step(self, step: Progress) -> None:
        """Hears of every step that has ended."""
        last = step.index + 1 >= step.steps
        if self._cuda is not None and (last or step.index == 0):
            torch.cuda.synchronize(self._cuda)
        self._ends.append(time.perf_counter())
        if not any(item.alive() for item in self._batch):
            raise _NobodyWaitsError
        if last:
            self._last = step.clean()
            return
        passed = self._engine.pace.passed(self._batch[0].work.settings, step.index + 1, step.steps)
        clean: torch.Tensor | None = None
        for place, item in enumerate(self._batch):
            if item.work.kind == "video":
                self._engine.tell(item, Event("step", step.index + 1, step.steps))
            due = PARTIALS.get(item.work.partials, ())
            if self._sent[place] >= len(due) or passed < due[self._sent[place]] or not item.alive():
                continue
            clean = step.clean() if clean is None else clean
            picture = None if clean is None else self._engine.decoder.decode(clean[place, :, clean.shape[2] // 2])
            if picture is None:
                continue
            self._engine.tell(
                item, partial(_preview, item.work, picture, self._sent[place], step.index + 1, step.steps)
            )
            self._sent[place] += 1

    def seconds(self, began: float) -> dict[str, float]:
        """Of the parts of a run that began then and has just ended."""
        end = time.perf_counter()
        if not self._ends:
            return {"encoding": 0.0, "denoising": end - began, "decoding": 0.0}
        first = self._ends[0] - report(self._engine.variants.pipe).steps[0].seconds
        return {
            "encoding": max(first - began, 0.0),
            "denoising": self._ends[-1] - first,
            "decoding": end - self._ends[-1],
        }

    def learn(self, pictures: np.ndarray) -> None:
        """Shows the finished pictures to the decoder of previews."""
        if self._last is None:
            return
        for latent, picture in zip(self._last, pictures):
            chosen, frame = middle_frame(latent.shape[1], len(picture) if picture.ndim == 4 else 1)
            pixels = picture[frame] if picture.ndim == 4 else picture
            if torch.isfinite(latent).all():
                self._engine.decoder.learn(latent[:, chosen], pixels)


def _preview(work: Work, picture: np.ndarray, number: int, step: int, steps: int) -> Event:
    data = picture_bytes(picture, work.format, work.compression, (work.width, work.height))
    return Event("partial", number, steps, data, facts={"step": step})


def _finished(work: Work, pixels: np.ndarray, facts: dict[str, Any]) -> Event:
    frames = to_uint8(pixels)
    if work.kind != "video":
        data = picture_bytes(frames, work.format, work.compression)
        return Event("done", work.steps, work.steps, data, facts=facts)
    thumbnail = picture_bytes(frames[len(frames) // 2], "webp", 90)
    return Event("done", work.steps, work.steps, video_bytes(frames, work.fps), thumbnail, facts)


def _facts(item: Item, made: Report, seconds: dict[str, float], batch: int, text_tokens: int) -> dict[str, Any]:
    """The ``ddit`` object of a result."""
    queued = (item.started or item.arrived) - item.arrived
    return {
        **made.summary(),
        "seconds": {name: round(value, 4) for name, value in {"queued": queued, **seconds}.items()},
        "batch": batch,
        "seed": item.work.seed,
        "tokens": item.tokens,
        "text_tokens": text_tokens,
    }


def _is_out_of_memory(error: BaseException) -> bool:
    # on a CPU torch raises a RuntimeError that only its text tells from others
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
