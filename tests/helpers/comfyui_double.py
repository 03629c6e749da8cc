"""A recording double of what ComfyUI puts around a model: its model patcher, guider, samplers and wrappers.

Written from what the sources of ComfyUI 0.3.64 do (patcher_extension, model_patcher, samplers, model_base), in words of
our own and without what no test here needs: memory, hooks, areas, masks.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn


class Points:
    """The names of ``comfy.patcher_extension.WrappersMP``."""

    OUTER_SAMPLE = "outer_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    DIFFUSION_MODEL = "diffusion_model"


class Executor:
    """Calls wrappers from the outermost in, each with an executor of what is left, and the original at last."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: Sequence[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self._wrappers = original, class_obj, list(wrappers)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self.original(*args, **kwargs)
        first, *others = self._wrappers
        return first(Executor(self.original, self.class_obj, others), *args, **kwargs)

    __call__ = execute


def wrapped(point: str, original: Callable[..., Any], class_obj: Any, options: dict[str, Any]) -> Executor:
    found = options.get("wrappers", {}).get(point, {})
    return Executor(original, class_obj, [wrapper for wrappers in found.values() for wrapper in wrappers])


class CONST:
    """Of flow models: the clean latent is the latent less σ times the velocity."""

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return latent - output * sigma.reshape(-1, *[1] * (latent.ndim - 1))


class EPS:
    """Of noise models."""

    calculate_denoised = CONST.calculate_denoised


class FlowSampling(CONST):
    """ComfyUI's sampling of Flux (a multiplier of 1) or of other flow models (1000)."""

    sigma_max = 1.0

    def __init__(self, multiplier: float = 1.0) -> None:
        self.multiplier = multiplier

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.multiplier


class NoiseSampling(EPS):
    sigma_max = 14.6


class CleanSampling(FlowSampling):
    """ComfyUI's IMG_TO_IMG_FLOW: a flow's states, and a model that predicts the clean latent."""

    def calculate_denoised(self, sigma: torch.Tensor, output: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return output


class Flux(nn.Module):
    """A diffusion model of ComfyUI's kind, (B, C, H, W) in and out, around a FLUX transformer of diffusers.

    Attributes:
        calls: Shape of the latent, time and ``rope_options`` of every call.
    """

    patch_size = 2

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.calls: list[tuple[tuple[int, ...], float, Any]] = []

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as there)
        **kwargs: Any,
    ) -> torch.Tensor:
        around = wrapped(Points.DIFFUSION_MODEL, self._forward, self, transformer_options)
        return around.execute(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as there)
        **kwargs: Any,
    ) -> torch.Tensor:
        rope = transformer_options.get("rope_options")
        self.calls.append((tuple(x.shape), float(timestep[0]), rope))
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = tokens.reshape(batch, rows * columns, channels * 4)
        rope = rope or {}
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = (torch.arange(rows) * rope.get("scale_y", 1.0) + rope.get("shift_y", 0.0))[:, None]
        ids[..., 2] = (torch.arange(columns) * rope.get("scale_x", 1.0) + rope.get("shift_x", 0.0))[None]
        out = self.transformer(
            hidden_states=tokens,
            timestep=timestep,
            encoder_hidden_states=context,
            pooled_projections=y,
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(context.shape[1], 3),
            return_dict=False,
        )[0]
        out = out.reshape(batch, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, -1, height, width)


class BaseModel:
    def __init__(self, diffusion_model: nn.Module, sampling: Any) -> None:
        self.diffusion_model, self.model_sampling = diffusion_model, sampling

    def apply_model(self, x: torch.Tensor, sigma: torch.Tensor, **conditioning: Any) -> torch.Tensor:
        output = self.diffusion_model(x, self.model_sampling.timestep(sigma), **conditioning)
        return self.model_sampling.calculate_denoised(sigma, output.float(), x)


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {
            point: {key: list(found) for key, found in keys.items()} for point, keys in self.wrappers.items()
        }
        return other

    def add_wrapper_with_key(self, point: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(point, {}).setdefault(key, []).append(wrapper)

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)


def condition(context: torch.Tensor, y: torch.Tensor | None = None, **more: Any) -> dict[str, Any]:
    """What a text encoder's node gives, with the identity that a guider adds."""
    return {"uuid": uuid.uuid4(), "context": context, "y": y, **more}


