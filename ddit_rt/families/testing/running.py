"""How coarse calls run: schedules of every kind, coarse paths, reports, failures, sharing, graphs and caches."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig

from ...config import DDiTConfig, TeaCacheConfig
from ...fitting import fit_schedule
from ...granularity import path_names
from ...pipeline import AcceleratedPipeline, accelerate, accelerated, report, restore
from ...runtime import Recording
from .. import Family, denoisers, family_of
from .checks import check
from .coarse import assert_close
from .exact import unguided
from .specimen import Specimen, first_call, removed, run


def coarse_run(specimen: Specimen, pipe: Any, call: dict[str, Any] | None = None, **settings: Any) -> torch.Tensor:
    """Latents of an accelerated call by the specimen's schedule; finite, complete and as the schedule says."""
    settings = {"schedule": specimen.schedule, **settings}
    with accelerated(pipe, **settings):
        latents = run(pipe, call or specimen.arguments())
        made = report(pipe)
    assert torch.isfinite(latents).all(), f"{settings}: latents are not finite"
    assert made.complete, f"{settings}: the report is incomplete"
    assert made.schedule == settings["schedule"], f"{made.schedule} ran: {[step.note for step in made.steps]}"
    return latents


@check("schedules", "a list, a function, the threshold rule and a target, each as it says")
def schedules(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    listed = coarse_run(specimen, pipe)
    assert not torch.equal(listed, plain)
    with accelerated(pipe, schedule=lambda index, patch_std: specimen.schedule[index]):
        assert torch.equal(run(pipe, specimen.arguments()), listed), "a function gives other latents than its list"
    with accelerated(pipe, multiples=(1, *specimen.multiples), threshold=1e9):
        run(pipe, specimen.arguments())
        made = report(pipe)
    assert max(made.schedule) == max(specimen.multiples), f"nothing is rough at 1e9, yet {made.schedule} ran"
    assert all(step.patch_std for step in made.steps[4:]), "no evolution was measured"
    with accelerated(pipe, speedup=2.0):
        run(pipe, specimen.arguments(steps=16))
        made = report(pipe)
    assert made.speedup_estimate >= 1.9, f"a speed-up of 2 came to {made.speedup_estimate:.2f}"


def _undecoded(specimen: Specimen) -> str:
    return "" if getattr(specimen.make(), "vae", None) is not None else "no autoencoder to judge pictures by"


@check("fit", "a schedule is fitted to prompts that are given as embeddings, and runs", _undecoded)
def fitted(specimen: Specimen) -> None:
    pipe = specimen.make()
    given = specimen.arguments(steps=6)
    call = {"num_inference_steps": given["num_inference_steps"]}
    prompt = {name: value for name, value in given.items() if name not in (*call, "generator", "output_type")}
    found = fit_schedule(pipe, [prompt], speedup=1.4, keep=False, **call)
    assert found.speedup >= 1.4 and found.prompts == 1, f"{found}"
    coarse_run(specimen, pipe, specimen.arguments(steps=6), schedule=found.schedule)


@check("paths", "every coarse path, also with a batch and on a grid that 2 does not divide")
def paths(specimen: Specimen) -> None:
    height, width = specimen.odd
    for coarse in path_names():
        if not coarse.startswith("adapter"):
            pipe = specimen.make()
            coarse_run(specimen, pipe, coarse=coarse)
            coarse_run(specimen, pipe, specimen.arguments(height=height, width=width), coarse=coarse)
            coarse_run(specimen, pipe, coarse=coarse, positions="interpolated")
    if specimen.batches:
        pipe = specimen.make()
        together = coarse_run(specimen, pipe, specimen.arguments(batch=2))
        assert len(together) == 2


@check("guided", "guidance keeps a history per prompt", unguided)
def guided(specimen: Specimen) -> None:
    pipe = specimen.make()
    alone = coarse_run(specimen, pipe)
    both = coarse_run(specimen, pipe, specimen.arguments(guided=True))
    assert not torch.equal(alone, both), "guidance changes nothing"


def _not_in_one_batch(specimen: Specimen) -> str:
    second = "it predicts a second output" if specimen.family.companion_scheduler else ""
    return unguided(specimen) or second


@check("one batch", "both calls of guidance in one batch predict what they predict apart", _not_in_one_batch)
def one_batch(specimen: Specimen) -> None:
    pipe = specimen.make()
    module = next(iter(denoisers(pipe, specimen.family).values()))
    asked: list[None] = []
    ran: list[None] = []

    def counted(when: str) -> tuple[torch.Tensor, set[str]]:
        asked.clear()
        ran.clear()
        with accelerated(pipe, schedule=specimen.schedule, batch_guidance=when):
            return run(pipe, specimen.arguments(guided=True)), {step.note for step in report(pipe).steps if step.note}

    last = module.get_submodule(specimen.family.projection_names[1])
    asking = module.register_forward_hook(lambda *_: asked.append(None))
    running = last.register_forward_hook(lambda *_: ran.append(None))
    with removed(asking), removed(running):
        wanted, _ = counted("never")
        apart, twice = len(ran), len(asked) > len(specimen.schedule)
        for when in ("coarse", "always"):
            found, notes = counted(when)
            assert_close(found, wanted, 1e-5, f"batch_guidance={when!r}")
            assert not twice or len(ran) < apart or notes, f"batch_guidance={when!r} joins no calls and says nothing"


@check("report", "steps, tokens and FLOP of the last call")
def reported(specimen: Specimen) -> None:
    caught = first_call(specimen)
    geometry, pipe = caught.call.geometry, specimen.make()
    # without the runs beside full steps by which delta learns what the coarse model misses
    with accelerated(pipe, schedule=specimen.schedule, coarse="band-split"):
        run(pipe, specimen.arguments())
        made = report(pipe)
    for step, kind in zip(made.steps, specimen.schedule, strict=True):
        assert step.tokens == (geometry.tokens(kind) if kind else 0)
        assert (step.flops > 0) == (kind > 0) and step.full_flops > 0
        assert (step.executed == "cached") == (kind == 0)
    assert made.speedup_estimate > 1
    assert json.loads(made.to_json()) == json.loads(json.dumps(made.to_dict())) and str(made)


@check("failing call", "an error in the middle of a call reaches no other call")
def failing(specimen: Specimen) -> None:
    pipe = specimen.make()
    wanted = coarse_run(specimen, pipe)
    accelerate(pipe, schedule=specimen.schedule)
    module = next(iter(denoisers(pipe, family_of(pipe)).values()))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ZeroDivisionError

    with removed(module.register_forward_pre_hook(fail)), suppress(ZeroDivisionError):
        run(pipe, specimen.arguments())
    assert torch.equal(run(pipe, specimen.arguments()), wanted)
    restore(pipe)


@check("shared components", "a pipeline made of an accelerated one's components runs as it does, or plain")
def shared(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    wanted = coarse_run(specimen, pipe)
    with accelerated(pipe, schedule=specimen.schedule):
        other = type(pipe).from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        found = run(other, specimen.arguments())
        assert torch.equal(found, wanted) or torch.equal(found, plain)
        assert torch.equal(run(pipe, specimen.arguments()), wanted)
    assert torch.equal(run(other, specimen.arguments()), plain)


@check("graphs", "captured graphs give what eager execution gives, in every call")
def graphs(specimen: Specimen) -> None:
    """Recorded on the CPU under the rules of CUDA graphs; see :class:`ddit_rt.runtime.Recording`."""
    pipe = specimen.make()
    wanted = coarse_run(specimen, pipe)
    recording = Recording()
    made = AcceleratedPipeline(pipe, family_of(pipe), DDiTConfig(schedule=specimen.schedule), capture=recording)
    made.attach()
    try:
        for _ in range(2):
            found = run(pipe, specimen.arguments())
            notes = {step.note for step in report(pipe).steps if step.note}
            kinds = [step.executed for step in report(pipe).steps if step.multiple]
            assert kinds == ["graph"] * len(kinds), f"{kinds} {notes}"
            assert_close(found, wanted, 1e-5, "graphs")
        assert recording.replays > recording.captures
    finally:
        made.detach()


@check("first-block cache", "diffusers' FirstBlockCache on top, with a state per patch size")
def first_block_cache(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    # it reuses wherever it can: residuals of another token count would not fit
    coarse_run(specimen, pipe, cache=FirstBlockCacheConfig(threshold=1e9))
    assert torch.equal(run(pipe, specimen.arguments()), plain)


def _published(specimen: Specimen) -> str:
    return "no published coefficients" if type(specimen.family).trunk is Family.trunk else ""


@check("TeaCache", "TeaCache on top, with a state per patch size", _published)
def teacache(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    with accelerated(pipe, schedule=[1] * 8, cache=TeaCacheConfig(threshold=1e9)):
        run(pipe, specimen.arguments())
        assert "cached" in {step.executed for step in report(pipe).steps}
    with accelerated(pipe, schedule=specimen.schedule, cache=TeaCacheConfig(threshold=1e-9)):
        run(pipe, specimen.arguments())
        assert report(pipe).schedule == specimen.schedule
    assert torch.equal(run(pipe, specimen.arguments()), plain)
