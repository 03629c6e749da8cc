"""The application: routes, errors, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from . import images, playground, videos
from .errors import ApiError
from .gateway import Gateway
from .keys import Keys
from .metrics import Metrics
from .middleware import RequestMiddleware, Scope, error_response
from .picture_store import PictureStore
from .settings import ServeConfig
from .state import Server, keep_expiring
from .video_workers import VideoWorkers
from .wire import model_object

OPEN = ("/health/live", "/health/ready", "/metrics", "/", "/openapi.json", "/favicon.ico")
"""Paths that need no key; below them those of the playground and of pictures under secret names."""


def create_app(config: ServeConfig, gateway: Gateway, metrics: Metrics | None = None, marks: bool = True) -> Any:
    """The ASGI application of a server.

    Args:
        config: Of the server.
        gateway: Where works are done.
        metrics: To count in; by default its own.
        marks: Write every request's id into its response; not where a proxy in front does.

    Raises:
        ConfigError: the keys cannot be read, or the folder cannot be used.
    """
    metrics = metrics or Metrics()
    folder = Path(config.folder)
    keep = config.keep_hours * 3600
    server = Server(
        config=config,
        gateway=gateway,
        metrics=metrics,
        keys=Keys(config.keys_file, config.limits.requests_per_minute),
        pictures=PictureStore(folder / "pictures", keep),
    )
    workers = VideoWorkers(server, folder / "videos", keep)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(work)
            for work in (
                server.get_ready(),
                workers.work(),
                keep_expiring(server.pictures.expire, keep),
                keep_expiring(workers.store.expire, keep),
            )
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers.close()

    app = FastAPI(title="ddit_rt", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    _add_error_handlers(app)
    app.include_router(images.router)
    app.include_router(videos.router(workers))
    _add_own_routes(app, server)
    if config.playground:
        app.mount("/playground", StaticFiles(directory=playground.FOLDER), name="playground")

    def admit(scope: Scope) -> None:
        path = scope["path"]
        if path in OPEN or path.startswith(("/playground/", "/v1/images/img_")):
            return
        headers = dict(scope["headers"])
        address = (scope.get("client") or ("unknown", 0))[0]
        try:
            authorization = headers.get(b"authorization")
            owner = server.keys.owner(None if authorization is None else authorization.decode("latin-1"), address)
            scope["state"] |= {"owner": owner, "log": {"owner": owner.name}}
            if scope["method"] == "POST":
                server.check_open()
                server.keys.count(owner)
        except ApiError as error:
            metrics.rejected.labels("", error.code).inc()
            raise

    def observe(scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other")
        model = scope.get("state", {}).get("model", "")
        metrics.requests.labels(model, endpoint, str(status)).inc()
        metrics.request_seconds.labels(model, endpoint).observe(seconds)

    return _Application(app, RequestMiddleware(app, config.limits.upload_bytes, admit, observe, marks), server)


class _Application:
    """The whole, with the parts that its owner reaches for."""

    def __init__(self, app: FastAPI, outer: RequestMiddleware, server: Server) -> None:
        self.app, self.server, self._outer = app, server, outer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._outer(scope, receive, send)


def _add_own_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["health"], responses={503: {"description": "Models are being loaded."}})
    async def ready() -> Response:
        """Every model is warm, and requests are taken."""
        models = sorted(server.models)
        status = "draining" if server.draining else "ready" if server.models else "loading"
        return JSONResponse({"status": status, "models": models}, 200 if status == "ready" else 503)

    @app.get("/metrics", tags=["health"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        text, kind = server.metrics.text()
        return Response(text, media_type=kind)

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The served models, the default first."""
        server.check_open()
        return {"object": "list", "data": [model_object(facts) for facts in server.models.values()]}

    @app.get("/v1/models/{model}", tags=["models"], responses={404: {"description": "No such model."}})
    async def one_model(model: str) -> dict[str, Any]:
        server.check_open()
        return model_object(server.model(model))

    if server.config.playground:

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            headers = {"content-security-policy": playground.CONTENT_SECURITY_POLICY}
            return FileResponse(playground.FOLDER / "index.html", headers=headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_response(images.first_error(error.errors(), of_request=True))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        return error_response(ApiError(error.status_code, codes.get(error.status_code, "invalid"), str(error.detail)))
