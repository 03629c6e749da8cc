"""Components that more than one pipeline holds, and copies of them: nothing is accelerated without saying so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FluxImg2ImgPipeline,
    FluxPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from shared_pipelines import patches
from tiny import flux, flux_inputs, latents_of, picture, randomise, wan, wan_inputs, wan_transformer

import ddit_rt
from ddit_rt import DDiTError

COARSE = (1, 1, 2, 4, 1, 4, 2, 2)


def coarse(index: int, patch_std: Any) -> int:
    """A schedule for calls of any length."""
    return COARSE[index % 8]


def image_to_image(pipe: Any) -> Any:
    return FluxImg2ImgPipeline.from_pipe(pipe)


def same_components(pipe: Any) -> Any:
    other = FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


MAKE: dict[str, Callable[[Any], Any]] = {"from_pipe": image_to_image, "components": same_components}


def inputs_of(other: Any) -> dict[str, Any]:
    extra = {"image": picture(), "strength": 0.75} if isinstance(other, FluxImg2ImgPipeline) else {}
    return flux_inputs(**extra)


def plain_results(make: Callable[[Any], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain latents of a pipeline and of one made from it."""
    pipe = flux()
    other = make(pipe)
    return latents_of(pipe, flux_inputs()), latents_of(other, inputs_of(other))


def sharing(make):
    """An accelerated pipeline that has been called, and one made of its components."""
    pipe = ddit_rt.accelerate(flux(), schedule=coarse)
    latents_of(pipe, flux_inputs())
    return pipe, make(pipe)


# -- pipelines made from accelerated ones ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_pipeline_of_accelerated_components_runs_plain_or_reports_its_call(make):
    _, plain = plain_results(make)
    pipe, other = sharing(make)
    result = latents_of(other, inputs_of(other))
    if torch.equal(result, plain):
        assert len(ddit_rt.report(pipe).steps) == 8, "the report of the accelerated pipeline's call is gone"
    else:
        # 6 of 8 steps at strength 0.75
        assert len(ddit_rt.report(other).steps) == (6 if isinstance(other, FluxImg2ImgPipeline) else 8)
        assert torch.equal(latents_of(ddit_rt.restore(other), inputs_of(other)), plain)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_pipeline_of_accelerated_components_can_be_restored(make):
    first, second = plain_results(make)
    pipe = ddit_rt.accelerate(flux(), schedule=coarse)
    other = make(pipe)
    assert ddit_rt.restore(other) is other
    assert not patches(other)
    assert torch.equal(latents_of(other, inputs_of(other)), second)
    assert torch.equal(latents_of(pipe, flux_inputs()), first)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), flux_inputs()), first)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_pipeline_of_accelerated_components_can_take_over(make):
    first, second = plain_results(make)
    alone = make(flux())
    with ddit_rt.accelerated(alone, schedule=coarse, coarse="band-split"):
        wanted = latents_of(alone, inputs_of(alone))
    pipe = ddit_rt.accelerate(flux(), schedule=coarse)
    other = make(pipe)
    assert ddit_rt.accelerate(other, schedule=coarse, coarse="band-split") is other
    assert torch.equal(latents_of(other, inputs_of(other)), wanted)
    report = ddit_rt.report(other)
    assert report.complete and report.config["coarse"] == "band-split"
    ddit_rt.restore(other)
    assert not patches(other)
    assert torch.equal(latents_of(other, inputs_of(other)), second)
    assert torch.equal(latents_of(pipe, flux_inputs()), first)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_restored_components_serve_every_pipeline_plain(make):
    first, second = plain_results(make)
    pipe, other = sharing(make)
    ddit_rt.restore(pipe)
    assert torch.equal(latents_of(other, inputs_of(other)), second)
    assert torch.equal(latents_of(pipe, flux_inputs()), first)
    assert not patches(other)


def test_the_original_still_runs_as_accelerated_after_a_pipeline_was_made_of_its_components():
    pipe = ddit_rt.accelerate(flux(), schedule=coarse)
    wanted = latents_of(pipe, flux_inputs())
    for make in MAKE.values():
        other = make(pipe)
        latents_of(other, inputs_of(other))
        assert torch.equal(latents_of(pipe, flux_inputs()), wanted)
        assert ddit_rt.report(pipe).complete and ddit_rt.report(pipe).schedule == list(COARSE)


# -- classes that are not supported ---------------------------------------------------------------------------------


