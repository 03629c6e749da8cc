"""/v1/images: OpenAI's generations and edits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from ..errors import DDiTError
from .checks import works_of
from .errors import ApiError, invalid
from .state import Server, note_model, owner_of, server_of
from .uploads import fitted, mask_of, read_picture
from .wire import EditRequest, ImageRequest, base64_of, facts_of, now, quality_of, usage_of
from .work import MAX_IMAGES, Event, Kind, Work

T = TypeVar("T")

router = APIRouter(tags=["images"])
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "A value that is not taken.",
        401: "No API key, or an unknown one.",
        404: "No such model.",
        413: "Too large.",
        429: "Too many requests.",
        503: "Not ready, or stopping.",
        504: "Not done in time.",
        507: "No memory or no room for it.",
    }.items()
}
PICTURES: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "Pictures, or their events."},
}


@router.post("/v1/images/generations", responses=PICTURES)
async def generations(request: Request, body: ImageRequest) -> Response:
    """Draws pictures from a prompt."""
    server = server_of(request)
    facts = server.model(body.model, "image")
    note_model(request, facts.name)
    works = works_of(body, facts, server.config.limits, request.state.request_id, owner_of(request))
    return await _answer(request, server, facts.name, body, works, "image_generation")


@router.post(
    "/v1/images/edits",
    responses=PICTURES,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image", "prompt"],
                        "properties": {
                            **EditRequest.model_json_schema()["properties"],
                            "image": {"type": "string", "format": "binary"},
                            "mask": {"type": "string", "format": "binary"},
                        },
                    }
                }
            },
        }
    },
)
async def edits(request: Request) -> Response:
    """Changes an uploaded picture; with a mask, only where it is transparent or white."""
    server = server_of(request)
    async with form_of(request) as form:
        fields, uploads = split_form(form, ("image", "mask"))
        body = checked(EditRequest, fields)
        facts = server.model(body.model, "image")
        note_model(request, facts.name)
        if not facts.edits:
            raise invalid("model", f"{facts.name} changes no pictures.", "unsupported")
        if not uploads["image"]:
            raise invalid("image", "image is missing: upload a PNG, JPEG or WebP.", "missing_image")
        if len(uploads["image"]) > facts.images:
            most = "one picture" if facts.images == 1 else f"at most {facts.images} pictures"
            raise invalid("image", f"{len(uploads['image'])} images: {facts.name} takes {most}.")
        if len(uploads["mask"]) > 1:
            raise invalid("mask", f"{len(uploads['mask'])} masks: one is taken.")
        if uploads["mask"] and not facts.inpaints:
            raise invalid("mask", f"{facts.name} takes no mask.", "unsupported")
        limits = server.config.limits
        kind: Kind = "inpaint" if uploads["mask"] else "edit"
        works = works_of(body, facts, limits, request.state.request_id, owner_of(request), kind)
        size = works[0].width, works[0].height
        images, mask = await asyncio.to_thread(_pictures_of, uploads, size, limits.upload_pixels)
    works = [replace(work, images=tuple(images), mask=mask) for work in works]
    return await _answer(request, server, facts.name, body, works, "image_edit")


@router.get("/v1/images/{name}/content", responses={404: {"description": "It is not kept, or not any more."}})
async def content(request: Request, name: str) -> Response:
    """A picture that was asked for by URL."""
    path = server_of(request).pictures.find(name)
    if path is None:
        raise ApiError(404, "image_not_found", "there is no such picture, or not any more.")
    return FileResponse(path, media_type=f"image/{path.suffix[1:]}")


def _pictures_of(
    uploads: Mapping[str, Sequence[bytes]], size: tuple[int, int], max_pixels: int
) -> tuple[list[bytes], bytes | None]:
    pictures = [fitted(read_picture(data, max_pixels, "image"), size) for data in uploads["image"]]
    masks = [mask_of(read_picture(data, max_pixels, "mask"), size) for data in uploads["mask"]]
    return pictures, masks[0] if masks else None


# -- answers ----------------------------------------------------------------------------------------------------------


async def _answer(
    request: Request, server: Server, model: str, body: ImageRequest, works: Sequence[Work], name: str
) -> Response:
    if body.stream:
        events = server.run(model, works[0])
        accepted = await anext(events)  # what is refused at once is refused with its status
        assert accepted.type == "accepted"
        return StreamingResponse(_stream(events, body, works[0], name), media_type="text/event-stream")
    done = await while_connected(request, _all(server, model, works))
    fields = [await _picture(request, server, body, work, event) for work, event in zip(works, done)]
    return JSONResponse(
        {
            "created": now(),
            "data": fields,
            "background": "opaque",
            "output_format": works[0].format,
            "quality": quality_of(body, done[0].facts["speedup"]),
            "size": f"{works[0].width}x{works[0].height}",
            "usage": usage_of(done),
            "ddit": facts_of(done, works[0].request_id),
        }
    )


async def _all(server: Server, model: str, works: Sequence[Work]) -> list[Event]:
    """All works at once; if one fails, the others are stopped."""

    async def last(work: Work) -> Event:
        async with aclosing(server.run(model, work)) as events:
            async for event in events:
                if event.type == "done":
                    return event
        raise ApiError(500, "internal_error", "the replica gave no picture.")

    tasks = [asyncio.create_task(last(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _picture(request: Request, server: Server, body: ImageRequest, work: Work, event: Event) -> dict[str, Any]:
    if body.response_format != "url":
        return {"b64_json": base64_of(event.data), "revised_prompt": None}
    try:
        name = await asyncio.to_thread(server.pictures.add, event.data, work.format)
    except DDiTError as error:
        raise ApiError(507, "insufficient_storage", str(error)) from None
    return {"url": str(request.base_url.replace(path=f"/v1/images/{name}/content")), "revised_prompt": None}


async def _stream(events: AsyncGenerator[Event], body: ImageRequest, work: Work, name: str) -> AsyncIterator[str]:
    """Server-sent events: previews, and the picture or an error at last."""
    common: dict[str, Any] = {
        "size": f"{work.width}x{work.height}",
        "background": "opaque",
        "output_format": work.format,
    }
    async with aclosing(events) as told:
        try:
            async for event in told:
                common |= {"created_at": now(), "b64_json": base64_of(event.data)}
                if event.type == "partial":
                    kind = f"{name}.partial_image"
                    word = body.target_in_words() or "auto"
                    own = {"step": event.facts["step"], "steps": event.steps, "request_id": work.request_id}
                    more: dict[str, Any] = {"partial_image_index": event.index, "quality": word, "ddit": own}
                    yield _sse(kind, {"type": kind, **common, **more})
                elif event.type == "done":
                    kind = f"{name}.completed"
                    quality = quality_of(body, event.facts["speedup"])
                    more = {"quality": quality, "usage": usage_of([event]), "ddit": facts_of([event], work.request_id)}
                    yield _sse(kind, {"type": kind, **common, **more})
        except ApiError as error:
            yield _sse("error", {"type": "error", **error.body()})


def _sse(event: str, data: Mapping[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which ends when the client goes.

    Raises:
        ApiError: 499, which nobody receives.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "client_closed_request", "the client went away.")
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


# -- forms ------------------------------------------------------------------------------------------------------------


def form_of(request: Request) -> Any:
    """The form of a request, as a context that closes its files.

    Raises:
        ApiError: the request has no form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise invalid("content-type", "send multipart/form-data.", "invalid_content_type")
    return request.form(max_files=MAX_IMAGES + 1, max_fields=64, max_part_size=2**20)


