"""What a coarse step computes, against the model's own run on a smaller picture."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...granularity import bands
from ...pipeline import accelerated
from .. import denoisers, family_of
from .checks import check
from .levels import MULTIPLE, Course, courses
from .specimen import Caught, Specimen, first_call, removed, run


def _own_conditions(specimen: Specimen) -> str:
    return "" if specimen.self_similar else "conditions at half the size are others"


def _own_latents(specimen: Specimen) -> str:
    return _own_conditions(specimen) or ("" if specimen.latents else "the pipeline takes no latents")


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """The largest difference is at most ``tolerance`` times the largest value."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} for {tuple(wanted.shape)}"
    error = float((found.float() - wanted.float()).abs().max().detach() / wanted.abs().max().detach())
    assert error <= tolerance, f"{what}: off by {error:.2g} of the largest value"


@check("small picture", "a coarse run is the model's own run on a picture k times smaller", _own_conditions)
def small_picture(specimen: Specimen) -> None:
    full = first_call(specimen)
    for multiple in specimen.multiples:
        height, width = (side // multiple for side in specimen.size)
        small = first_call(specimen, height=height, width=width)
        wanted = _plain(small)
        latent = small.call.latent.float()
        found = full.family.run_low(full.module, full.module.forward, full.call, latent, small.sigma, multiple, True)
        assert_close(found, wanted, 1e-4, f"{multiple}p")
        assert full.call.geometry.grid(multiple) == small.call.geometry.grid(1)


@check("band-limited run", "all steps at 2p on an upsampled latent give the upsampled small picture", _own_latents)
def band_limited(specimen: Specimen) -> None:
    """Euler steps of the low band are Euler steps of the small picture, between the noise levels σ' = sσ/k."""
    assert specimen.latents is not None
    full, low = courses(specimen.make().scheduler)
    given = {"steps": len(full.levels)}
    height, width = (side // MULTIPLE for side in specimen.size)
    at = {**given, "height": height, "width": width}
    shape = first_call(specimen, height=height, width=width).call.latent.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))

    def upsampled(index: int, small: torch.Tensor) -> torch.Tensor:
        band = bands.up(low.state(small.float(), index), MULTIPLE) / bands.low_scale(full.levels[index], MULTIPLE)
        return full.latent(band, index)

    wanted = _latents_of_run(specimen, low, {**specimen.arguments(**at), "latents": specimen.latents(noise)})
    arguments = {**specimen.arguments(**given), "latents": specimen.latents(upsampled(0, noise))}
    settings = {"schedule": [MULTIPLE] * given["steps"], "coarse": "band-split", "corrector": False}
    found = _latents_of_run(specimen, full, arguments, **settings)
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_close(one, upsampled(index, other), 1e-3, f"step {index}")


@check("multiple one", "both ways of running coarsely are the model itself at multiple 1")
def multiple_one(specimen: Specimen) -> None:
    caught = first_call(specimen)
    family, module, call = caught.family, caught.module, caught.call
    wanted = _plain(caught)
    embedding = family.patch_embedding(module, 1)
    for native in (True, False):
        at = f"native={native}"
        low = family.run_low(module, module.forward, call, call.latent.float(), caught.sigma, 1, native)
        assert_close(low, wanted, 1e-4, f"run_low, {at}")
        tokens = family.run_patches(
            module, module.forward, call, call.latent.float(), caught.sigma, embedding, 1, native
        )
        assert_close(tokens, wanted, 1e-4, f"run_patches, {at}")
    left = [name for name, child in module.named_modules() if "forward" in child.__dict__]
    assert not left, f"forwards stay exchanged: {left}"


@check("output", "a prediction goes to the pipeline's layout and back")
def output(specimen: Specimen) -> None:
    caught = first_call(specimen)
    for return_dict in (True, False):
        given = {**caught.arguments, "return_dict": return_dict}
        call = caught.family.parse(caught.module, given)
        with torch.no_grad():
            raw = caught.module(**given)
        prediction = caught.family.output(caught.module, call, raw)
        wrapped = caught.family.wrap(caught.module, call, prediction)
        assert type(wrapped) is type(raw), f"{type(wrapped).__name__} for {type(raw).__name__}"
        assert torch.equal(caught.family.output(caught.module, call, wrapped), prediction)


@check("geometry", "the grid foretold for a size is that of its call")
def geometry(specimen: Specimen) -> None:
    for height, width in (specimen.size, specimen.odd):
        caught = first_call(specimen, height=height, width=width)
        found = caught.call.geometry
        frames = caught.family.frames_of(specimen.arguments(height=height, width=width))
        assert caught.family.geometry(caught.pipe, height, width, frames) == found
        assert tuple(caught.call.latent.shape[1:]) == (found.channels, found.frames, found.height, found.width)


@check("cost", "FLOP as PyTorch counts them")
def cost(specimen: Specimen) -> None:
    """Within 5 %: embeddings of time and the like, which a formula may leave out, weigh in a tiny model."""
    caught = first_call(specimen)
    call = caught.call
    for multiple in (1, *specimen.multiples):
        sides = (side * call.geometry.patch for side in call.geometry.grid(multiple))
        low = torch.zeros(*call.latent.shape[:3], *sides)
        inputs = (caught.module, caught.module.forward, call, low, 0.5, multiple, True)
        beside = caught.family.tokens_beside(call, multiple, True)
        found = call.latent.shape[0] * caught.family.flops(caught.module, call.geometry, multiple, beside)
        counted = counted_flops(partial(caught.family.run_low, *inputs))
        assert math.isclose(found, counted, rel_tol=0.05), f"{multiple}p: {found:.4g} for {counted:.4g}"


def counted_flops(run_model: Any) -> int:
    """Floating-point operations of a call, by torch's FlopCounterMode; attention as matrix products."""
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        run_model()
    return int(counter.get_total_flops())


def _plain(caught: Caught) -> torch.Tensor:
    with torch.no_grad():
        return caught.family.output(caught.module, caught.call, caught.module(**caught.arguments)).float()


def _latents_of_run(
    specimen: Specimen, course: Course, arguments: dict[str, Any], **settings: Any
) -> list[torch.Tensor]:
    """Latents (B, C, F, H, W) at the beginning of every step of a run."""
    pipe = specimen.make()
    pipe.scheduler = course.scheduler
    family = family_of(pipe)
    module = next(iter(denoisers(pipe, family).values()))
    seen: list[torch.Tensor] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(family.parse(module, family.bind(args, kwargs)).latent.clone())

    settings = settings or {"threshold": 0}
    with removed(module.register_forward_pre_hook(see, with_kwargs=True)), accelerated(pipe, **settings):
        run(pipe, arguments)
    return seen
