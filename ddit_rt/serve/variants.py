"""The pipelines that share one model's components, and how a batch of works is put to them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

from ..families import family_of
from ..pipeline import call_defaults, example_prompts, frame_rate
from .encode import decoded
from .errors import ApiError
from .settings import ModelConfig
from .work import EDITS, MAX_IMAGES, Kind, ModelFacts, Work

FALLBACK_STEPS, FALLBACK_SIDE = 50, 1024
_SEVERAL = ("EditPlus", "Flux2")
"""In the names of pipelines that are shown a list of pictures; to others a list is one picture for each prompt."""


class Variants:
    """What one loaded model can be asked for.

    Args:
        pipe: The pipeline.
        config: Of the model.
    """

    def __init__(self, pipe: Any, config: ModelConfig) -> None:
        self.pipe = pipe
        self.family = family_of(pipe)
        self.config = config
        self._call: dict[str, Any] = {**call_defaults(config.model), **config.call}
        self._known = _arguments(pipe)
        self._is_video = "num_frames" in self._known
        # a pipeline that is shown its picture changes it by itself; others start from it, noised
        self._shown = "image" in self._known and "strength" not in self._known
        self.needs_image = self._shown and any(word in type(pipe).__name__ for word in ("Edit", "ImageToVideo"))
        self._pipes: dict[Kind, Any] = {"picture": pipe, "video": pipe, "edit": pipe}
        if not self._is_video and not self._shown:
            self._pipes.pop("edit")
            autos: dict[Kind, Any] = {"edit": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
            for kind, auto in autos.items():
                try:
                    # its default is float32, to which it would turn the components that are shared
                    self._pipes[kind] = auto.from_pipe(pipe, torch_dtype=pipe.dtype)
                except ValueError:  # there is none of this class
                    continue
                self._pipes[kind].set_progress_bar_config(disable=True)
        self._guidance_name = self._find_guidance()

    def _find_guidance(self) -> str:
        """The argument that holds the scale; empty where there is none."""
        for name in ("true_cfg_scale", "guidance_scale"):
            if name in self._call:
                return name
        true = self._known.get("true_cfg_scale")
        if true is not None and isinstance(true.default, float) and true.default > 1:
            return "true_cfg_scale"
        return "guidance_scale" if "guidance_scale" in self._known else ""

    def default(self, name: str) -> Any:
        """What the pipeline's call takes for an argument that nobody gives; None if it has none of the name."""
        if name in self._call:
            return self._call[name]
        found = self._known.get(name)
        return None if found is None or found.default is inspect.Parameter.empty else found.default

    def facts(self) -> ModelFacts:
        """For requests to be checked against."""
        geometry = self.family.geometry(self.pipe, 1024, 1024)
        side = 1024 // (geometry.height // geometry.patch)
        guidance = self.default(self._guidance_name) if self._guidance_name else None
        settings = self.config.settings
        is_target = not settings or "speedup" in settings
        speedup = self.config.speedup or (settings.get("speedup", 2.0) if is_target else None)
        return ModelFacts(
            name=self.config.name,
            kind="video" if self._is_video else "image",
            sizes=self.config.sizes or (self._own_size(side),),
            side=side,
            frame_step=getattr(self.pipe, "vae_scale_factor_temporal", 1) if self._is_video else 1,
            steps=int(self.default("num_inference_steps") or FALLBACK_STEPS),
            guidance=None if guidance is None else float(guidance),
            frames=int(self.default("num_frames") or 1),
            fps=frame_rate(self.config.model),
            negative="negative_prompt" in self._known,
            speedup=speedup,
            loras=tuple(self.config.loras),
            edits="edit" in self._pipes and (not self._is_video or self._shown),
            inpaints="inpaint" in self._pipes,
            prompts=tuple(example_prompts(self.config.model).values()),
            created=int(time.time()),
            strength=any("strength" in _arguments(self._pipes[kind]) for kind in EDITS if kind in self._pipes),
            images=MAX_IMAGES if self._shown and any(word in type(self.pipe).__name__ for word in _SEVERAL) else 1,
            needs_image=self.needs_image,
        )

    def _own_size(self, side: int) -> str:
        scale = getattr(self.pipe, "vae_scale_factor", 8)
        default = getattr(self.pipe, "default_sample_size", None)
        own = default * scale if isinstance(default, int) else FALLBACK_SIDE
        width, height = self.default("width") or own, self.default("height") or own
        return f"{max(width // side, 1) * side}x{max(height // side, 1) * side}"

    def tokens(self, work: Work) -> int:
        """At p."""
        return self.family.geometry(self.pipe, work.height, work.width, work.frames).tokens(1)

    def text_tokens(self, prompt: str) -> int:
        """Of the longer of the pipeline's tokenizers; 0 without one. On the thread that runs the pipeline alone."""
        tokenizer = getattr(self.pipe, "tokenizer_2", None) or getattr(self.pipe, "tokenizer", None)
        if tokenizer is None or not hasattr(tokenizer, "tokenize"):
            return 0
        return len(tokenizer.tokenize(prompt)) + 1

    def strength(self, work: Work) -> float | None:
        """How much of its picture a work draws anew, which is its part of the steps; None where it starts from none."""
        argument = _arguments(self._pipes[work.kind]).get("strength")
        if argument is None or not work.images:
            return None
        return work.strength or float(self._call.get("strength", argument.default))

    def check(self, work: Work) -> None:
        """Raises:
        ApiError: the model has no pipeline for such works.
        """
        if work.kind not in self._pipes:
            raise ApiError(400, "unsupported", f"{self.config.name} cannot be asked for: {work.kind}.", "model")
        if self.needs_image and not work.images:
            raise ApiError(400, "missing_image", f"{self.config.name} only changes pictures: upload one.", "image")

    def together(self, work: Work) -> bool:
        """Whether works of this kind run in batches."""
        return work.frames == 1 and not (self._shown and work.images)

    def arguments(self, works: Sequence[Work]) -> tuple[Any, dict[str, Any]]:
        """The pipeline for works of one key, and the arguments of its call."""
        first = works[0]
        pipe = self._pipes[first.kind]
        known = _arguments(pipe)
        call = {name: value for name, value in self._call.items() if name in known}
        call |= {
            "prompt": [work.prompt for work in works],
            "height": first.height,
            "width": first.width,
            "num_inference_steps": first.steps,
            "generator": [torch.Generator("cpu").manual_seed(work.seed) for work in works],
            "output_type": "np",
        }
        if self._is_video:
            call["num_frames"] = first.frames
        if first.guidance is not None and self._guidance_name:
            call[self._guidance_name] = first.guidance
        if "negative_prompt" in known:
            own = self._call.get("negative_prompt")
            given = [own if work.negative_prompt is None else work.negative_prompt for work in works]
            call.pop("negative_prompt", None)
            if any(text is not None for text in given):
                call["negative_prompt"] = [text or "" for text in given]
        if first.images:
            pictures = [decoded(data) for work in works for data in work.images]
            call["image"] = pictures if self.together(first) or len(pictures) > 1 else pictures[0]
        if first.mask is not None:
            call["mask_image"] = [decoded(work.mask) for work in works if work.mask is not None]
        if first.strength is not None and "strength" in known:
            call["strength"] = first.strength
        return pipe, _taken(call, known)


def _arguments(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def _taken(call: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Without sizes that a pipeline does not take, as one that makes a single size."""
    return {name: value for name, value in call.items() if name in known or name not in ("height", "width")}
