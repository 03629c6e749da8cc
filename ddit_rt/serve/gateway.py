"""The way from requests to replicas: what the application calls, whether Ray or this process does the work."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ApiError
from .work import Event, ModelFacts, Work

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)


class Gateway(Protocol):
    """Where works are done."""

    async def facts(self) -> dict[str, ModelFacts]:
        """Of all models, by name, once they are warm."""
        ...

    def run(self, model: str, work: Work) -> AsyncGenerator[Event]:
        """Does a work. Closing the iterator stops it.

        Raises:
            ApiError: as of :meth:`ddit_rt.serve.engine.Engine.run`; 503 where its replica was lost twice.
        """
        ...


class LocalGateway:
    """Engines in this process, for one device and for tests.

    Args:
        engines: Name -> engine that has been started.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    async def facts(self) -> dict[str, ModelFacts]:
        return {name: engine.variants.facts() for name, engine in self._engines.items()}

    def run(self, model: str, work: Work) -> AsyncGenerator[Event]:
        return self._engines[model].run(work)


class RayGateway:
    """Replicas of Ray Serve.

    Args:
        handles: Name -> handle of the model's deployment.
        retried: Called with the model's name when a work is done again.
    """

    def __init__(self, handles: Mapping[str, Any], retried: Any = lambda model: None) -> None:
        self._handles, self._retried = handles, retried
        self._facts: dict[str, ModelFacts] = {}

    async def facts(self) -> dict[str, ModelFacts]:
        for name, handle in self._handles.items():
            if name not in self._facts:
                self._facts[name] = await handle.facts.remote()
        return {name: self._facts[name] for name in self._handles}

    async def run(self, model: str, work: Work) -> AsyncGenerator[Event]:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError

        handle = self._handles[model].options(stream=True)
        told: set[tuple[str, int]] = set()
        for attempt in (1, 2):
            try:
                async with aclosing(_Responses(handle.run.remote(work))) as events:
                    async for event in events:
                        if isinstance(event, ApiError):
                            raise event
                        if (event.type, event.index) not in told:  # a second run begins anew
                            told.add((event.type, event.index))
                            yield event
                return
            except BackPressureError:
                raise ApiError(429, "queue_full", "too many pictures are waiting.", retry_after=5.0) from None
            except RayTaskError as error:
                logger.error("a replica of %s failed", model, exc_info=error)
                raise ApiError(500, "internal_error", "the replica failed; see the log.") from None
            except RayError as error:
                logger.warning("a replica of %s was lost (%s), attempt %d", model, type(error).__name__, attempt)
                if attempt == 2:
                    raise ApiError(503, "unavailable", "the replica was lost twice.", retry_after=10.0) from None
                self._retried(model)


class _Responses:
    """The responses of a streaming call, which is cancelled when they are closed."""

    def __init__(self, responses: Any) -> None:
        self._responses = responses
        self._over = False

    def __aiter__(self) -> _Responses:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._responses.__anext__()
        except BaseException as error:
            self._over = isinstance(error, StopAsyncIteration)
            raise

    async def aclose(self) -> None:
        if not self._over:
            self._responses.cancel()
