"""Which works run together, and who is next."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt.serve.errors import ApiError
from ddit_rt.serve.queue import Item, WorkQueue
from ddit_rt.serve.work import Work


def _item(owner: str = "", steps: int = 4, tokens: int = 10, width: int = 64, deadline: float = 1e12) -> Item:
    work = Work("req", "a", 0, width, 64, steps, deadline, owner)
    return Item(work, tokens)


def _batches(items: list[Item], **limits: Any) -> list[list[Item]]:
    async def drain() -> list[list[Item]]:
        queue = WorkQueue(1000, **limits)
        for item in items:
            queue.put(item)
        found = []
        while len(queue):
            found.append(await queue.next_batch())
        return found

    return asyncio.run(drain())


def test_works_of_one_key_run_together_oldest_first() -> None:
    items = [_item(), _item(steps=9), _item(), _item(), _item(steps=9)]
    assert _batches(items, max_batch=2) == [[items[0], items[2]], [items[1], items[4]], [items[3]]]


def test_owners_take_turns() -> None:
    busy = [_item("busy", width=64 * (i + 1)) for i in range(4)]
    late = _item("late", width=640)
    order = [batch[0] for batch in _batches([*busy, late], max_batch=4)]
    assert order == [busy[0], late, *busy[1:]]


def test_a_batch_takes_along_others_of_its_key_whoever_owns_them() -> None:
    a, b, c = _item("a"), _item("b", steps=7), _item("c")
    assert _batches([a, b, c], max_batch=4) == [[a, c], [b]]


def test_what_runs_alone_keeps_its_place() -> None:
    items = [_item(), _item(), _item()]
    for item in items:
        item.alone = True
    assert _batches(items, max_batch=4) == [[items[0]], [items[1]], [items[2]]]


def test_no_negative_prompt_and_an_empty_one_are_two_keys() -> None:
    none, empty = _item(), _item()
    empty.work = dataclasses.replace(empty.work, negative_prompt="")
    assert _batches([none, empty], max_batch=4) == [[none], [empty]]


def test_a_batch_stays_within_its_tokens_but_one_work_always_runs() -> None:
    items = [_item(tokens=40), _item(tokens=40), _item(tokens=40), _item(tokens=500, steps=9)]
    assert [len(batch) for batch in _batches(items, max_batch=8, max_tokens=100)] == [2, 1, 1]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 60)), max_size=30),
    st.integers(1, 5),
    st.none() | st.integers(10, 120),
)
def test_nothing_is_lost_mixed_up_or_starved(
    works: list[tuple[str, int, int]], max_batch: int, max_tokens: int | None
) -> None:
    items = [_item(owner, steps, tokens) for owner, steps, tokens in works]
    batches = _batches(items, max_batch=max_batch, max_tokens=max_tokens)
    assert sorted(id(item) for batch in batches for item in batch) == sorted(map(id, items))
    for batch in batches:
        assert len({item.work.key for item in batch}) == 1 and len(batch) <= max_batch
        if max_tokens is not None and len(batch) > 1:
            assert sum(item.tokens for item in batch) <= max_tokens
    # of one owner and one key, the order of arrival
    for owner, steps in {(owner, steps) for owner, steps, _ in works}:
        mine = [i for batch in batches for i in batch if (i.work.owner, i.work.steps) == (owner, steps)]
        assert mine == [i for i in items if (i.work.owner, i.work.steps) == (owner, steps)]
    # the oldest of every owner waits for no more batches than there are owners before it
    first = {owner: next(i for i in items if i.work.owner == owner) for owner, _, _ in works}
    for place, item in enumerate(first.values()):
        assert next(n for n, batch in enumerate(batches) if item in batch) <= place


def test_a_full_queue_says_when_to_come_again() -> None:
    async def fill() -> ApiError:
        queue = WorkQueue(2, 4)
        queue.took(1, 6.0)
        queue.put(_item())
        queue.put(_item())
        with pytest.raises(ApiError) as caught:
            queue.put(_item())
        return caught.value

    error = asyncio.run(fill())
    assert (error.status, error.code) == (429, "queue_full") and error.retry_after is not None
    assert error.retry_after >= 1


def test_it_waits_for_mates_while_a_batch_is_not_full() -> None:
    async def come_late() -> tuple[list[Item], list[Item], float]:
        queue = WorkQueue(10, 2)
        first, second, third = _item(), _item(), _item()
        queue.put(first)

        async def later() -> None:
            await asyncio.sleep(0.05)
            queue.put(second)

        task = asyncio.create_task(later())
        began = time.monotonic()
        both = await queue.next_batch(5.0)  # full as soon as the second is there
        took = time.monotonic() - began
        await task
        queue.put(third)
        alone = await queue.next_batch(0.01)
        assert (both, alone) == ([first, second], [third])
        return both, alone, took

    assert asyncio.run(come_late())[2] < 4


def test_who_has_gone_is_dropped_even_while_a_batch_waits() -> None:
    async def leave() -> list[Item]:
        queue = WorkQueue(10, 4)
        gone, stays = _item(), _item(steps=9)
        queue.put(gone)
        waiting = asyncio.create_task(queue.next_batch(0.2))
        await asyncio.sleep(0.05)
        assert queue.drop(lambda item: item is gone) == [gone]
        queue.put(stays)
        assert await waiting == [stays]
        return [stays]

    asyncio.run(leave())


def test_an_item_is_alive_until_its_deadline_or_until_nobody_waits() -> None:
    item = _item(deadline=time.time() + 60)
    assert item.alive()
    item.wanted = False
    assert not item.alive()
    assert not _item(deadline=time.time() - 1).alive()