def split_form(form: FormData, files: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Fields and uploads; ``name[]`` is a list's way to say ``name``."""
    fields: dict[str, Any] = {}
    uploads: dict[str, list[bytes]] = {name: [] for name in files}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in uploads and isinstance(value, UploadFile):
            uploads[name].append(value.file.read())
        elif name in uploads:
            raise invalid(name, f"{name} is text: upload a file.", "invalid_image")
        elif isinstance(value, UploadFile):
            raise invalid(name, f"{name} is a file: only {', '.join(files)} may be.")
        elif name == "schedule":
            fields[name] = [*fields.get(name, []), *_numbers(value)]
        else:
            fields[name] = value
    return fields, uploads


def _numbers(text: str) -> list[Any]:
    try:
        return [int(part) for part in text.strip().strip("[]").split(",")]
    except ValueError:
        raise invalid("schedule", "schedule: multiples, separated by commas.") from None


def checked(kind: Any, fields: Mapping[str, Any]) -> Any:
    """A request of a kind made of fields.

    Raises:
        ApiError: they do not make one.
    """
    try:
        return kind(**fields)
    except ValidationError as error:
        raise first_error(error.errors()) from None


def first_error(errors: Sequence[Any], of_request: bool = False) -> ApiError:
    """The error object of what a validation found first; FastAPI says "body", "query" or "path" before a name."""
    first = errors[0]
    place = [str(part) for part in first["loc"][int(of_request) :]]
    param = place[0] if place else None
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is no JSON.")
    text = first["msg"].removeprefix("Value error, ")
    return ApiError(400, "invalid_value", f"{'.'.join(place)}: {text}" if place else text, param)
