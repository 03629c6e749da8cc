"""Load tests of a running server: closed or open loop, plain against accelerated in one run.

In a closed loop a number of clients each send their next request when the last one is answered; in an open loop
requests arrive at random (Poisson) whatever the server does, as from many independent users. At each level of load
plain and accelerated take turns in rounds, with the same prompts, sizes and seeds, so that a disturbance of the machine
meets both.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo

from ..errors import ConfigError
from ..settings import Expected, Settings, shown
from .bench_client import Outcome, ask, connect, list_models
from .settings import parse_size

if TYPE_CHECKING:
    import httpx

PARTIAL_IMAGES = 3
_PROMPTS = (
    "a red fox in the snow",
    "two boats on a lake at dawn",
    "a bowl of oranges on a blue table",
    "a lighthouse under a storm",
)


def _distinct(values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
    if len(set(values)) < len(values):
        raise ConfigError(f"{info.field_name}={shown(values)}: the values have to differ.")
    return values


class Load(Settings):
    """What a load test sends, and how.

    Raises:
        ConfigError: a value is out of range.
    """

    mode: Literal["closed", "open"] = "closed"
    """By number of clients, or by rate of arrival."""
    levels: Annotated[
        tuple[float, ...], Field(min_length=1), AfterValidator(_distinct), Expected("distinct numbers above 0.")
    ] = (16.0,)
    """Clients, or requests per second; each is measured."""
    requests: Annotated[int, Field(ge=1), Expected("a whole number from 1 on.")] = 200
    """For each level and speed-up, over all rounds."""
    rounds: Annotated[int, Field(ge=1), Expected("a whole number from 1 on.")] = 4
    """Turns that plain and accelerated take at each level."""
    warmup: Annotated[int, Field(ge=0), Expected("a whole number from 0 on.")] = 8
    """Requests of each speed-up before all others, which are not counted."""
    speedups: Annotated[
        tuple[float, ...], Field(min_length=1), AfterValidator(_distinct), Expected("distinct numbers from 1 on.")
    ] = (1.0, 3.0)
    """Compared; 1 is plain."""
    model: Annotated[str | None, Expected("a name that the server lists.")] = None
    """None takes the first model of images that the server lists."""
    sizes: Annotated[tuple[str, ...], Expected("sizes such as 128x128.")] = ()
    """Drawn from at random; empty takes the model's default."""
    steps: Annotated[int | None, Field(ge=1), Expected("a whole number from 1 on, or None.")] = None
    """Denoising steps; None leaves them to the model."""
    prompts: Annotated[tuple[str, ...], Expected("texts.")] = ()
    """Drawn from at random; empty takes those that the server lists with the model."""
    stream: Annotated[bool, Expected("use True or False.")] = False
    """Asks for partial images, and times the first."""
    seed: Annotated[int, Field(ge=0), Expected("a whole number from 0 on.")] = 0
    """Of what is drawn: prompts, sizes, the pictures' seeds, times of arrival."""
    timeout: Annotated[float, Field(gt=0), Expected("seconds above 0.")] = 300.0
    """Seconds after which a request is given up, and lost."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for level in self.levels:
            whole = self.mode == "open" or level == int(level)
            if not 0 < level <= 10_000 or not whole:
                what = "rates above 0" if self.mode == "open" else "whole numbers of clients from 1 on"
                raise ConfigError(f"levels={shown(self.levels)}: {what}, up to 10000.")
        if min(self.speedups) < 1:
            raise ConfigError(f"speedups={shown(self.speedups)}: numbers from 1, which is plain, on.")
        if self.rounds > self.requests:
            raise ConfigError(f"rounds={self.rounds}: no more than the {self.requests} requests that they share.")
        for size in self.sizes:
            try:
                parse_size(size)
            except ValueError:
                raise ConfigError(f"sizes={shown(self.sizes)}: write width x height, as in 128x128.") from None

    def completed_by(self, models: Sequence[Mapping[str, Any]]) -> Self:
        """These settings, what they leave open taken from the server's list of models.

        Raises:
            ConfigError: the model is not among them, or there is none.
        """
        images = [one for one in models if (one.get("ddit") or {}).get("kind", "image") == "image"]
        found = next((one for one in images if self.model in (None, one["id"])), None)
        if found is None:
            raise ConfigError(
                f"model={shown(self.model)}: the server makes images with {shown([m['id'] for m in images])}."
            )
        told = found.get("ddit") or {}
        size = told.get("default_size")
        return self.replace(
            model=found["id"],
            sizes=self.sizes or ((size,) if size else ()),
            prompts=self.prompts or tuple(told.get("prompts") or _PROMPTS),
        )


@dataclass(frozen=True)
class Block:
    """One turn: the requests of a round at one level and speed-up."""

    level: float
    speedup: float
    round: int
    seconds: float
    """From the turn's start to the last end."""
    behind: float
    """Seconds by which the latest request was sent after it was due; large values say that this machine is too busy
    to send, and nothing of the server."""
    outcomes: tuple[Outcome, ...]


