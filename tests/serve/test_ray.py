"""The whole server, as users start it: Ray, its proxy, replicas in processes of their own, and what happens to them."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from helpers.served import free_port
from PIL import Image

pytest.importorskip("ray", reason="the extra 'serve' is not installed")

SECONDS = 180


class Running:
    """``ddit-rt serve`` in a process.

    Args:
        folder: For its settings, its output and what it keeps.
        models: Of the settings.
    """

    def __init__(self, folder: Path, models: list[dict[str, Any]]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = folder / "serve.json"
        settings.write_text(json.dumps({"models": models, "port": self.port, "folder": str(folder / "kept")}))
        self.log = folder / f"log-{self.port}"
        command = [sys.executable, "-m", "ddit_rt.cli", "serve", "--config", str(settings)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        end = time.monotonic() + SECONDS
        while f"at {self.url}" not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def replicas(self, name: str) -> list[psutil.Process]:
        """The processes of a model's replicas."""
        inside = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in inside if f"ServeReplica:ddit_rt:{name}" in " ".join(process.cmdline())]

    def metric(self, name: str) -> float:
        """The sum of a metric's lines."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def end(self) -> None:
        """Ends what may be left of it."""
        try:
            everything = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            everything = []
        self.process.kill()
        self.process.wait()
        for process in everything:
            if process.is_running():
                process.kill()


DEMO = {"name": "demo", "model": "demo", "sizes": ["64x64"], "cpus": 0.5, "threads": 1}
LONG = {"seed": 3, "steps": 100, "speedup": 1, "size": "128x128"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = Running(tmp_path_factory.mktemp("ray"), [DEMO])
    yield server
    server.end()


def _pixels(picture: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))).astype(int)


def test_pictures_come_from_a_replica(running: Running) -> None:
    made = running.client.images.generate(prompt="a red apple", n=2, extra_body={"seed": 1, "steps": 8})
    assert made.data is not None and _pixels(made.data[1]).shape == (64, 64, 3)
    assert made.model_extra["ddit"]["seeds"] == [1, 2]  # type: ignore[index]
    events = [
        event.type
        for event in running.client.images.generate(
            prompt="a red apple", stream=True, partial_images=2, extra_body={"steps": 16}
        )
    ]
    assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    answer = httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x", "size": "60x60"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
    assert answer.headers["x-request-id"] and "," not in answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_device(running: Running, stream: bool) -> None:
    before = running.metric("ddit_cancelled_total")
    if stream:
        events = running.client.images.generate(prompt="a", stream=True, partial_images=3, extra_body=LONG)
        next(iter(events))
        events.close()
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "a", **LONG}, timeout=1.5)
    began = time.monotonic()
    made = running.client.images.generate(prompt="a", extra_body={"steps": 2, "speedup": 1})
    # a hundred steps would have taken much longer than what is left of one
    assert made.model_extra["ddit"]["seconds"]["queued"] < 3 and time.monotonic() - began < 10  # type: ignore[index]
    assert running.metric("ddit_cancelled_total") == before + 1
    assert running.metric("ddit_in_flight") == 0


def test_a_killed_replica_is_replaced_and_its_request_done_elsewhere(running: Running) -> None:
    alone = running.client.images.generate(prompt="zebras", extra_body=LONG)
    (replica,) = running.replicas("demo")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(lambda: running.client.images.generate(prompt="zebras", extra_body=LONG))
        while running.metric("ddit_in_flight") < 1:
            time.sleep(0.05)
        time.sleep(0.5)
        replica.kill()
        made = asked.result(SECONDS)
    assert made.data is not None and alone.data is not None
    assert np.array_equal(_pixels(made.data[0]), _pixels(alone.data[0]))
    assert running.metric("ddit_retries_total") == 1
    assert running.replicas("demo")[0].pid != replica.pid


def test_a_server_that_is_told_to_stop_finishes_what_it_has_begun(running: Running) -> None:
    made: list[Any] = []

    def ask() -> None:
        made.append(running.client.images.generate(prompt="zebras", extra_body=LONG))

    thread = threading.Thread(target=ask)
    thread.start()
    while running.metric("ddit_in_flight") < 1:
        time.sleep(0.05)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    refused = httpx.post(f"{running.url}/v1/images/generations", json={"prompt": "x"})
    assert refused.status_code == 503 and refused.headers["retry-after"]
    thread.join(SECONDS)
    assert made and made[0].data
    assert running.process.wait(60) == 0
    for process in psutil.process_iter(["cmdline"]):
        assert str(running.port) not in " ".join(process.info["cmdline"] or []) or process.pid == os.getpid()


@pytest.mark.thorough
def test_a_killed_server_loses_no_video_job(tmp_path: Path, video_folder: Path) -> None:
    call = {"num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 24}
    film = {"name": "film", "model": str(video_folder), "sizes": ["64x48"], "cpus": 0.5, "threads": 1, "call": call}
    first = Running(tmp_path, [film])
    try:
        body = {"steps": 100, "frames": 41, "speedup": 1}
        ids = [first.client.videos.create(prompt=str(i), extra_body=body if i < 2 else {}).id for i in range(10)]
        while first.client.videos.retrieve(ids[0]).progress < 1:
            time.sleep(0.05)
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
    finally:
        first.end()
    second = Running(tmp_path, [film])
    try:
        end = time.monotonic() + SECONDS
        while any(video.status in ("queued", "in_progress") for video in second.client.videos.list(limit=100)):
            assert time.monotonic() < end
            time.sleep(0.5)
        assert {video.id: video.status for video in second.client.videos.list()} == dict.fromkeys(ids, "completed")
    finally:
        second.end()


@pytest.mark.parametrize(
    "options, text",
    [
        pytest.param(["none-such"], "cannot be loaded", marks=pytest.mark.thorough),
        pytest.param(["--replicas", "1000"], "lower replicas", marks=pytest.mark.thorough),
        (["--config", "none.yaml"], "no such file"),
        (["--speedup", "0.5"], "speedup"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, options: list[str], text: str) -> None:
    place = ["--port", str(free_port()), "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "ddit_rt.cli", "serve", *options, *place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and text in done.stderr.splitlines()[-1], done.stderr[-2000:]
