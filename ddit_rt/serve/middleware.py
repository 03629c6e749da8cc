"""What happens to every request before and after the routes: an id, a limit on its size, errors as objects, a log."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse, Response

from .errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("ddit_rt.serve.requests")


class _TooLargeError(Exception):
    """The body is longer than it may be."""


class RequestMiddleware:
    """An ASGI application around another one.

    Args:
        application: The inner one.
        max_bytes: Of a request's body.
        admit: Looks at a request's scope before anything of its body is read; raises an ApiError.
        observe: Told of every request that ended: scope, status, seconds.
        marks: Write the request's id into the response; not where a proxy in front does.
    """

    def __init__(
        self,
        application: Application,
        max_bytes: int,
        admit: Callable[[Scope], None],
        observe: Callable[[Scope, int, float], None],
        marks: bool = True,
    ) -> None:
        self._application, self._max_bytes, self._admit, self._observe = application, max_bytes, admit, observe
        self._marks = marks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        request_id = _given_id(scope) or f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, received, too_large = time.perf_counter(), 0, 0, False

        async def receive_some() -> Message:
            nonlocal received, too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                too_large = True
                raise _TooLargeError
            return message

        async def send_marked(message: Message) -> None:
            nonlocal status
            if too_large and not status:
                raise _TooLargeError  # what the application made of our error
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._marks:
                    message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        async def answer(error: ApiError) -> None:
            await error_response(error)(scope, receive, send_marked)

        try:
            if _told_length(scope) > self._max_bytes:
                raise _TooLargeError
            self._admit(scope)
            await self._application(scope, receive_some, send_marked)
        except ApiError as error:
            await answer(error)
        except _TooLargeError:
            if not status:
                too_large = False  # now it is our turn to answer
                message = f"the body is longer than {self._max_bytes} bytes, which is the limit here."
                await answer(ApiError(413, "request_too_large", message))
        except Exception:
            logger.exception("request %s failed", request_id)
            if not status:
                await answer(ApiError(500, "internal_error", "the server failed; see its log."))
        finally:
            seconds = time.perf_counter() - began
            self._observe(scope, status or 499, seconds)
            # the query is left out: it is the client's text
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
            told = {**line, "status": status or 499, "seconds": round(seconds, 4), **scope["state"].get("log", {})}
            logger.info("request", extra=told)


def _given_id(scope: Scope) -> str:
    """An id that the client or a proxy gave, if it can stand in a header and a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and 0 < len(value) <= 64 and value.replace(b"-", b"").replace(b"_", b"").isalnum():
            return str(value.decode("ascii"))
    return ""


def _told_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def error_response(error: ApiError) -> Response:
    """The error object as a response, which is an ASGI application too."""
    wait = {} if error.retry_after is None else {"retry-after": str(max(round(error.retry_after), 1))}
    return JSONResponse(error.body(), error.status, wait)
