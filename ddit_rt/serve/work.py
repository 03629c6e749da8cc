"""What a replica is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["picture", "edit", "inpaint", "video"]
EDITS: tuple[Kind, ...] = ("edit", "inpaint")

MAX_IMAGES = 16
"""Pictures that one request may bring."""


@dataclass(frozen=True)
class Work:
    """One picture or one video. Everything in it has been checked against the model's facts and the limits.

    Attributes:
        request_id: Of the request it belongs to.
        owner: Whose it is, for a fair order.
        kind: "edit" starts from ``image``, "inpaint" redraws what ``mask`` opens.
        prompt: Text.
        negative_prompt: Text, or None for the model's own.
        seed: Of the noise.
        width, height: Pixels.
        frames: Of a video, 1 for a picture.
        steps: Denoising steps.
        guidance: Scale, or None for the model's own.
        settings: Of :func:`ddit_rt.pipeline.configured`, sorted pairs.
        lora: Name of one, or "".
        images: Encoded pictures that were uploaded, already looked at.
        mask: Encoded, white where the picture is redrawn; or None.
        strength: How much of the picture is drawn anew, in (0, 1]; None for the pipeline's own.
        partials: Previews wanted.
        deadline: Time (of ``time.time``) after which nobody wants the result.
        format: "png", "webp" or "jpeg"; of a video "mp4".
        compression: Quality of webp and jpeg, 0 to 100.
        fps: Of a video.
    """

    request_id: str
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    deadline: float
    owner: str = ""
    kind: Kind = "picture"
    negative_prompt: str | None = None
    frames: int = 1
    guidance: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    lora: str = ""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    mask: bytes | None = field(default=None, repr=False)
    strength: float | None = None
    partials: int = 0
    format: str = "png"
    compression: int = 100
    fps: int = 16

    @property
    def key(self) -> Hashable:
        """Works of one key can run in one batch."""
        size = (self.width, self.height, self.frames, self.steps)
        # no negative prompt turns some models' guidance off, which an empty one does not
        guidance = (self.guidance, self.negative_prompt is None)
        return (self.kind, *size, *guidance, self.settings, self.lora, self.strength, len(self.images))


@dataclass(frozen=True)
class Event:
    """What a replica tells while it works.

    Attributes:
        type: "accepted" where it waits, "step" of a video, "partial" (with ``data``), "done" (with ``data`` and
            ``facts``).
        index: Steps that have ended; of a partial, its number.
        steps: Of the run.
        data: An encoded picture or video.
        thumbnail: An encoded picture, of a video.
        facts: The ``ddit`` object: speed-up estimate, steps, sizes, seconds, batch, seed.
    """

    type: Literal["accepted", "step", "partial", "done"]
    index: int = 0
    steps: int = 0
    data: bytes = field(default=b"", repr=False)
    thumbnail: bytes = field(default=b"", repr=False)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a served model, for checks before any work and for ``/v1/models``.

    Attributes:
        name: As requests call it.
        kind: "image" or "video".
        sizes: "WIDTHxHEIGHT" that are warm, the default first.
        side: Width and height are multiples of it.
        frame_step: Frames are 1 more than a multiple of it.
        steps, guidance, frames, fps: Defaults; guidance None where the pipeline has none.
        negative: Negative prompts are taken.
        speedup: Of requests that name none; None where another rule than a target decides.
        loras: Names.
        edits, inpaints: Pictures can be changed; with a mask.
        prompts: Examples, if the model ships with some.
        created: Time.
        images: Pictures that an edit may be shown.
        strength: An edit starts from its picture, noised, and runs a part of the steps.
        needs_image: Nothing can be made without a picture.
    """

    name: str
    kind: Literal["image", "video"]
    sizes: tuple[str, ...]
    side: int
    frame_step: int
    steps: int
    guidance: float | None
    frames: int
    fps: int
    negative: bool
    speedup: float | None
    loras: tuple[str, ...]
    edits: bool
    inpaints: bool
    prompts: tuple[str, ...]
    created: int
    images: int = 1
    strength: bool = False
    needs_image: bool = False
