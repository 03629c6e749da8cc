"""/v1/videos: OpenAI's asynchronous videos."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from .checks import works_of
from .errors import ApiError, invalid
from .images import ERRORS, checked, form_of, split_form
from .state import note_model, owner_of, server_of
from .uploads import fitted, read_picture
from .video_store import QueueFullError, StorageError, VideoJob, VideoNotFoundError
from .video_workers import VideoWorkers
from .wire import VideoRequest

NOT_FOUND: dict[int | str, dict[str, Any]] = {401: ERRORS[401], 404: {"description": "No such video."}}
FILES = {"video": ("video.mp4", "video/mp4"), "thumbnail": ("thumbnail.webp", "image/webp")}
"""Variant -> name of the file, and its content type."""

Order = Literal["asc", "desc"]


def router(workers: VideoWorkers) -> APIRouter:
    """The routes, for the jobs that ``workers`` does."""
    routes = APIRouter(prefix="/v1/videos", tags=["videos"])
    store = workers.store

    @routes.post(
        "",
        responses=ERRORS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": VideoRequest.model_json_schema()},
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "required": ["prompt"],
                            "properties": {
                                **VideoRequest.model_json_schema()["properties"],
                                "input_reference": {"type": "string", "format": "binary"},
                            },
                        }
                    },
                },
            }
        },
    )
    async def create(request: Request) -> Response:
        """Queues a video; poll it by its id."""
        server = server_of(request)
        fields, uploads = await _fields(request)
        body = checked(VideoRequest, fields)
        facts = server.model(body.model, "video")
        note_model(request, facts.name)
        limits = server.config.limits
        # refused now rather than in the queue
        (work,) = works_of(body, facts, limits, request.state.request_id, owner_of(request), "video")
        if uploads:
            if not facts.edits:
                raise invalid("input_reference", f"{facts.name} starts from no picture.", "unsupported")
            picture = await asyncio.to_thread(read_picture, uploads[0], limits.upload_pixels, "input_reference")
            work = replace(work, images=(fitted(picture, (work.width, work.height)),))
        elif facts.needs_image:
            raise invalid("input_reference", f"{facts.name} starts from a picture: upload one.", "missing_image")
        try:
            job = await asyncio.to_thread(workers.add, work, facts.name, f"{work.frames / work.fps:g}", body.timeout)
        except QueueFullError as error:
            raise ApiError(429, "queue_full", str(error), retry_after=60) from None
        except StorageError as error:
            raise ApiError(507, "insufficient_storage", str(error)) from None
        return JSONResponse(video_object(job))

    @routes.get("", responses={401: ERRORS[401], 404: NOT_FOUND[404]})
    async def videos(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Order = "desc",
    ) -> dict[str, Any]:
        """Videos of this key, the latest first unless told otherwise."""
        with _not_found(after or ""):
            page = await asyncio.to_thread(store.list, owner_of(request), after, limit, order)
        return {
            "object": "list",
            "data": [video_object(job) for job in page.data],
            "has_more": page.has_more,
            "first_id": page.first_id,
            "last_id": page.last_id,
        }

    @routes.get("/{id}", responses=NOT_FOUND)
    async def video(request: Request, id: str) -> dict[str, Any]:
        """How far a video is."""
        with _not_found(id):
            return video_object(await asyncio.to_thread(store.get, id, owner_of(request)))

    @routes.delete("/{id}", responses=NOT_FOUND)
    async def delete(request: Request, id: str) -> dict[str, Any]:
        """Removes a video; one that is being made is stopped."""
        with _not_found(id):
            await asyncio.to_thread(store.delete, id, owner_of(request))
        workers.stop(id)
        return {"id": id, "object": "video.deleted", "deleted": True}

    @routes.get(
        "/{id}/content",
        responses={
            **NOT_FOUND,
            200: {"content": {"video/mp4": {}, "image/webp": {}}, "description": "The file."},
            409: {"description": "It is not made yet."},
        },
    )
    async def content(request: Request, id: str, variant: Literal["video", "thumbnail"] = "video") -> Response:
        """A video's file."""
        owner = owner_of(request)
        name, kind = FILES[variant]
        with _not_found(id):
            job = await asyncio.to_thread(store.get, id, owner)
            path = await asyncio.to_thread(store.path, id, owner, name)
        if path is None:
            raise ApiError(409, "video_not_ready", f"the video is {job.status}.")
        return FileResponse(path, media_type=kind, filename=f"{id}{path.suffix}")

    return routes


async def _fields(request: Request) -> tuple[dict[str, Any], list[bytes]]:
    """Fields and the uploaded picture of a request in JSON or as a form."""
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            fields = await request.json()
        except (ValueError, RecursionError):
            raise ApiError(400, "invalid_json", "the body is no JSON.") from None
        if not isinstance(fields, dict):
            raise ApiError(400, "invalid_json", "the body is no JSON object.")
        return fields, []
    async with form_of(request) as form:
        fields, uploads = split_form(form, ("input_reference",))
    if len(uploads["input_reference"]) > 1:
        raise invalid("input_reference", "input_reference: one picture is taken.")
    return fields, uploads["input_reference"]


class _not_found:
    """Turns the store's answer for an unknown id into a 404."""

    def __init__(self, id: str) -> None:
        self._id = id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, VideoNotFoundError):
            raise ApiError(404, "video_not_found", f"there is no video {self._id[:64]!r} of this key.") from None


def video_object(job: VideoJob) -> dict[str, Any]:
    """OpenAI's object of a video, and what was done."""
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "seconds": job.seconds,
        "size": job.size,
        "prompt": job.prompt,
        "error": None if job.error is None else dict(job.error),
        "remixed_from_video_id": None,
        "ddit": None if job.ddit is None else dict(job.ddit),
    }
