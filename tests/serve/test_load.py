"""Many requests of several kinds at once: none is lost, none gets another's picture."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from typing import Any

import httpx
import numpy as np
from helpers.served import LocalServer
from PIL import Image


def _all(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[np.ndarray]:
    async def run() -> list[np.ndarray]:
        gate = asyncio.Semaphore(at_once)

        async def one(body: dict[str, Any]) -> np.ndarray:
            async with gate:
                answer = (await client.post("/v1/images/generations", json=body)).raise_for_status().json()
            assert answer["ddit"]["seeds"] == [body["seed"]] and answer["size"] == body["size"]
            picture = base64.b64decode(answer["data"][0]["b64_json"])
            return np.asarray(Image.open(io.BytesIO(picture))).astype(int)

        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return list(await asyncio.gather(*(one(body) for body in bodies)))

    return asyncio.run(run())


def test_every_picture_is_the_one_made_alone_with_its_seed(server: LocalServer) -> None:
    draw = random.Random(0)
    bodies = [
        {
            "prompt": draw.choice(("a red apple", "zebras behind a fence", "a yellow star")),
            "size": draw.choice(("64x64", "48x64", "64x48")),
            "seed": draw.randrange(2**31),
            "steps": draw.choice((4, 6)),
            "speedup": draw.choice((1, 2)),
        }
        for _ in range(48)
    ]
    together, alone = _all(server.url, bodies, 16), _all(server.url, bodies, 1)
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(together, alone))
    # pictures of different seeds have nothing to do with each other
    same = [i for i, body in enumerate(bodies) if body["size"] == bodies[0]["size"]]
    assert all(np.abs(together[same[0]] - together[i]).max() > 30 for i in same[1:])
    end = time.monotonic() + 10  # a result is there a moment before its batch is over
    while server.engines["demo"].busy():
        assert time.monotonic() < end
        time.sleep(0.005)