def wan_vae() -> Any:
    return randomise(
        AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def video_to_video(pipe: WanPipeline, own_scheduler: bool) -> Any:
    components = {name: pipe.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config) if own_scheduler else pipe.scheduler
    other = WanVideoToVideoPipeline(scheduler=scheduler, **components)
    other.set_progress_bar_config(disable=True)
    return other


def video_inputs() -> dict[str, Any]:
    inputs = wan_inputs(strength=0.6)
    del inputs["num_frames"]
    video = [picture(64, 96)[0] for _ in range(5)]
    return {**inputs, "video": torch.stack(video).unsqueeze(0)}


@pytest.mark.parametrize("own_scheduler", [True, False])
def test_video_to_video_on_the_components_of_an_accelerated_pipeline_is_served_or_plain(own_scheduler):
    """Served where it shares all of them, as a supported pipeline; plain where it has a scheduler of its own."""
    pipe = wan(euler=True)
    pipe.vae = wan_vae()
    other = video_to_video(pipe, own_scheduler)
    plain = latents_of(other, video_inputs())
    with ddit_rt.accelerated(pipe, schedule=coarse):
        wanted = latents_of(pipe, wan_inputs())
        found = latents_of(other, video_inputs())
        assert torch.isfinite(found).all()
        assert torch.equal(found, plain) == own_scheduler
        assert torch.equal(latents_of(pipe, wan_inputs()), wanted)
    assert torch.equal(latents_of(other, video_inputs()), plain)


def test_image_to_video_on_the_transformer_of_an_accelerated_pipeline_does_not_change_it():
    """Two supported classes, one scheduler, transformers of their own."""
    pipe, components = wan(euler=True), {"tokenizer": None, "text_encoder": None}
    other = WanImageToVideoPipeline(
        scheduler=pipe.scheduler, vae=wan_vae(), transformer=wan_transformer(in_channels=12), **components
    )
    other.set_progress_bar_config(disable=True)
    inputs = wan_inputs(image=picture(64, 96))
    plain = latents_of(other, inputs)
    with ddit_rt.accelerated(pipe, schedule=coarse):
        latents_of(pipe, wan_inputs(steps=5))
        assert torch.equal(latents_of(other, inputs), plain)
        report = ddit_rt.report(pipe)
    assert report.complete and len(report.steps) == 5


# -- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [flux, wan, lambda: wan(euler=True)], ids=["flux", "unipc", "euler"])
def test_a_shallow_copy_of_the_scheduler_does_not_drive_the_original(make):
    pipe = ddit_rt.accelerate(make(), schedule=coarse)
    pipe.scheduler.set_timesteps(8, **({"mu": 1.0} if pipe.scheduler.config.get("use_dynamic_shifting") else {}))
    before = pipe.scheduler.timesteps.clone()
    try:
        copied = copy.copy(pipe.scheduler)
    except DDiTError as error:
        assert "restore" in str(error)
        return
    copied.set_timesteps(3, **({"mu": 1.0} if copied.config.get("use_dynamic_shifting") else {}))
    assert len(copied.timesteps) == 3
    assert torch.equal(pipe.scheduler.timesteps, before)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("through", [pickled, saved])
def test_a_plain_pipeline_can_be_pickled(through):
    """What the test below relies on."""
    pipe = flux()
    assert torch.equal(latents_of(through(pipe), flux_inputs()), latents_of(pipe, flux_inputs()))
    with ddit_rt.accelerated(pipe, schedule=coarse):
        latents_of(pipe, flux_inputs())
    assert torch.equal(latents_of(through(pipe), flux_inputs()), latents_of(pipe, flux_inputs()))


@pytest.mark.parametrize("what", ["pipeline", "transformer"])
@pytest.mark.parametrize("through", [pickled, saved])
def test_an_accelerated_pipeline_is_pickled_plain_or_refused_with_the_way_out(through, what):
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, threshold=1e9, order=1)
    wanted = latents_of(pipe, inputs)
    try:
        loaded = through(pipe if what == "pipeline" else pipe.transformer)
    except DDiTError as error:
        assert "restore" in str(error)
    else:
        fresh = loaded if what == "pipeline" else flux()
        if what == "transformer":
            fresh.transformer = loaded
        assert torch.equal(latents_of(fresh, inputs), plain)
        assert ddit_rt.restore(fresh) is fresh and not patches(fresh)
    assert torch.equal(latents_of(pipe, inputs), wanted)
    assert torch.equal(latents_of(ddit_rt.restore(pipe), inputs), plain)


def test_weights_and_configurations_of_an_accelerated_pipeline_are_saved_plain(tmp_path):
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=coarse)
    wanted = latents_of(pipe, inputs)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    loaded = FluxPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert not patches(loaded) and "_ddit_pipeline" not in loaded.__dict__
    # a file's weights may lie in memory otherwise, which changes the order of sums
    torch.testing.assert_close(latents_of(loaded, inputs), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(latents_of(pipe, inputs), wanted)