class Guider:
    """ComfyUI's CFGGuider: the conditionings of a step in one batch, or each by itself (``together=False``)."""

    def __init__(
        self,
        patcher: ModelPatcher,
        positive: list[dict[str, Any]],
        negative: list[dict[str, Any]] | None = None,
        cfg: float = 1.0,
        together: bool = True,
    ) -> None:
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.positive, self.negative, self.cfg, self.together = positive, negative, cfg, together
        self.inner_model = patcher.model

    def sample(self, noise: torch.Tensor, sampler: Sampler, sigmas: torch.Tensor) -> torch.Tensor:
        kept = self.model_options
        options = _copied(kept)
        for point, keys in self.model_patcher.wrappers.items():
            options["transformer_options"].setdefault("wrappers", {})[point] = keys
        self.model_options = options
        try:
            around = wrapped(Points.OUTER_SAMPLE, self.outer_sample, self, options["transformer_options"])
            latent = torch.zeros_like(noise)
            return around.execute(noise, latent, sampler, sigmas, None, None, True, 0)
        finally:
            self.model_options = kept

    def outer_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Sampler,
        sigmas: torch.Tensor,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> torch.Tensor:
        options = _copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        start = sigmas[0] * noise + (1 - sigmas[0]) * latent_image
        with torch.no_grad():
            return sampler.sampler_function(lambda x, sigma: self(x, sigma, options, seed), start, sigmas)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, options: dict[str, Any], seed: Any) -> torch.Tensor:
        around = wrapped(Points.PREDICT_NOISE, self.predict_noise, self, self.model_options["transformer_options"])
        return around.execute(x, sigma * torch.ones(x.shape[0]), options, seed)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], seed: Any = None
    ) -> torch.Tensor:
        positive, negative = self._batches(x, timestep, model_options)
        return positive if negative is None else negative + (positive - negative) * self.cfg

    def _batches(
        self, x: torch.Tensor, timestep: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kinds = [self.positive, *([] if self.negative is None else [self.negative])]
        active = [(kind, one) for kind, found in enumerate(kinds) for one in found if _is_active(one, timestep)]
        active.reverse()  # as there
        outputs: list[list[torch.Tensor]] = [[] for _ in kinds]
        for batch in [active] if self.together else [[one] for one in active]:
            given = {
                name: torch.cat([one[name] for _, one in batch]) if name in ("context", "y") else batch[0][1][name]
                for name in batch[0][1]
                if name not in ("uuid", "start", "end")
            }
            inner = {
                **_copied(options["transformer_options"]),
                "uuids": [one["uuid"] for _, one in batch],
                "sigmas": timestep,
            }
            latent, level = torch.cat([x] * len(batch)), torch.cat([timestep] * len(batch))
            clean = self.inner_model.apply_model(latent, level, transformer_options=inner, **given)
            for (kind, _), part in zip(batch, clean.chunk(len(batch))):
                outputs[kind].append(part)
        means = [sum(found[1:], found[0]) / len(found) for found in outputs]
        return means[0], means[1] if len(means) > 1 else None


class Sampler:
    """ComfyUI's KSAMPLER."""

    def __init__(self, function: Callable[..., torch.Tensor], **extra_options: Any) -> None:
        self.sampler_function, self.extra_options = function, extra_options


def sample_euler(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma)) / sigma * (following - sigma)
    return x


def sample_heun(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        ahead = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (ahead - model(ahead, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


def sample_dpm_2(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """A midpoint rule: the second call of a step lies between two noise levels."""
    for sigma, following in pairwise(sigmas):
        middle = (sigma + following) / 2
        half = x + (x - model(x, sigma)) / sigma * (middle - sigma)
        x = x + (half - model(half, middle)) / middle * (following - sigma)
    return x


def sample_euler_ancestral(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    for sigma, following in pairwise(sigmas):
        clean = model(x, sigma)
        x = (1 - following) * clean + following * torch.randn(x.shape, generator=generator)
    return x


def _is_active(one: dict[str, Any], timestep: torch.Tensor) -> bool:
    return one.get("end", 0.0) <= float(timestep[0]) <= one.get("start", 1.0)


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries and lists anew, whatever else is in them as it is."""
    return {
        name: _copied(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
        for name, value in options.items()
    }
