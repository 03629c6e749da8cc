"""Caches of diffusers that hold activations of one token count: refused before, run full after accelerate()."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast
from tiny import flux, flux_inputs, latents_of

import ddit_rt
from ddit_rt import ConfigError

SCHEDULE = [1, 1, 2, 4, 1, 2, 4, 1]


def broadcast():
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: 500,
    )


def faster():
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: 500,
        tensor_format="BCHW",
        is_guidance_distilled=True,
    )


CACHES = {"broadcast": broadcast, "faster": faster}


@pytest.mark.parametrize("name", CACHES)
def test_one_that_is_on_is_refused_with_the_way_out(name):
    pipe = flux()
    pipe.transformer.enable_cache(CACHES[name]())
    with pytest.raises(ConfigError, match=r"disable_cache\(\).*multiples=\(1,\)"):
        ddit_rt.accelerate(pipe, threshold=1e-3)
    assert "_ddit_pipeline" not in pipe.transformer.__dict__
    for settings in ({"multiples": (1,)}, {"threshold": 0}, {}, {"speedup": 3}):  # no step can be coarse
        ddit_rt.restore(ddit_rt.accelerate(pipe, **settings))
    pipe.transformer.disable_cache()
    ddit_rt.accelerate(pipe, threshold=1e-3)


@pytest.mark.parametrize("name", ["broadcast", "hooks alone"])
def test_one_that_is_switched_on_afterwards_makes_every_step_full(name):
    pipe, inputs = flux(), flux_inputs()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE)
    accelerated = latents_of(pipe, inputs)
    if name == "hooks alone":
        apply_pyramid_attention_broadcast(pipe.transformer, broadcast())
    else:
        pipe.transformer.enable_cache(broadcast())
    cached = latents_of(pipe, inputs)
    report = ddit_rt.report(pipe)
    assert report.schedule == [1] * 8 and all("one token count" in step.note for step in report.steps)
    if name == "hooks alone":
        return
    ddit_rt.restore(pipe)
    pipe.transformer._reset_stateful_cache()
    assert torch.equal(latents_of(pipe, inputs), cached)
    pipe.transformer.disable_cache()
    ddit_rt.accelerate(pipe, schedule=SCHEDULE)
    assert torch.equal(latents_of(pipe, inputs), accelerated)


def test_contexts_are_told_the_step_as_the_pipelines_tell_it(monkeypatch):
    pipe, told = flux(), []
    own = pipe.transformer.cache_context

    def context(name, **step):
        if name.startswith("call"):  # the pipeline has contexts of its own around ours
            told.append(step)
        return own(name, **step)

    monkeypatch.setattr(pipe.transformer, "cache_context", context)
    with ddit_rt.accelerated(pipe, schedule=[1] * 8, cache=FirstBlockCacheConfig(threshold=0.0)):
        latents_of(pipe, flux_inputs())
        steps = ddit_rt.report(pipe).steps
    assert [step["step_index"] for step in told] == list(range(8))
    assert [step["sigma"] for step in told] == [step.sigma for step in steps]
    assert {step["num_inference_steps"] for step in told} == {8}
