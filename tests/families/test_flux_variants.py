"""What the variants of FLUX.1 carry beside the picture, on coarse tokens."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline
from specimens import SPECIMENS
from specimens.flux import packed, variant
from tiny import flux

import ddit_rt
from ddit_rt.families import NotCoarseError
from ddit_rt.families.flux import Flux
from ddit_rt.families.testing import run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import bands

FAMILY = Flux()
SIGMA = 0.6


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call_of(specimen, **options):
    return first_call(SPECIMENS[specimen], **options)


def own_small_run(caught, multiple, hidden, **arguments):
    """The transformer's result on a picture k times smaller, whose arguments are those of the flux specimen."""
    small = call_of("flux-dev", height=64 // multiple, width=64 // multiple)
    given = {**small.arguments, "hidden_states": hidden, "timestep": torch.full((1,), SIGMA), **arguments}
    given = {**given, "guidance": caught.arguments["guidance"]}
    with torch.no_grad():
        return FAMILY.output(caught.module, small.call, caught.module(**given))


@pytest.mark.parametrize("multiple", [2, 4])
def test_a_coarse_token_gets_the_mean_residual_of_the_tokens_it_covers(multiple):
    """Residuals that are alike there are those of the small picture."""
    caught = call_of("flux-controlnet")
    rows = 8 // multiple
    small = {
        "controlnet_block_samples": [noise(1, rows * rows, 32, seed=1)],
        "controlnet_single_block_samples": [noise(1, rows * rows, 32, seed=2)],
    }
    spread = {
        name: [torch.nn.functional.interpolate(one.mT.unflatten(2, (rows, rows)), scale_factor=multiple).flatten(2).mT]
        for name, (one,) in small.items()
    }
    call = FAMILY.parse(caught.module, {**caught.arguments, **spread})
    low = noise(1, 4, 1, 16 // multiple, 16 // multiple)
    with torch.no_grad():
        found = FAMILY.run_low(caught.module, caught.module.forward, call, low, SIGMA, multiple, True)
    wanted = own_small_run(caught, multiple, packed(low), **small)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    without = own_small_run(caught, multiple, packed(low))
    assert not torch.allclose(found, without, rtol=1e-3, atol=1e-3)


def test_residuals_for_another_grid_run_full():
    caught = call_of("flux-controlnet")
    with pytest.raises(NotCoarseError, match="3 residuals for 64 tokens"):
        FAMILY.parse(caught.module, {**caught.arguments, "controlnet_block_samples": [torch.zeros(1, 3, 32)]})


@pytest.mark.parametrize("multiple", [2, 4])
def test_fill_pools_the_masked_picture_and_the_mask_with_the_grid(multiple):
    caught = call_of("flux-fill")
    call = caught.call
    assert call.latent.shape[1] == 4 and call.condition.shape[1] == 4 + 16
    mask = call.condition[:, 4:]
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (mask[..., :8] == 1).all() and (mask[..., 8:] == 0).all()
    low = noise(1, 4, 1, 16 // multiple, 16 // multiple)
    with torch.no_grad():
        found = FAMILY.run_low(caught.module, caught.module.forward, call, low, SIGMA, multiple, True)
    hidden = packed(torch.cat([low, bands.down(call.condition, multiple)], dim=1))
    torch.testing.assert_close(found, own_small_run(caught, multiple, hidden), rtol=1e-5, atol=1e-5)


def test_kontexts_reference_stays_full_in_tokens_ids_and_cost():
    caught = call_of("flux-kontext")
    call = caught.call
    references = 6 * 10
    assert call.geometry.tokens(1) == 64 and call.references.shape[1] == references
    assert call.text_tokens == 5 + references
    for native in (True, False):
        low = noise(1, 4, 1, 8, 8)
        coarse = FAMILY.low_arguments(call, low, SIGMA, 2, native)
        assert torch.equal(coarse["hidden_states"][:, 16:], caught.arguments["hidden_states"][:, 64:])
        assert torch.equal(coarse["img_ids"][16:], caught.arguments["img_ids"][64:].float())
    pipe = SPECIMENS["flux-kontext"].make()
    with ddit_rt.accelerated(pipe, schedule=[1, 2] * 4, coarse="band-split"):
        run(pipe, SPECIMENS["flux-kontext"].arguments())
        full, half = ddit_rt.report(pipe).steps[:2]
    assert (full.tokens, half.tokens) == (64, 16)
    assert half.flops == FAMILY.flops(caught.module, call.geometry, 2, 5 + references)


def test_a_control_lora_widens_the_embedding_and_not_the_latent():
    """FLUX.1-dev's configuration names no output channels, and loading such a LoRA changes the input channels in it."""
    specimen = SPECIMENS["flux-control"]
    pipe = variant(FluxControlPipeline)
    pipe.transformer.register_to_config(out_channels=None)
    weights = {"lora_A": noise(2, 32, seed=1), "lora_B": noise(32, 2, seed=2)}
    pipe.load_lora_weights({f"transformer.x_embedder.{name}.weight": value for name, value in weights.items()})
    assert pipe.transformer.config.in_channels == 32 and pipe.transformer.config.out_channels is None
    assert FAMILY.geometry(pipe, 64, 64) == call_of("flux-control").call.geometry
    plain = run(pipe, specimen.arguments())
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, specimen.arguments()), plain)
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        coarse = run(pipe, specimen.arguments())
        assert ddit_rt.report(pipe).schedule == specimen.schedule
    assert torch.isfinite(coarse).all() and not torch.equal(coarse, plain)


def test_every_prompts_probe_sees_its_own_ip_adapter_pictures():
    """The pipeline has one dictionary for both prompts and puts the other's pictures in it before a probe runs."""

    class Copying(FluxPipeline):
        @property
        def joint_attention_kwargs(self):
            return self._joint_attention_kwargs and dict(self._joint_attention_kwargs)

    specimen = SPECIMENS["flux-ip-adapter"]
    found = []
    for cls in (FluxPipeline, Copying):
        made = specimen.make()
        pipe = cls(**made.components)
        pipe.set_progress_bar_config(disable=True)
        with ddit_rt.accelerated(pipe, schedule=specimen.schedule, coarse="delta"):
            found.append(run(pipe, specimen.arguments(guided=True)))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["flux-fill", "flux-control-inpaint", "flux-controlnet-image", "flux-kontext-inpaint"])
def test_a_call_that_runs_its_last_steps_records_their_noise_levels(name):
    specimen = SPECIMENS[name]
    pipe = specimen.make()
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        run(pipe, specimen.arguments())
        steps = ddit_rt.report(pipe).steps
    whole = pipe.scheduler.sigmas.tolist()
    assert len(whole) == 2 * len(steps) + 1
    assert [step.sigma for step in steps] == whole[len(steps) : -1]
    assert [step.multiple for step in steps] == specimen.schedule


def test_pipelines_without_a_negative_prompt_are_not_guided():
    for name in ("flux-fill", "flux-control", "flux-controlnet-image"):
        specimen = SPECIMENS[name]
        assert not FAMILY.is_guided(specimen.make(), specimen.arguments())
    kontext = SPECIMENS["flux-kontext"]
    assert FAMILY.is_guided(flux(), kontext.arguments(guided=True))
