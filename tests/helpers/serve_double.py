"""A small server that speaks the server's HTTP interface and paints at once: what the playground is tested against."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image
from starlette.staticfiles import StaticFiles

from ddit_rt.serve.playground import CONTENT_SECURITY_POLICY, FOLDER

HTML = '<img src="x" onerror="window.executed = true"><script>window.executed = true</script>'
FAR = 2
"""By how many levels the accelerated picture differs from the plain one, in every value."""
STEPS = [1, 1, 1, 0, 2, 0, 2, 0, 4, 1]
MODELS: dict[str, dict[str, Any]] = {
    "painter": {"kind": "image", "sizes": ["64x64", "96x64"], "default_size": "64x64", "edits": True, "masks": True},
    HTML: {"kind": "image", "sizes": ["64x64"], "default_size": "64x64", "edits": False, "negative_prompt": False},
    "filmer": {"kind": "video", "sizes": ["96x64"], "default_size": "96x64", "edits": False},
}


class Double:
    """The application and what it was asked: ``asked`` holds (method, path, fields, authorization) in order."""

    def __init__(self, pause: float = 0.02) -> None:
        self.pause = pause
        """Seconds between two pictures of a stream."""
        self.asked: list[tuple[str, str, dict[str, Any], str | None]] = []
        self.cut = threading.Event()
        """Set when a client has gone in the middle of a stream."""
        self.go_on = threading.Event()
        """While it is not set, a stream waits behind its first preview."""
        self.videos: dict[str, dict[str, Any]] = {}
        self.app = self._app()
        self.forget()

    def forget(self) -> None:
        """As if nobody had asked anything yet."""
        self.asked.clear()
        self.videos.clear()
        self.cut.clear()
        self.go_on.set()

    def fields_of(self, path: str) -> list[dict[str, Any]]:
        """The fields of every POST to a path."""
        return [fields for method, asked, fields, _ in self.asked if (method, asked) == ("POST", path)]

    def _app(self) -> FastAPI:
        app = FastAPI()
        app.mount("/playground", StaticFiles(directory=FOLDER))

        @app.middleware("http")
        async def policy(request: Request, go_on: Any) -> Response:
            response: Response = await go_on(request)
            response.headers["content-security-policy"] = CONTENT_SECURITY_POLICY
            response.headers["x-request-id"] = "req-7"
            return response

        app.add_api_route("/", self._index)
        app.add_api_route("/v1/models", self._models)
        app.add_api_route("/v1/images/generations", self._images, methods=["POST"])
        app.add_api_route("/v1/images/edits", self._images, methods=["POST"])
        app.add_api_route("/v1/videos", self._create, methods=["POST"])
        app.add_api_route("/v1/videos/{name}", self._video, methods=["GET", "DELETE"])
        app.add_api_route("/v1/videos/{name}/content", self._content)
        return app

    async def _index(self) -> Response:
        return FileResponse(FOLDER / "index.html")

    async def _note(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").startswith("multipart/"):
            async with request.form() as form:
                fields = {name: v if isinstance(v, str) else (v.filename, await v.read()) for name, v in form.items()}
        else:
            body = await request.body()
            fields = json.loads(body) if body else {}
        self.asked.append((request.method, request.url.path, fields, request.headers.get("authorization")))
        return fields

    async def _models(self, request: Request) -> Response:
        await self._note(request)
        if request.headers.get("authorization") == "Bearer wrong":
            return refused(401, "Incorrect API key provided", "authentication_error", None)
        common = {"steps": len(STEPS), "guidance": 3.0, "speedup": 2.0, "loras": [], "prompts": ["a red cube", HTML]}
        data = [{"id": name, "object": "model", "ddit": {**common, **facts}} for name, facts in MODELS.items()]
        return JSONResponse({"object": "list", "data": data})

    async def _images(self, request: Request) -> Response:
        fields = await self._note(request)
        if "refuse" in fields["prompt"]:
            response = refused(429, f"Too many: {HTML}", "rate_limit_error", "queue_full")
            response.headers["retry-after"] = "3"
            return response
        return StreamingResponse(self._stream(fields), media_type="text/event-stream")

    async def _stream(self, fields: dict[str, Any]) -> AsyncIterator[bytes]:
        accelerated = float(fields["speedup"]) > 1
        width, height = map(int, fields["size"].split("x"))
        endless = "endless" in fields["prompt"]
        try:
            for index in range(100_000 if endless else int(fields["partial_images"])):
                await asyncio.sleep(self.pause)
                at = {"step": min(2 + 3 * index, len(STEPS)), "steps": len(STEPS)}
                yield event("partial_image", picture(width, height, blur=3 - min(index, 2)), at, index)
                if "break" in fields["prompt"]:
                    fault = {"message": f"Broke: {HTML}", "type": "server_error", "param": None, "code": "broken"}
                    yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': fault})}\n\n".encode()
                    return
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(self.pause)
            done = account(STEPS if accelerated else [1] * len(STEPS), int(fields["seed"]))
            yield event("completed", picture(width, height, by=FAR if accelerated else 0), done)
        except (asyncio.CancelledError, GeneratorExit):
            self.cut.set()
            raise

    async def _create(self, request: Request) -> Response:
        fields = await self._note(request)
        name = f"video_{len(self.videos) + 1}"
        self.videos[name] = {"id": name, "object": "video", "status": "queued", "progress": 0, "error": None, **fields}
        return JSONResponse(self.videos[name])

    async def _video(self, request: Request, name: str) -> Response:
        await self._note(request)
        if name not in self.videos:
            return refused(404, f"No video {name}", "not_found_error", "video_not_found")
        if request.method == "DELETE":
            del self.videos[name]
            return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})
        job = self.videos[name]
        if "fail" in job["prompt"]:
            job.update(status="failed", error={"code": "out_of_memory", "message": "No room for 96x64"})
        elif "endless" in job["prompt"] or job["status"] == "queued":
            job.update(status="in_progress", progress=40)
        else:
            job.update(status="completed", progress=100, ddit=account(STEPS, int(job["seed"])))
        return JSONResponse(job)

    async def _content(self, request: Request, name: str) -> Response:
        await self._note(request)
        return Response(b"\0" * 64, media_type="video/mp4")


def refused(status: int, message: str, kind: str, code: str | None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def picture(width: int, height: int, by: int = 0, blur: int = 1) -> str:
    """A PNG in base64: waves of colour, ``by`` levels brighter; squares of ``blur`` * 4 pixels if that is over 1."""
    y, x = np.mgrid[:height, :width].astype(float)
    if blur > 1:
        y, x = (np.floor(axis / (4 * blur)) * 4 * blur for axis in (y, x))
    waves = [np.sin(x / 9 + y / 17), np.sin(y / 11 - x / 23), np.cos(x / 13) * np.sin(y / 7)]
    values = (110 + 90 * np.stack(waves, -1)).round().astype(np.uint8) + np.uint8(by)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def account(steps: list[int], seed: int) -> dict[str, Any]:
    """The ``ddit`` object of an answer."""
    sizes = {"p": steps.count(1), "2p": steps.count(2), "4p": steps.count(4), "skipped": steps.count(0)}
    spent = {"queued": 0.01, "encoding": 0.02, "denoising": 0.1 * sum(m > 0 for m in steps), "decoding": 0.03}
    speedup = len(steps) / sum({0: 0.0, 1: 1.0, 2: 0.25, 4: 0.0625}[multiple] for multiple in steps)
    said = {"speedup": speedup, "steps": steps, "sizes": sizes, "seconds": spent, "batch": 1}
    return {**said, "seeds": [seed], "request_id": "req-7"}


def event(kind: str, encoded: str, ddit: dict[str, Any], index: int | None = None) -> bytes:
    name = f"image_generation.{kind}"
    data = {"type": name, "b64_json": encoded, "created_at": int(time.time()), "output_format": "png", "ddit": ddit}
    if index is not None:
        data["partial_image_index"] = index
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


@contextmanager
def served(double: Double) -> Iterator[str]:
    """Serves a double on a free port of this host, and gives its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(double.app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


if __name__ == "__main__":
    with served(Double(pause=0.4)) as address:
        print(address, flush=True)
        threading.Event().wait()
