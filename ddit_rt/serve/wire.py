"""Requests and responses, as OpenAI's Images and Videos have them, and our fields beside theirs."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .settings import parse_size
from .work import Event, ModelFacts

QUALITIES: dict[str, float] = {"low": 4.0, "medium": 3.0, "high": 2.0, "xhigh": 1.5, "max": 1.0}
"""OpenAI's ``quality`` -> target speed-up; 1 is the plain pipeline."""

LONGEST = 1000
"""Entries of a schedule."""


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no text") from None
    return text


def _size(text: str) -> str:
    if text == "auto":
        return text
    try:
        parse_size(text)
    except ValueError:
        raise ValueError("'auto' or WIDTHxHEIGHT in pixels, as in '1024x1024'") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Size = Annotated[str, Field(max_length=11), AfterValidator(_size)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    prompt: Text
    """What to draw."""
    model: Text | None = None
    """Name of a served model; without one, the first."""
    size: Size | None = None
    """"WIDTHxHEIGHT"; "auto" is the model's default."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of the noise; without one it is drawn, and told in the response."""
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    """Scale of guidance."""
    negative_prompt: Text | None = None
    speedup: Annotated[float, Field(ge=1, le=100)] | None = None
    """Target speed-up; 1 is the plain pipeline."""
    quality_db: Annotated[float, Field(gt=0, le=200)] | None = None
    """Target PSNR in dB instead."""
    schedule: Annotated[list[Literal[0, 1, 2, 4]], Field(min_length=1, max_length=LONGEST)] | None = None
    """A multiple per step instead."""
    threshold: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """τ of the threshold rule instead."""
    reference: Literal["plain", "converged"] | None = None
    toward_converged: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the way from the plain to the converged picture to aim at."""
    lora: Text | None = None
    """Name of a LoRA that the server has loaded."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which the result is not wanted."""
    user: Text | None = None
    """Not used."""

    @model_validator(mode="after")
    def _one_target(self) -> _Request:
        given = [n for n in ("speedup", "quality_db", "schedule", "threshold") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: each decides alone, give one of them")
        return self

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """Of :func:`ddit_rt.pipeline.configured`, sorted."""
        found: dict[str, Any] = {}
        if self.speedup is not None:
            found |= {"speedup": self.speedup} if self.speedup > 1 else {"threshold": 0.0}
        if self.quality_db is not None:
            found["quality"] = self.quality_db
        if self.schedule is not None:
            found["schedule"] = tuple(self.schedule)
        if self.threshold is not None:
            found["threshold"] = self.threshold
        if self.reference is not None:
            found["reference"] = self.reference
        if self.toward_converged is not None:
            found["toward_converged"] = self.toward_converged
        return tuple(sorted(found.items()))


class ImageRequest(_Request):
    """POST /v1/images/generations."""

    n: Annotated[int, Field(ge=1, le=10)] = 1
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    """A target in words, where no other is given: low 4x, medium 3x, high and hd 2x, xhigh 1.5x, max plain."""
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    moderation: Literal["low", "auto"] | None = None
    """Not used, nor the next two."""
    style: Literal["vivid", "natural"] | None = None
    safety_identifier: Text | None = None

    @model_validator(mode="after")
    def _streams_one(self) -> ImageRequest:
        if self.stream and self.n > 1:
            raise ValueError("stream: with n=1 only")
        if self.stream and self.response_format == "url":
            raise ValueError("stream: with response_format 'b64_json' only")
        return self

    def target_in_words(self) -> str:
        """The key of QUALITIES that decides; empty where another target does, or none is given."""
        quality = {"hd": "high"}.get(self.quality or "", self.quality or "")
        targets = (self.speedup, self.quality_db, self.schedule, self.threshold)
        return quality if quality in QUALITIES and all(target is None for target in targets) else ""

    def settings(self) -> tuple[tuple[str, Any], ...]:
        quality = self.target_in_words()
        if quality:
            return self.model_copy(update={"speedup": QUALITIES[quality], "quality": None}).settings()
        return super().settings()


class EditRequest(ImageRequest):
    """POST /v1/images/edits, beside the uploads ``image`` and ``mask``."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much of the picture is drawn anew, where the model starts from it."""
    input_fidelity: Literal["high", "low"] | None = None
    """Not used."""


class VideoRequest(_Request):
    """POST /v1/videos, beside the upload ``input_reference``."""

    seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    frames: Annotated[int, Field(ge=1)] | None = None
    """Instead of ``seconds``."""
    fps: Annotated[int, Field(ge=1, le=120)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> VideoRequest:
        if self.seconds is not None and self.frames is not None:
            raise ValueError("seconds and frames: give one of them")
        return self


def facts_of(events: list[Event], request_id: str) -> dict[str, Any]:
    """The ``ddit`` object of a response with one picture or several: of the first, with all seeds."""
    first = {name: value for name, value in events[0].facts.items() if name not in ("seed", "tokens", "text_tokens")}
    return {**first, "seeds": [event.facts["seed"] for event in events], "request_id": request_id}


def usage_of(events: list[Event]) -> dict[str, Any]:
    """Tokens as OpenAI counts them: of the prompt, and of the pictures at p."""
    text = sum(event.facts["text_tokens"] for event in events)
    made = sum(event.facts["tokens"] for event in events)
    details = {"text_tokens": text, "image_tokens": 0}
    return {"input_tokens": text, "output_tokens": made, "total_tokens": text + made, "input_tokens_details": details}


def quality_of(request: ImageRequest, speedup: float) -> str:
    """The word for what was done: the request's own where it decided."""
    done = next((word for word, least in QUALITIES.items() if speedup >= least - 0.05), "max")
    return request.target_in_words() or done


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def model_object(facts: ModelFacts) -> dict[str, Any]:
    """One of ``/v1/models``."""
    own = {
        "kind": facts.kind,
        "sizes": list(facts.sizes),
        "default_size": facts.sizes[0],
        "multiple_of": facts.side,
        "steps": facts.steps,
        "guidance": facts.guidance,
        "negative_prompt": facts.negative,
        "speedup": facts.speedup,
        "loras": list(facts.loras),
        "edits": facts.edits,
        "masks": facts.inpaints,
        "images": facts.images,
        "prompts": list(facts.prompts),
    }
    if facts.kind == "video":
        own |= {"frames": facts.frames, "frames_multiple_of": facts.frame_step, "fps": facts.fps}
    return {"id": facts.name, "object": "model", "created": facts.created, "owned_by": "ddit_rt", "ddit": own}


def now() -> int:
    return int(time.time())
