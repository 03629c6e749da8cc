"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from .errors import ApiError
from .gateway import Gateway
from .keys import Keys, Owner
from .metrics import Metrics
from .picture_store import PictureStore
from .settings import ServeConfig
from .work import Event, ModelFacts, Work

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """One server, its settings and its state.

    Attributes:
        models: Facts by name; empty until all are warm.
        in_flight: Works that replicas are asked for.
        draining: Nothing new is begun.
    """

    config: ServeConfig
    gateway: Gateway
    metrics: Metrics
    keys: Keys
    pictures: PictureStore
    models: dict[str, ModelFacts] = field(default_factory=dict)
    in_flight: int = 0
    draining: bool = False

    async def get_ready(self) -> None:
        """Waits for the models."""
        while not self.models:
            try:
                self.models = await self.gateway.facts()
            except Exception:  # a replica that starts may be lost; it is started again
                logger.exception("the models' facts could not be had; asking again")
                await asyncio.sleep(2)

    def check_open(self) -> None:
        """Raises:
        ApiError: 503, while models are loaded and while the server is stopping.
        """
        if self.draining:
            raise ApiError(503, "unavailable", "the server is stopping.", retry_after=30)
        if not self.models:
            raise ApiError(503, "unavailable", "the models are being loaded.", retry_after=10)

    def model(self, name: str | None, kind: str = "") -> ModelFacts:
        """The facts of the model of a name; without one, of the first of a kind, "image" or "video".

        Raises:
            ApiError: 404, where there is none.
        """
        if name is None:
            found = next((facts for facts in self.models.values() if facts.kind == kind), None)
            missing = f"no model here makes {kind}s."
        else:
            found = self.models.get(name)
            missing = f"there is no model {name!r} here: {', '.join(self.models)}."
        if found is None:
            raise ApiError(404, "model_not_found", missing, "model")
        return found

    async def run(self, model: str, work: Work) -> AsyncGenerator[Event]:
        """Does a work and counts it. Errors as of :class:`ddit_rt.serve.gateway.Gateway`."""
        began, first, done = time.perf_counter(), True, False
        self.in_flight += 1
        self.metrics.in_flight.labels(model).inc()
        try:
            async with aclosing(self.gateway.run(model, work)) as events:
                async for event in events:
                    if event.type == "partial" and first:
                        first = False
                        self.metrics.first_partial.labels(model).observe(time.perf_counter() - began)
                    if event.type == "done":
                        done = True
                        self.metrics.done(model, event.facts)
                    yield event
        except ApiError as error:
            if error.code == "out_of_memory":
                self.metrics.out_of_memory.labels(model).inc()
            if error.status in (400, 429):
                self.metrics.rejected.labels(model, error.code).inc()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if not done:
                self.metrics.cancelled.labels(model).inc()
            raise
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.labels(model).dec()

    async def drain(self) -> None:
        """Takes nothing new, and waits until what has begun is done or the time for it is over."""
        self.draining = True
        end = time.monotonic() + self.config.drain_seconds
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.1)


def server_of(request: Request) -> Server:
    """The server that a request reached."""
    server: Server = request.app.state.server
    return server


def note_model(request: Request, name: str) -> None:
    """For metrics and the log: which model a request is for."""
    request.state.model = name
    request.state.log = {**getattr(request.state, "log", {}), "model": name}


def owner_of(request: Request) -> str:
    """The name of whom a request is from."""
    owner: Owner = request.state.owner
    return owner.name


async def keep_expiring(expire: Callable[[], Any], keep_seconds: float) -> None:
    """Removes what is past its time, for ever; what cannot be removed now is the next turn's."""
    while True:
        try:
            await asyncio.to_thread(expire)
        except Exception:
            logger.exception("what is past its time could not be removed; trying again later")
        await asyncio.sleep(min(keep_seconds / 10, 600.0))
