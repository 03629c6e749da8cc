"""Measures `ddit-rt serve` with the demo model, and checks that load mixes nothing up. Needs the extra ``serve``.

    python benchmarks/serve_suite.py --output benchmarks/results/serve

In one run, by turns, so that a disturbance of the machine meets all: batches against none, plain against accelerated.
Then every picture of a mixed load against the same request alone; 1,000 connections that send nothing; memory over 500
requests. Two servers run side by side, and only one of them works at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from store import ROOT, versions

from ddit_rt.serve import Load, run_load, summarize

SIZES = ("128x128", "96x96", "128x64")
PROMPTS = ("a red apple on a black background", "zebras behind a fence", "a striped blue ball and a yellow star")
STEPS = 20


@contextmanager
def serving(folder: Path, max_batch: int) -> Iterator[tuple[str, int]]:
    """A server with one replica of one thread; its URL and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = {"name": "demo", "model": "demo", "cpus": 0.5, "threads": 1, "max_batch": max_batch, "sizes": list(SIZES)}
    model["batch_wait"] = 0.05
    settings = folder / f"serve-{max_batch}.json"
    limits = {"waiting": 128}
    settings.write_text(json.dumps({"models": [model], "port": port, "folder": str(folder / "kept"), "limits": limits}))
    log = folder / f"log-{max_batch}"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "ddit_rt.cli", "serve", "--config", str(settings)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        while f"at {url}" not in log.read_text(errors="replace"):
            if process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-2000:])
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def batching(urls: dict[int, str], rounds: int, requests: int) -> list[dict[str, Any]]:
    """Pictures per second of 16 clients with batches of several and of one, in turns; ratios by round."""
    found = []
    for index in range(rounds):
        rates = {}
        for size in sorted(urls, reverse=bool(index % 2)):
            load = Load(levels=(16.0,), requests=requests, rounds=1, warmup=0, speedups=(3.0,), steps=STEPS, seed=index)
            (summary,) = summarize(run_load(urls[size], load)[1])
            rates[size] = {"per_second": summary.throughput.middle, "batch": summary.batch}
        largest = max(rates)
        found.append({"rates": rates, "ratio": rates[largest]["per_second"] / rates[1]["per_second"]})
        print("batching", found[-1], flush=True)
    return found


async def _all(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[np.ndarray]:
    gate = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> np.ndarray:
        async with gate:
            answer = (await client.post("/v1/images/generations", json=body)).raise_for_status()
        picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(picture))).astype(int)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return list(await asyncio.gather(*(one(client, body) for body in bodies)))


def mixing(url: str, count: int) -> dict[str, Any]:
    """A mixed load of 16 clients, then every request once more alone: how far the pictures are apart."""
    draw = random.Random(0)
    bodies = [
        {
            "prompt": draw.choice(PROMPTS),
            "size": draw.choice(SIZES),
            "seed": draw.randrange(2**31),
            "steps": draw.choice((8, 12)),
            "speedup": draw.choice((1, 2, 3)),
        }
        for _ in range(count)
    ]
    began = time.perf_counter()
    together = asyncio.run(_all(url, bodies, 16))
    seconds = time.perf_counter() - began
    alone = asyncio.run(_all(url, bodies, 1))
    levels = [int(np.abs(one - other).max()) for one, other in zip(together, alone)]
    pixels = [float((one != other).mean()) for one, other in zip(together, alone)]
    return {
        "requests": count,
        "pictures": len(together),
        "seconds": seconds,
        "largest_difference_in_levels": max(levels),
        "share_of_values_that_differ": float(np.mean(pixels)),
    }


def silence(url: str, count: int) -> dict[str, Any]:
    """Seconds of a picture while so many connections send nothing, and without them."""
    host, port = url.removeprefix("http://").split(":")
    body = {"prompt": PROMPTS[0], "seed": 1, "steps": 8}

    def seconds() -> float:
        began = time.perf_counter()
        asyncio.run(_all(url, [body], 1))
        return time.perf_counter() - began

    seconds()
    before = [seconds() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection((host, int(port))))
        held = [seconds() for _ in range(3)]
    return {"connections": count, "seconds_without": before, "seconds_with": held}


def memory(url: str, pid: int, count: int) -> list[dict[str, float]]:
    """Resident MiB of the replica, the ingress and the proxy after every 20 requests; every tenth client goes away."""
    names = {"replica": "ServeReplica:ddit_rt:demo", "ingress": "ServeReplica:ddit_rt:ingress", "proxy": "ProxyActor"}
    inside = psutil.Process(pid).children(recursive=True)
    lines = {process: " ".join(process.cmdline()) for process in inside if process.is_running()}
    parts = {name: next(p for p, line in lines.items() if text in line) for name, text in names.items()}
    draw, found = random.Random(1), []
    for done in range(0, count, 20):
        bodies = [
            {"prompt": draw.choice(PROMPTS), "size": draw.choice(SIZES), "seed": i, "steps": 4, "speedup": 1}
            for i in range(18)
        ]
        asyncio.run(_all(url, bodies, 8))
        for _ in range(2):
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/images/generations", json={**bodies[0], "steps": 100}, timeout=0.2)
        found.append(
            {"requests": done + 20}
            | {name: process.memory_info().rss / 2**20 for name, process in parts.items()}
            | {"files": sum(process.num_fds() for process in parts.values())}
        )
    return found


def plot(points: list[dict[str, float]], path: Path) -> None:
    """Memory over requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name in ("replica", "ingress", "proxy"):
        axis.plot([point["requests"] for point in points], [point[name] for point in points], label=name)
    axis.set_xlabel("requests")
    axis.set_ylabel("resident memory, MiB")
    axis.set_ylim(0)
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="of the mixed load and of plain against accelerated")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"versions": versions(), "cpus": psutil.cpu_count(), "sizes": SIZES, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), 4) as (url, pid):
        with serving(Path(folder), 1) as (single, _):
            result["batching"] = batching({4: url, 1: single}, given.rounds, 48)
        load = Load(
            levels=(16.0,),
            requests=given.requests,
            rounds=4,
            speedups=(1.0, 3.0),
            sizes=SIZES,
            steps=STEPS,
            stream=True,
        )
        result["load"] = [asdict(summary) for summary in summarize(run_load(url, load)[1])]
        print("load", result["load"], flush=True)
        result["mixing"] = mixing(url, given.requests)
        print("mixing", result["mixing"], flush=True)
        result["silence"] = silence(url, 1000)
        print("silence", result["silence"], flush=True)
        result["memory"] = memory(url, pid, 500)
    (given.output / "serve.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result["memory"], ROOT / "docs" / "demo" / "serve-memory.png")


if __name__ == "__main__":
    main()
