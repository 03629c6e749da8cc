"""What stays bit for bit as the plain pipeline has it."""

from __future__ import annotations

from typing import Any

import torch

from ...pipeline import accelerate, accelerated, restore
from .checks import check
from .specimen import Specimen, run


def same_as_plain(specimen: Specimen, **options: Any) -> None:
    """Without coarse steps an accelerated call gives the plain call's latents, and so does the next plain one."""
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments(**options))
    assert torch.isfinite(plain).all(), "the specimen's plain latents are not finite"
    for settings in ({"threshold": 0}, {"multiples": (1,)}):
        with accelerated(pipe, **settings):
            assert torch.equal(run(pipe, specimen.arguments(**options)), plain), f"{settings} changes the latents"
        assert torch.equal(run(pipe, specimen.arguments(**options)), plain), "restore() left something behind"


def unguided(specimen: Specimen) -> str:
    """Why there is no guidance to check; empty where there is."""
    return "" if specimen.guided else "no guidance by a negative prompt"


def _single(specimen: Specimen) -> str:
    return "" if specimen.batches else "one picture per call"


@check("exact", "full steps give the plain latents bit for bit")
def exact(specimen: Specimen) -> None:
    same_as_plain(specimen)


@check("exact, guided", "the same with a negative prompt", unguided)
def exact_guided(specimen: Specimen) -> None:
    same_as_plain(specimen, guided=True)


@check("exact, batch", "the same for two prompts", _single)
def exact_batch(specimen: Specimen) -> None:
    same_as_plain(specimen, batch=2)


@check("exact, images", "the same for two pictures of a prompt", _single)
def exact_images(specimen: Specimen) -> None:
    same_as_plain(specimen, images=2)


@check("exact, odd size", "the same on a grid that 2 does not divide")
def exact_odd(specimen: Specimen) -> None:
    height, width = specimen.odd
    same_as_plain(specimen, height=height, width=width)


@check("restore", "restore() leaves modules, scheduler and latents as they were")
def restored(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    before = _attributes(pipe)
    accelerate(pipe, schedule=specimen.schedule)
    assert not torch.equal(run(pipe, specimen.arguments()), plain), "coarse steps change nothing"
    restore(pipe)
    left = _attributes(pipe) ^ before
    assert not left, f"restore() leaves {sorted(left)}"
    assert torch.equal(run(pipe, specimen.arguments()), plain), "restore() does not bring the plain latents back"


def _attributes(pipe: Any) -> set[str]:
    """Names of what pipeline, scheduler and every module of it hold as instances."""
    owners = {"pipe": pipe}
    for name, component in pipe.components.items():
        owners[name] = component
        if isinstance(component, torch.nn.Module):
            owners |= {f"{name}.{path}": module for path, module in component.named_modules() if path}
    return {f"{name}: {key}" for name, owner in owners.items() for key in getattr(owner, "__dict__", {})}
