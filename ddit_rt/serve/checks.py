"""A request against the model's facts and the server's limits: what becomes of it is work."""

from __future__ import annotations

import secrets
import time
from typing import Any

from .errors import invalid
from .settings import Limits, parse_size
from .wire import ImageRequest, VideoRequest
from .work import EDITS, Kind, ModelFacts, Work

LONGEST_SIDES = {"webp": 16383, "jpeg": 65500}
"""Pixels that a format's encoder takes."""


def size_of(request: ImageRequest | VideoRequest, facts: ModelFacts, limits: Limits) -> tuple[int, int]:
    """Width and height.

    Raises:
        ApiError: the model takes no such size, or it is too large.
    """
    asked = request.size if request.size not in (None, "auto") else facts.sizes[0]
    width, height = parse_size(asked)
    if width * height > limits.pixels:
        raise invalid("size", f"size={asked}: at most {limits.pixels} pixels are drawn here.")
    for value in (width, height):
        if value % facts.side:
            below = max(value // facts.side, 1) * facts.side
            raise invalid(
                "size", f"size={asked}: {facts.name} draws multiples of {facts.side}: {below} or {below + facts.side}."
            )
    return width, height


def frames_of(request: VideoRequest, facts: ModelFacts, limits: Limits) -> tuple[int, int]:
    """Frames and frames per second.

    Raises:
        ApiError: the model takes no such number, or there are too many.
    """
    fps = request.fps or facts.fps
    step = facts.frame_step
    if request.frames is not None:
        frames = request.frames
        if (frames - 1) % step:
            below = (frames - 1) // step * step + 1
            raise invalid("frames", f"frames={frames}: {facts.name} makes {below} or {below + step}.")
    elif request.seconds is not None:
        frames = max(round(request.seconds * fps / step), 1) * step + 1
    else:
        frames = facts.frames
    if frames > limits.frames:
        name = "frames" if request.frames is not None else "seconds"
        raise invalid(name, f"{frames} frames: at most {limits.frames} are made here.")
    return frames, fps


def works_of(
    request: ImageRequest | VideoRequest,
    facts: ModelFacts,
    limits: Limits,
    request_id: str,
    owner: str,
    kind: Kind = "picture",
) -> list[Work]:
    """The works of a request: as many as it wants pictures, each with its own seed, still without what was uploaded.

    Raises:
        ApiError: a value that this model or this server does not take.
    """
    wanted = "video" if isinstance(request, VideoRequest) else "image"
    if facts.kind != wanted:
        raise invalid("model", f"{facts.name} makes {facts.kind}s: ask a model that makes {wanted}s.", "wrong_model")
    for name, text in {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}.items():
        if len(text) > limits.prompt:
            raise invalid(name, f"{name} has {len(text)} characters: at most {limits.prompt} are taken.")
    if not request.prompt.strip():
        raise invalid("prompt", "prompt is empty: say what to draw.")
    if request.negative_prompt and not facts.negative:
        raise invalid("negative_prompt", f"{facts.name} takes no negative prompt.")
    if request.guidance is not None and facts.guidance is None:
        raise invalid("guidance", f"{facts.name} has no guidance.")
    if request.lora is not None and request.lora not in facts.loras:
        known = ", ".join(facts.loras) or "none"
        raise invalid("lora", f"lora={request.lora!r} is not loaded here: {known}.", "lora_not_found")
    steps = request.steps or facts.steps
    if steps > limits.steps:
        raise invalid("steps", f"steps={steps}: at most {limits.steps} are made here.")
    # an edit by strength runs a part of the steps, which the pipeline alone knows
    fewer = facts.strength and kind in EDITS
    if request.schedule is not None and not fewer and len(request.schedule) != steps:
        raise invalid("schedule", f"schedule has {len(request.schedule)} entries, and there are {steps} steps.")
    width, height = size_of(request, facts, limits)
    more: dict[str, Any] = {}
    count = 1
    if isinstance(request, VideoRequest):
        more["frames"], more["fps"] = frames_of(request, facts, limits)
        more["format"] = "mp4"
        if max(width, height) > LONGEST_SIDES["webp"]:  # its thumbnail
            message = f"size={width}x{height}: a video has sides of at most {LONGEST_SIDES['webp']} pixels here."
            raise invalid("size", message)
    else:
        count = request.n
        if count > limits.pictures:
            raise invalid("n", f"n={count}: at most {limits.pictures} pictures are drawn at once here.")
        more["format"] = request.output_format or "png"
        longest = LONGEST_SIDES.get(more["format"])
        if longest is not None and max(width, height) > longest:
            message = f"size={width}x{height}: a {more['format']} has sides of at most {longest} pixels; take png."
            raise invalid("size", message)
        more["compression"] = 100 if request.output_compression is None else request.output_compression
        more["partials"] = (request.partial_images or 0) if request.stream else 0
        more["strength"] = getattr(request, "strength", None)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    seconds = min(request.timeout or limits.seconds, limits.seconds)
    return [
        Work(
            request_id=request_id,
            owner=owner,
            kind=kind,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=(seed + index) % 2**63,
            width=width,
            height=height,
            steps=steps,
            guidance=request.guidance,
            settings=request.settings(),
            lora=request.lora or "",
            deadline=time.time() + seconds,
            **more,
        )
        for index in range(count)
    ]
