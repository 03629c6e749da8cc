"""Family.flops against the operations PyTorch counts, and against the numbers for FLUX.1-dev."""

from types import SimpleNamespace

import pytest
import torch
from calls import caught
from torch.utils.flop_counter import FlopCounterMode

from ddit_rt.families import family_of
from ddit_rt.families.flux import Flux
from ddit_rt.families.wan import Wan
from ddit_rt.granularity import Geometry


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("name", ["flux", "flux-batch", "wan", "wan-batch", "wan-image"])
def test_flops_are_those_of_the_transformer(name, multiple):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    call = family.parse(module, arguments)
    low = torch.zeros(*call.latent.shape[:3], *(side * call.geometry.patch for side in call.geometry.grid(multiple)))
    arguments = family.low_arguments(call, low, 0.5, multiple, True)
    estimate = call.latent.shape[0] * family.flops(module, call.geometry, multiple, call.text_tokens)
    # the tiny models' embeddings of time and pooled text, which are left out, weigh more than in a real one
    assert estimate == pytest.approx(counted(lambda: module(**arguments)), rel=0.02)


def test_flux_dev_costs_what_is_known_of_it():
    config = SimpleNamespace(
        num_layers=19,
        num_single_layers=38,
        num_attention_heads=24,
        attention_head_dim=128,
        in_channels=64,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
    )
    flops = [Flux().flops(SimpleNamespace(config=config), Geometry(16, 1, 128, 128, 2), k, 512) for k in (1, 2, 4)]
    assert [round(f / 1e12, 1) for f in flops] == [74.4, 21.5, 10.3]


def test_wan_costs_fall_faster_than_fluxs():
    config = SimpleNamespace(
        num_layers=30,
        num_attention_heads=12,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        ffn_dim=8960,
        text_dim=4096,
    )
    geometry = Geometry(16, 21, 60, 104, 2)
    one, two, four = (Wan().flops(SimpleNamespace(config=config), geometry, k, 512) for k in (1, 2, 4))
    assert two / one == pytest.approx(0.12, abs=0.01)
    assert four / one == pytest.approx(0.02, abs=0.01)