def run_load(
    url: str, load: Load, api_key: str | None = None, show: Callable[[str], None] = lambda text: None
) -> tuple[Load, list[Block]]:
    """Drives a server.

    Args:
        url: Of the server.
        load: What to send.
        api_key: For servers that ask for one.
        show: Told what is going on.

    Returns:
        The load with everything named that it left open, and one block per level, round and speed-up.

    Raises:
        ConfigError: no server answers, it does not serve the model, or it makes no picture in the warm-up.
    """
    return asyncio.run(_run(url, load, api_key, show))


def arrivals(rate: float, number: int, random: Random) -> list[float]:
    """Times of a Poisson process, in seconds from 0.

    Args:
        rate: Arrivals per second in the mean.
        number: How many.
        random: Source of the gaps between them.
    """
    times, now = [], 0.0
    for _ in range(number):
        now += random.expovariate(rate)
        times.append(now)
    return times


def draw_requests(load: Load, number: int, random: Random) -> list[dict[str, Any]]:
    """Bodies of requests without a speed-up, which is set where they are sent."""
    fixed: dict[str, Any] = {"model": load.model, "n": 1, "response_format": "b64_json"}
    if load.steps is not None:
        fixed["steps"] = load.steps
    if load.stream:
        fixed.update(stream=True, partial_images=PARTIAL_IMAGES)
    drawn = []
    for _ in range(number):
        body = {**fixed, "prompt": random.choice(load.prompts), "seed": random.randrange(2**31)}
        if load.sizes:
            body["size"] = random.choice(load.sizes)
        drawn.append(body)
    return drawn


async def _run(url: str, load: Load, api_key: str | None, show: Callable[[str], None]) -> tuple[Load, list[Block]]:
    async with connect(url, api_key) as client:
        load = load.completed_by(await list_models(client))
        await _warm_up(client, load, show)
        blocks = []
        for level in load.levels:
            for round in range(load.rounds):
                turn = round % len(load.speedups)
                for speedup in (*load.speedups[turn:], *load.speedups[:turn]):
                    show(f"{load.mode} {level:g}, round {round + 1} of {load.rounds}, {speedup:g}x")
                    blocks.append(await _block(client, load, level, round, speedup))
        return load, blocks


async def _warm_up(client: httpx.AsyncClient, load: Load, show: Callable[[str], None]) -> None:
    clients = int(load.levels[0]) if load.mode == "closed" else 1
    for speedup in load.speedups if load.warmup else ():
        show(f"warming up, {speedup:g}x")
        bodies = draw_requests(load, load.warmup, Random(f"{load.seed} warm-up"))
        outcomes, _ = await _closed(partial(_send, client, load, speedup), bodies, clients)
        if all(outcome.code is not None for outcome in outcomes):
            why = Counter(str(outcome.code) for outcome in outcomes).most_common(1)[0][0]
            raise ConfigError(f"speedup={speedup:g}: no picture in a warm-up of {load.warmup} requests ({why}).")


async def _block(client: httpx.AsyncClient, load: Load, level: float, round: int, speedup: float) -> Block:
    number = load.requests * (round + 1) // load.rounds - load.requests * round // load.rounds
    random = Random(f"{load.seed} {level} {round}")  # no speed-up: all are asked the same
    bodies = draw_requests(load, number, random)
    send = partial(_send, client, load, speedup)
    begin = time.perf_counter()
    if load.mode == "closed":
        outcomes, behind = await _closed(send, bodies, int(level))
    else:
        outcomes, behind = await _open(send, bodies, arrivals(level, number, random))
    return Block(level, speedup, round, time.perf_counter() - begin, behind, tuple(outcomes))


async def _send(client: httpx.AsyncClient, load: Load, speedup: float, body: Mapping[str, Any], due: float) -> Outcome:
    return await ask(client, {**body, "speedup": speedup}, due, load.timeout)


async def _closed(send: Callable, bodies: Sequence[Mapping[str, Any]], clients: int) -> tuple[list[Outcome], float]:
    waiting, outcomes = iter(bodies), []

    async def one_client() -> None:
        for body in waiting:
            outcomes.append(await send(body, time.perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(bodies))):
            group.create_task(one_client())
    return outcomes, 0.0


async def _open(
    send: Callable, bodies: Sequence[Mapping[str, Any]], times: Sequence[float]
) -> tuple[list[Outcome], float]:
    begin, behind, tasks = time.perf_counter(), 0.0, []
    async with asyncio.TaskGroup() as group:
        for body, arrival in zip(bodies, times, strict=True):
            due = begin + arrival
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            behind = max(behind, time.perf_counter() - due)
            tasks.append(group.create_task(send(body, due)))
    return [task.result() for task in tasks], behind
