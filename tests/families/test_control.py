"""What a ControlNet adds to Qwen-Image and Stable Diffusion 3, on coarse tokens; FLUX's is in test_flux_variants.py."""

from __future__ import annotations

import pytest
import torch
from specimens import SPECIMENS

import ddit_rt
from ddit_rt.families import NotCoarseError
from ddit_rt.families.testing import run
from ddit_rt.families.testing.specimen import first_call

NETS = {"qwen-image-controlnet": "controlnet_block_samples", "sd3-controlnet": "block_controlnet_hidden_states"}
SIGMA = 0.6


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_a_coarse_token_gets_the_mean_residual_of_the_tokens_it_covers(name, multiple):
    """Residuals that are alike there are those of the small picture."""
    caught = first_call(SPECIMENS[name])
    family, module, argument = caught.family, caught.module, NETS[name]
    height, width = (side // multiple for side in SPECIMENS[name].size)
    small = first_call(SPECIMENS[name], height=height, width=width)
    rows, columns = small.call.geometry.grid(1)
    own = [noise(1, rows * columns, 32, seed=1), noise(1, rows * columns, 32, seed=2)]
    apart = 0.1 * noise(1, 32, rows * multiple, columns * multiple, seed=3)
    means = torch.nn.functional.avg_pool2d(apart, multiple)
    apart -= torch.nn.functional.interpolate(means, scale_factor=multiple)
    spread = [
        (torch.nn.functional.interpolate(one.mT.unflatten(2, (rows, columns)), scale_factor=multiple) + apart)
        .flatten(2)
        .mT
        for one in own
    ]
    call = family.parse(module, {**caught.arguments, argument: spread})
    given = {**small.arguments, argument: own}
    parsed = family.parse(module, given)
    with torch.no_grad():
        found = family.run_low(module, module.forward, call, parsed.latent, small.sigma, multiple, True)
        wanted = family.output(module, parsed, module(**given))
        without = family.output(module, parsed, module(**{**given, argument: None}))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, without, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETS)
def test_coarse_steps_run_coarsely_and_feel_the_picture(name):
    specimen, pipe = SPECIMENS[name], SPECIMENS[name].make()
    latents = []
    for scale in (1.0, 0.0):
        with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
            latents.append(run(pipe, specimen.arguments(guided=True) | {"controlnet_conditioning_scale": scale}))
            report = ddit_rt.report(pipe)
        assert report.schedule == specimen.schedule and not any(step.note for step in report.steps)
    assert not torch.equal(*latents)


@pytest.mark.parametrize("name", NETS)
def test_residuals_for_another_grid_run_full(name):
    caught = first_call(SPECIMENS[name])
    with pytest.raises(NotCoarseError, match=f"{NETS[name]}: 3 residuals for 64 tokens"):
        caught.family.parse(caught.module, {**caught.arguments, NETS[name]: [torch.zeros(1, 3, 32)]})
