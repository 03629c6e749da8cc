"""A server in this process, on models that draw in milliseconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

from helpers.served import LocalServer, video_model

from ddit_rt.serve import ModelConfig, ServeConfig


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Wan pipeline on disk, text encoder and all."""
    return video_model(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Iterator[LocalServer]:
    """Serves the demo model and the tiny video model."""
    call = {"num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 24}
    config = ServeConfig(
        models=(
            ModelConfig(name="demo", model="demo", sizes=("64x64",), call={"num_inference_steps": 8}),
            ModelConfig(name="film", model=str(video_folder), sizes=("64x48",), call=call),
        ),
        folder=str(tmp_path_factory.mktemp("serve")),
    )
    with LocalServer(config) as running:
        yield running


@pytest.fixture
def loop() -> Iterator[Any]:
    """Runs coroutines on an event loop of its own thread."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, made).result(60)
    made.call_soon_threadsafe(made.stop)
    thread.join()
