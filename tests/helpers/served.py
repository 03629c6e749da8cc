"""A server of ddit_rt in this process, and a video model for it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

import uvicorn
from helpers import tiny
from helpers.videos import text_parts

from ddit_rt.serve import ServeConfig
from ddit_rt.serve.app import create_app
from ddit_rt.serve.engine import Engine
from ddit_rt.serve.gateway import LocalGateway
from ddit_rt.serve.loading import load, warm


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalServer:
    """uvicorn in a thread, engines on its event loop, no Ray.

    Args:
        config: Its port is not used.

    Attributes:
        url: Of the server.
        engines: Name -> engine.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.engines: dict[str, Engine] = {}
        self._loop = asyncio.new_event_loop()
        self._server: uvicorn.Server | None = None
        self._port = port
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    async def _run(self) -> None:
        for model in self.config.models:
            engine = self.engines[model.name] = load(model, self.config.limits.waiting)
            await engine.start()
            await warm(engine)
        self.application: Any = create_app(self.config, LocalGateway(self.engines))
        self._server = uvicorn.Server(uvicorn.Config(self.application, port=self._port, log_level="error"))
        await self._server.serve()
        for engine in self.engines.values():
            await engine.close()

    def __enter__(self) -> Self:
        self._thread.start()
        end = time.monotonic() + 120
        while time.monotonic() < end and self._thread.is_alive():
            with suppress(OSError):
                connection = HTTPConnection("127.0.0.1", self._port)
                connection.request("GET", "/health/ready")
                if connection.getresponse().status == 200:
                    return self
            time.sleep(0.1)
        raise RuntimeError("the server did not come up")

    def __exit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(30)


def video_model(folder: Path) -> Path:
    """Saves a WanPipeline of random weights with a text encoder, and returns its folder."""
    pipe = tiny.wan()
    pipe.register_modules(**text_parts(), vae=tiny.wan_vae())
    pipe.save_pretrained(folder)
    return folder
