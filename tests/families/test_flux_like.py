"""What FLUX's kin have that FLUX has not: masks over tokens, pictures to edit at the new one's places."""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from specimens import SPECIMENS

import ddit_rt
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.families.flux_like import Chroma, LongCatImage, OvisImage
from ddit_rt.families.testing import counted_flops, run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry, bands

NAMES = ["chroma", "chroma-image", "chroma-inpaint", "longcat-image", "longcat-image-edit", "ovis-image"]
GEOMETRY = Geometry(16, 1, 128, 128, 2)  # of 1024 x 1024 pixels


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_guided_calls_run_the_transformer_twice_a_step(name, guided):
    specimen = SPECIMENS[name]
    pipe, given = specimen.make(), specimen.arguments(guided=guided, steps=4)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    run(pipe, dict(given))
    call = {key: parameter.default for key, parameter in inspect.signature(pipe.__call__).parameters.items()} | given
    assert family_of(pipe).is_guided(pipe, call) == guided
    assert len(calls) == (8 if guided else 4)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_chromas_mask_follows_the_tokens(multiple):
    height, width = SPECIMENS["chroma"].odd  # 9 x 5 tokens
    caught = first_call(SPECIMENS["chroma"], height=height, width=width, batch=2)
    family, text = caught.family, caught.call.text_tokens
    own = caught.arguments["attention_mask"]
    assert own.shape == (2, text + 45) and 0 < own[:, :text].sum() < own[:, :text].numel()
    given = own.clone()
    given[1, text + 4 * 5 + 4] = 0  # row 4, column 4
    call = family.parse(caught.module, {**caught.arguments, "attention_mask": given})
    for native in (True, False):
        mask = family.placed_arguments(call, multiple, native)["attention_mask"]
        rows, columns = call.geometry.grid(multiple)
        assert mask.dtype == own.dtype and torch.equal(mask[:, :text], own[:, :text])
        picture = mask[:, text:].unflatten(1, (rows, columns))
        assert picture[0].all() and (picture[1] == 0).nonzero().tolist() == [[4 // multiple, 4 // multiple]]


def test_chromas_mask_reaches_as_far_as_a_grid_padded_for_ranks():
    height, width = SPECIMENS["chroma"].odd
    caught = first_call(SPECIMENS["chroma"], height=height, width=width)
    call = replace(caught.call, geometry=replace(caught.call.geometry, ranks=4))
    assert call.geometry.tokens(2) > 15
    mask = caught.family.placed_arguments(call, 2, True)["attention_mask"]
    assert mask.shape[1] == call.text_tokens + call.geometry.tokens(2) and mask[:, call.text_tokens :].all()


def test_chroma_without_a_mask_stays_without():
    caught = first_call(SPECIMENS["chroma"])
    call = caught.family.parse(caught.module, {**caught.arguments, "attention_mask": None})
    assert "attention_mask" not in caught.family.placed_arguments(call, 2, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chroma_computes_the_same_bits_where_it_can_be_captured(dtype):
    caught = first_call(SPECIMENS["chroma"], batch=2)
    module = caught.module.to(dtype)
    given = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and "ids" not in name else value
        for name, value in caught.arguments.items()
    }
    plain = module(**given)[0]
    own = module.time_text_embed.forward
    with caught.family.capturable(module):
        assert module.time_text_embed.forward != own
        assert torch.equal(module(**given)[0], plain)
    assert module.time_text_embed.forward == own


def test_chroma_with_residuals_of_another_grid_runs_full():
    caught = first_call(SPECIMENS["chroma"])
    residuals = {"controlnet_single_block_samples": [torch.zeros(1, 3, 32)]}
    with pytest.raises(NotCoarseError, match="controlnet_single_block_samples: 3 residuals"):
        caught.family.parse(caught.module, {**caught.arguments, **residuals})


@pytest.mark.parametrize("multiple", [2, 4])
def test_a_picture_to_be_edited_shrinks_with_the_new_one(multiple):
    """As in the pipeline, where both are of one size: each coarse token finds its counterpart at its own place."""
    caught = first_call(SPECIMENS["longcat-image-edit"])
    family, call = caught.family, caught.call
    text, side = caught.arguments["encoder_hidden_states"].shape[1], 8 // multiple
    low = bands.down(call.latent, multiple)
    given = family.low_arguments(call, low, 0.5, multiple, True)
    rows, columns = (torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side))
    places = torch.stack([rows, columns], dim=1) + text
    assert given["img_ids"].dtype == torch.float64
    assert given["img_ids"][:, 0].tolist() == [1] * side**2 + [2] * side**2
    assert torch.equal(given["img_ids"][:, 1:].long(), places.repeat(2, 1))

    def latent(tokens):
        pipe = caught.pipe
        pixels = 1024 // int((64 / tokens.shape[1]) ** 0.5)
        return pipe._unpack_latents(tokens, pixels, pixels, pipe.vae_scale_factor)

    reference = latent(given["hidden_states"][:, side**2 :])
    full = latent(caught.arguments["hidden_states"][:, 64:])
    torch.testing.assert_close(reference, torch.nn.functional.avg_pool2d(full, multiple))
    torch.testing.assert_close(latent(given["hidden_states"][:, : side**2]), low.squeeze(2))
    assert family.tokens_beside(call, multiple, True) == text + side**2


def test_a_picture_to_be_edited_stays_where_coarse_tokens_lie_on_the_full_grid():
    caught = first_call(SPECIMENS["longcat-image-edit"])
    family, call = caught.family, caught.call
    given = family.low_arguments(call, bands.down(call.latent, 2), 0.5, 2, False)
    assert torch.equal(given["hidden_states"][:, 16:], call.references)
    assert torch.equal(given["img_ids"][16:].double(), caught.arguments["img_ids"][64:])
    text = caught.arguments["encoder_hidden_states"].shape[1]
    assert (given["img_ids"][0, 1:] - text).tolist() == [0.5, 0.5]
    assert family.tokens_beside(call, 2, False) == call.text_tokens == text + 64


def test_a_report_counts_the_small_reference():
    specimen = SPECIMENS["longcat-image-edit"]
    pipe = specimen.make()
    with ddit_rt.accelerated(pipe, schedule=[1, 2], coarse="band-split"):
        run(pipe, specimen.arguments(steps=2))
        full, coarse = ddit_rt.report(pipe).steps
    family, text = family_of(pipe), first_call(specimen).call.text_tokens - 64
    geometry = family.geometry(pipe, 1024, 1024)
    assert full.flops == family.flops(pipe.transformer, geometry, 1, text + 64)
    assert coarse.flops == family.flops(pipe.transformer, geometry, 2, text + 16)


def test_references_that_lie_elsewhere_run_full():
    caught = first_call(SPECIMENS["longcat-image-edit"])
    ids, tokens = caught.arguments["img_ids"], caught.arguments["hidden_states"]
    moved = ids.clone()
    moved[64:, 1] += 1
    with pytest.raises(NotCoarseError, match="other positions"):
        caught.family.parse(caught.module, {**caught.arguments, "img_ids": moved})
    cut = {"img_ids": ids[:96].clone(), "hidden_states": tokens[:, :96]}
    with pytest.raises(NotCoarseError, match=r"a reference of 32 tokens .* grid of 64"):
        caught.family.parse(caught.module, {**caught.arguments, **cut})


def two_stream(module, multiple, text):
    count, width = GEOMETRY.tokens(multiple), module.config.joint_attention_dim
    return {
        "hidden_states": torch.empty(1, count, 64),
        "encoder_hidden_states": torch.empty(1, text, width),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(count, 3),
        "txt_ids": torch.empty(text, 3),
    }


@pytest.mark.parametrize(
    "family, make, text",
    [
        (Chroma(), ChromaTransformer2DModel, 512),
        (LongCatImage(), lambda: LongCatImageTransformer2DModel(num_layers=10, num_single_layers=20), 512),
        (OvisImage(), OvisImageTransformer2DModel, 256),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_flops_of_the_published_sizes(family, make, text):
    with torch.device("meta"):
        module = make()
        for multiple in (1, 2):
            given = two_stream(module, multiple, text)
            with family.capturable(module):  # values made on the host are not on the meta device
                counted = counted_flops(lambda given=given: module(**given))
            assert family.flops(module, GEOMETRY, multiple, text) == pytest.approx(counted, rel=1e-3)
