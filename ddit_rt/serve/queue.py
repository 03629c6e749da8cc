"""Works that wait for the device, and which of them run together next."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import ApiError
from .work import Event, Work

Told = Event | Callable[[], Event] | BaseException
"""What whoever waits for a work is told: an event, what makes one (encoding takes its time), or an error."""


@dataclass(eq=False)
class Item:
    """A work, and whoever waits for it.

    Attributes:
        work: What is wanted.
        tokens: That it has at p.
        alone: It runs in no batch.
        arrived: Time (of ``time.monotonic``).
        started: When its batch began; None before.
        wanted: False once nobody waits any more.
        events: What is told of it.
    """

    work: Work
    tokens: int
    alone: bool = False
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    wanted: bool = True
    events: asyncio.Queue[Told] = field(default_factory=asyncio.Queue)

    def alive(self) -> bool:
        """Whether somebody still waits for it, and in time."""
        return self.wanted and time.time() < self.work.deadline


class WorkQueue:
    """A fair queue: owners take turns, and within one the oldest is next.

    The next work takes along others of its key, oldest first, up to the batch's limits; they may belong to anyone. So
    nobody waits for longer than those who were there before them, and the device is not left half empty.

    Belongs to one event loop.

    Args:
        limit: Works that may wait.
        max_batch: Works in a batch.
        max_tokens: Tokens in a batch, None for no limit; a single work may have more.
    """

    def __init__(self, limit: int, max_batch: int, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self._limit, self._max_batch = limit, max_batch
        self._waiting: OrderedDict[str, list[Item]] = OrderedDict()  # owner -> oldest first; the next owner first
        self._changed = asyncio.Event()
        self._pace = 1.0  # seconds per work, a running mean

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, item: Item) -> None:
        """Raises:
        ApiError: 429, with the seconds after which there may be room.
        """
        if len(self) >= self._limit:
            wait = max(1.0, self._pace * len(self) / 2)
            raise ApiError(429, "queue_full", f"{len(self)} pictures are waiting already.", retry_after=wait)
        self._waiting.setdefault(item.work.owner, []).append(item)
        self._changed.set()

    def took(self, works: int, seconds: float) -> None:
        """Learns how long a batch ran."""
        self._pace += 0.2 * (seconds / works - self._pace)

    def drop(self, gone: Callable[[Item], bool]) -> list[Item]:
        """Takes out those that ``gone`` says so of."""
        dropped = [item for items in self._waiting.values() for item in items if gone(item)]
        self._remove(dropped)
        return dropped

    async def next_batch(self, wait: float = 0.0) -> list[Item]:
        """Waits for work, and then ``wait`` seconds for more to go with it, unless the batch is full.

        Returns:
            At least one, all of one key.
        """
        while True:
            while not len(self):
                self._changed.clear()
                await self._changed.wait()
            end = time.monotonic() + wait
            while wait and len(self) and not self._is_full(self._choose()):
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), max(end - time.monotonic(), 0.0))
                except TimeoutError:
                    break
            if not len(self):  # whoever waited has gone
                continue
            batch = self._choose()
            self._remove(batch)
            owner = batch[0].work.owner
            if owner in self._waiting:
                self._waiting.move_to_end(owner)
            return batch

    def _choose(self) -> list[Item]:
        """The batch that would run now."""
        first = next(iter(self._waiting.values()))[0]
        if first.alone:
            return [first]
        mates = [item for items in self._waiting.values() for item in items if item.work.key == first.work.key]
        mates.sort(key=lambda item: (item is not first, item.arrived))
        chosen: list[Item] = []
        for item in mates[: self._max_batch]:
            tokens = sum(mate.tokens for mate in chosen) + item.tokens
            if chosen and self.max_tokens is not None and tokens > self.max_tokens:
                break
            chosen.append(item)
        return chosen

    def _is_full(self, batch: list[Item]) -> bool:
        if batch[0].alone or len(batch) >= self._max_batch:
            return True
        return self.max_tokens is not None and sum(i.tokens for i in batch) + batch[0].tokens > self.max_tokens

    def _remove(self, items: list[Any]) -> None:
        gone = set(map(id, items))
        for owner in list(self._waiting):
            kept = [item for item in self._waiting[owner] if id(item) not in gone]
            if kept:
                self._waiting[owner] = kept
            else:
                del self._waiting[owner]
