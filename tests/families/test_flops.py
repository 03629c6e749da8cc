"""Family.flops against the operations PyTorch counts, and against the numbers for FLUX.1-dev."""

from types import SimpleNamespace

import pytest
import torch
from calls import caught
from diffusers import (
    FluxTransformer2DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from ddit_rt.families import ModelInputs, family_of
from ddit_rt.families.flux import Flux
from ddit_rt.families.testing import counted_flops
from ddit_rt.families.wan import Wan
from ddit_rt.families.wan_animate import WanAnimate
from ddit_rt.families.wan_vace import WanVACE
from ddit_rt.granularity import Geometry


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
    assert estimate == pytest.approx(counted_flops(lambda: module(**arguments)), rel=0.02)


def test_flux_dev_costs_what_is_known_of_it():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    flops = [Flux().flops(model, Geometry(16, 1, 128, 128, 2), k, 512) for k in (1, 2, 4)]
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
        freq_dim=256,
    )
    geometry = Geometry(16, 21, 60, 104, 2)
    one, two, four = (Wan().flops(SimpleNamespace(config=config), geometry, k, 512) for k in (1, 2, 4))
    assert two / one == pytest.approx(0.12, abs=0.01)
    assert four / one == pytest.approx(0.02, abs=0.01)


def flux_call(condition=0, references=0):
    geometry = Geometry(16, 1, 128, 128, 2)
    latent = torch.empty(1, 16, 1, 128, 128)
    arguments = {
        "timestep": torch.empty(1),
        "guidance": torch.empty(1),
        "pooled_projections": torch.empty(1, 768),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "txt_ids": torch.empty(512, 3),
        "img_ids": torch.empty(4096 + references, 3),
    }
    channels = torch.empty(1, condition, 1, 128, 128) if condition else None
    behind = torch.empty(1, references, 64) if references else None
    return ModelInputs(arguments, latent, channels, geometry, 512 + references, behind)


def wan_call(latent, condition=0, text_tokens=512, per_token=False, **more):
    frames, height, width = latent[1:]
    geometry = Geometry(*latent, 2)
    arguments = {
        "timestep": torch.empty(1, geometry.tokens(1)) if per_token else torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        **more,
    }
    beside = torch.empty(1, condition, frames, height, width) if condition else None
    return ModelInputs(arguments, torch.empty(1, *latent), beside, geometry, text_tokens)


VIDEO = (16, 21, 60, 104)
WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
FIRST_LAST = {"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280, "pos_embed_seq_len": 514}
VACE_1_3B = {**WAN_1_3B, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
PUBLISHED = {
    "flux-fill": lambda: (
        Flux(),
        FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True),
        flux_call(condition=80),
    ),
    "flux-kontext": lambda: (Flux(), FluxTransformer2DModel(guidance_embeds=True), flux_call(references=4096)),
    "wan-first-last": lambda: (
        Wan(),
        WanTransformer3DModel(**FIRST_LAST),
        wan_call(VIDEO, 20, 512 + 514, encoder_hidden_states_image=torch.empty(2, 257, 1280)),
    ),
    "wan-ti2v": lambda: (Wan(), WanTransformer3DModel(**WAN_5B), wan_call((48, 31, 44, 80), per_token=True)),
    "wan-animate": lambda: (
        WanAnimate(),
        WanAnimateTransformer3DModel(added_kv_proj_dim=5120),
        wan_call(
            VIDEO,
            20,
            512 + 257,
            encoder_hidden_states_image=torch.empty(1, 257, 1280),
            pose_hidden_states=torch.empty(1, 16, 20, *VIDEO[2:]),
            face_pixel_values=torch.empty(1, 3, 77, 512, 512),
        ),
    ),
    "wan-vace": lambda: (
        WanVACE(),
        WanVACETransformer3DModel(**VACE_1_3B),
        wan_call(VIDEO, control_hidden_states=torch.empty(1, 96, *VIDEO[1:])),
    ),
}


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_of_published_variants_are_those_of_the_transformer(name, multiple):
    with torch.device("meta"):
        family, module, call = PUBLISHED[name]()
        sides = [side * call.geometry.patch for side in call.geometry.grid(multiple)]
        low = torch.empty(*call.latent.shape[:3], *sides)
        total = counted_flops(lambda: family.run_low(module, module.forward, call, low, 0.5, multiple, True))
    assert family.flops(module, call.geometry, multiple, call.text_tokens) == pytest.approx(total, rel=0.01)
