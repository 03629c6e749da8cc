"""One request of a load test: sent, timed, and its answer judged."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..settings import shown

if TYPE_CHECKING:
    import httpx

IMAGES = "/v1/images/generations"
MODELS = "/v1/models"
_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")  # of PNG, JPEG, WebP


@dataclass(frozen=True)
class Outcome:
    """How a request ended. Times in seconds, from when it was due to be sent."""

    code: str | None
    """None for a picture, else why there is none: "429 queue_full"."""
    answered: bool
    """Whether it ended in a picture or in an error object; if not, it is lost."""
    latency: float
    first_partial: float | None = None
    ddit: Mapping[str, Any] = field(default_factory=dict)
    """What the server says of the picture."""


class _Unusable(Exception):
    """An answer that is neither a picture nor an error object."""


def connect(url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client without limits of its own: neither on connections nor on time.

    Raises:
        ConfigError: the URL is none, the key no header can hold, or httpx is missing.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url={shown(url)}: write it with http:// or https://, as in http://127.0.0.1:8000.")
    strange = next((letter for letter in api_key or "" if not "!" <= letter <= "~"), None)
    if strange is not None:  # named alone: a key is not for a log
        raise ConfigError(f"api-key holds {strange!r}: a key is ASCII without spaces; copy it again.")
    try:
        import httpx
    except ImportError:
        raise ConfigError("driving a server needs httpx: pip install 'ddit-rt[serve]'.") from None
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        # trust_env: a proxy between would be measured, too
        return httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, limits=limits, timeout=None, trust_env=False
        )
    except httpx.InvalidURL as error:
        raise ConfigError(f"url={shown(url)} is no address: {error}.") from None


async def list_models(client: httpx.AsyncClient) -> list[Mapping[str, Any]]:
    """What the server serves, as its ``/v1/models`` says.

    Raises:
        ConfigError: no server answers, it refuses the key, or what it says is no list of models.
    """
    import httpx

    try:
        answer = await client.get(MODELS, timeout=10)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"url={str(client.base_url)!r}: no server answers ({reason}); `ddit-rt serve demo` starts one."
        ) from None
    value = _json(answer.content)
    if answer.status_code != 200:
        error_object = _error(value) or {}
        raise ConfigError(
            f"url={str(client.base_url)!r}: {MODELS} answers {answer.status_code} {error_object.get('message', '')}"
        )
    found = value.get("data") if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
        raise ConfigError(f"url={str(client.base_url)!r}: {MODELS} lists no models; is this an image server?")
    return found


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any], due: float, timeout: float) -> Outcome:
    """Sends a request for a picture and waits for its end, whichever that is.

    Args:
        client: Of the server.
        body: Of the request; with ``stream`` the answer is read as events.
        due: ``time.perf_counter()`` at which it was to be sent; latency counts from then, so that a late sender
            hides no waiting.
        timeout: Seconds after which the request is given up, from now.
    """
    import httpx

    first: float | None = None
    try:
        async with asyncio.timeout(timeout), client.stream("POST", IMAGES, json=body) as answer:
            if answer.status_code != 200 or not body.get("stream"):
                value = _json(await answer.aread())
                if answer.status_code != 200:
                    return _refused(str(answer.status_code), value, due, None)
                return _pictured(value["data"][0], value, due, None)
            async for event in _events(answer):
                if event.get("type") == "image_generation.partial_image":
                    first = first or time.perf_counter() - due
                elif event.get("type") == "image_generation.completed":
                    return _pictured(event, event, due, first)
                elif event.get("type") == "error":
                    return _refused("stream", event, due, first)
        raise _Unusable("stream ended without a picture")
    except TimeoutError:
        reason = "no end in time"
    except httpx.HTTPError as error:
        reason = f"connection: {type(error).__name__}"
    except (KeyError, IndexError, TypeError, AttributeError):
        reason = "answer of another form"
    except _Unusable as error:
        reason = str(error)
    return Outcome(reason, False, time.perf_counter() - due, first)


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Data of server-sent events."""
    data: list[str] = []
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            yield _json("\n".join(data).encode())
            data = []


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _error(value: Any) -> Mapping[str, Any] | None:
    """OpenAI's error object in an answer."""
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) and error.get("message") else None


def _refused(status: str, value: Any, due: float, first: float | None) -> Outcome:
    latency, error = time.perf_counter() - due, _error(value)
    if error is None:
        return Outcome(f"{status} without an error object", False, latency, first)
    return Outcome(f"{status} {error.get('code') or error.get('type')}", True, latency, first)


def _pictured(holder: Mapping[str, Any], whole: Mapping[str, Any], due: float, first: float | None) -> Outcome:
    try:
        picture = base64.b64decode(holder["b64_json"], validate=True)
    except binascii.Error:
        raise _Unusable("answer without a picture") from None
    latency = time.perf_counter() - due
    if not picture.startswith(_HEADS):
        raise _Unusable("answer without a picture")
    told = whole.get("ddit")
    return Outcome(None, True, latency, first, told if isinstance(told, dict) else {})
