"""What only Qwen-Image has: positions from picture sizes, references, clean modulation of references, masked text."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    QwenImageEditInpaintPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from specimens import SPECIMENS
from specimens.qwen import EDIT_SIZES, call, picture, qwen

import ddit_rt
from ddit_rt.families import NotCoarseError
from ddit_rt.families.qwen import QwenImage
from ddit_rt.families.testing import Specimen, counted_flops, run, run_check
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry

FAMILY = QwenImage()
TWO = SPECIMENS["qwen-image-edit-plus"]


def rope_of(caught, multiple, native):
    """(pictures, text) rotations that reach the blocks in a coarse run."""
    seen = []
    hook = caught.module.pos_embed.register_forward_hook(lambda _, args, output: seen.append(output))
    low = torch.zeros(1, 4, 1, *(2 * side for side in caught.call.geometry.grid(multiple)))
    FAMILY.run_low(caught.module, caught.module.forward, caught.call, low, 0.5, multiple, native)
    hook.remove()
    return seen[0]


def positions(axis, rope, rotations):
    """Along an axis, from its second component: the first turns by a radian per token, and around."""
    start, dim = sum(rope.axes_dim[:axis]) // 2, rope.axes_dim[axis]
    return rotations[:, start + 1].angle() * rope.theta ** (2 / dim)


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (40, 72)])
def test_native_positions_are_those_of_the_smaller_picture(size):
    caught = first_call(SPECIMENS["qwen-image"], height=size[0], width=size[1])
    rope, grid = caught.module.pos_embed, caught.call.geometry.grid(2)
    pictures, text = rope_of(caught, 2, native=True)
    wanted = rope([[(1, *grid)]], max_txt_seq_len=5, device=pictures.device)
    assert torch.equal(pictures, wanted[0]) and torch.equal(text, wanted[1])


@pytest.mark.parametrize("size", [(64, 64), (72, 40), (40, 72)])
def test_on_the_full_grid_coarse_tokens_lie_at_the_centres_of_what_they_cover(size):
    caught = first_call(SPECIMENS["qwen-image"], height=size[0], width=size[1])
    rope, geometry = caught.module.pos_embed, caught.call.geometry
    rows, columns = geometry.grid(1)
    full = rope([[(1, rows, columns)]], max_txt_seq_len=5, device=torch.device("cpu"))
    pictures, text = rope_of(caught, 2, native=False)
    assert torch.equal(text, full[1]), "text begins where the full picture ends"
    for axis, count in ((1, rows), (2, columns)):
        fine = positions(axis, rope, full[0]).view(rows, columns).movedim(axis - 1, 0)[:, 0]
        found = positions(axis, rope, pictures).view(geometry.grid(2)).movedim(axis - 1, 0)[:, 0]
        assert float(fine[0]) == pytest.approx(count // 2 - count, abs=1e-4)
        # a coarse token that hangs over the edge lies half a token after the last
        beyond = torch.cat([fine, fine[-1:] + 1])[: 2 * len(found)]
        torch.testing.assert_close(found, beyond.view(-1, 2).mean(1), atol=1e-4, rtol=0)


def test_references_keep_their_places_in_a_coarse_step():
    caught = first_call(TWO)
    full = caught.module.pos_embed(caught.arguments["img_shapes"], max_txt_seq_len=5, device=torch.device("cpu"))
    for native in (True, False):
        pictures, text = rope_of(caught, 2, native)
        assert len(pictures) == 16 + 64 + 64
        assert torch.equal(pictures[16:], full[0][64:])
        # both references are larger than the latent at 2p, so the text stays behind them
        assert torch.equal(text, full[1])


def test_positions_of_full_and_coarse_steps_do_not_mix():
    """The transformer keeps positions by size: what a coarse step leaves there must not reach a full one."""
    caught = first_call(SPECIMENS["qwen-image"])
    with torch.no_grad():
        before = caught.module(**caught.arguments)[0]
        for native in (False, True):
            rope_of(caught, 2, native)
        # the first call of a fresh transformer is coarse
        fresh = first_call(SPECIMENS["qwen-image"])
        rope_of(fresh, 2, native=False)
        assert torch.equal(caught.module(**caught.arguments)[0], before)
        assert torch.equal(fresh.module(**fresh.arguments)[0], before)


@pytest.mark.parametrize("native", [True, False])
def test_references_of_edit_2511_are_modulated_as_clean_in_coarse_steps_too(native):
    caught = first_call(TWO)
    seen = []
    block = caught.module.transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    low = torch.zeros(1, 4, 1, 8, 8)
    FAMILY.run_low(caught.module, caught.module.forward, caught.call, low, 0.5, 2, native)
    embedding = FAMILY.patch_embedding(caught.module, 2)
    FAMILY.run_patches(
        caught.module, caught.module.forward, caught.call, torch.zeros(1, 4, 1, 16, 16), 0.5, embedding, 2, native
    )
    hook.remove()
    for kwargs in seen:
        assert kwargs["modulate_index"].tolist() == [[0] * 16 + [1] * 128]
        assert kwargs["hidden_states"].shape[1] == 144


def test_padded_text_does_not_reach_a_coarse_step():
    caught = first_call(SPECIMENS["qwen-image"], batch=2)
    assert caught.arguments["encoder_hidden_states_mask"] is not None

    def low(embeds):
        given = {**caught.arguments, "encoder_hidden_states": embeds}
        inputs = FAMILY.parse(caught.module, given)
        return FAMILY.run_low(caught.module, caught.module.forward, inputs, torch.ones(2, 4, 1, 8, 8), 0.5, 2, True)

    embeds = caught.arguments["encoder_hidden_states"]
    padding, text = embeds.clone(), embeds.clone()
    padding[1, 4] += 1.0
    text[1, 3] += 1.0
    assert torch.equal(low(padding), low(embeds))
    assert not torch.equal(low(text), low(embeds))


def test_guidance_rescales_the_deembedded_prediction():
    """The pipeline brings the guided prediction of each token to the prompt's norm, over a full token's channels."""
    specimen = SPECIMENS["qwen-image"]
    pipe, predicted, stepped = specimen.make(), [], []
    own = pipe.scheduler.step

    def step(output, *args, **kwargs):
        stepped.append(output)
        return own(output, *args, **kwargs)

    pipe.scheduler.step = step
    pipe.transformer.register_forward_hook(lambda _, args, output: predicted.append(output[0]))
    with ddit_rt.accelerated(pipe, schedule=[1, 2], coarse="band-split", corrector=False):
        run(pipe, specimen.arguments(guided=True, steps=2))
    prompt, negative = predicted[2:]
    assert not torch.equal(stepped[1], prompt)
    guided = negative + 4.0 * (prompt - negative)
    wanted = guided * prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(stepped[1], wanted)


def test_calls_that_tokens_cannot_carry_run_full():
    caught = first_call(SPECIMENS["qwen-image"])
    for change, reason in (
        ({"controlnet_block_samples": [torch.zeros(1, 60, 32)]}, "controlnet_block_samples: 60 residuals for 64"),
        ({"img_shapes": [[(1, 8, 7)]]}, "lists 56 tokens, there are 64"),
        ({"img_shapes": [[(2, 8, 4)]]}, "a picture of 2 frames"),
        ({"img_shapes": [[(1, 8, 8)], [(1, 4, 16)]]}, "several sizes"),
    ):
        with pytest.raises(NotCoarseError, match=reason):
            FAMILY.parse(caught.module, {**caught.arguments, **change})
    # ControlNet pipelines leave the list of a sample's pictures out
    assert FAMILY.parse(caught.module, {**caught.arguments, "img_shapes": [(1, 8, 8)]}).geometry.grid(1) == (8, 8)


def _mask(**options):
    return {"mask_image": picture(64, 64).convert("L"), **options}


@pytest.mark.parametrize(
    "specimen",
    [
        Specimen(
            "inpaint",
            lambda: qwen(QwenImageInpaintPipeline),
            lambda steps=8, **o: {**call(steps=2 * steps, **o), **_mask(image=picture(64, 64), strength=0.5)},
        ),
        Specimen(
            "edit-inpaint",
            lambda: qwen(QwenImageEditInpaintPipeline),
            lambda steps=8, **o: {**call(steps=2 * steps, **o), **_mask(image=picture(64, 64), strength=0.5)},
            *EDIT_SIZES,
        ),
    ],
    ids=lambda specimen: specimen.name,
)
def test_inpainting_runs_as_it_is_and_coarsely(specimen):
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, specimen.arguments()), plain)
    with ddit_rt.accelerated(pipe, schedule=specimen.schedule):
        latents = run(pipe, specimen.arguments())
        assert ddit_rt.report(pipe).schedule == specimen.schedule
    assert torch.isfinite(latents).all() and not torch.equal(latents, plain)


class Layered(QwenImageLayeredPipeline):
    """Without the language model that writes captions, and with latents returned, on which diffusers 0.42.1 fails."""

    def get_image_caption(self, *args, **kwargs):
        return "a caption"

    def __call__(self, *args, **kwargs):
        kept = {}

        def keep(pipe, index, timestep, tensors):
            kept.update(tensors)
            return tensors

        with suppress(UnboundLocalError):
            super().__call__(*args, callback_on_step_end=keep, **kwargs)
        return (kept["latents"],)


def layered():
    pipe = qwen(Layered, levels=5, use_layer3d_rope=True, use_additional_t_cond=True)
    pipe.text_encoder = SimpleNamespace(dtype=torch.float32)
    return pipe


def layers(*, height, width, steps=8, **options):
    """Of a picture whose sides say what is made; 64 pixels to a token."""
    given = call(steps=steps, **options)
    return {**given, "image": picture(width // 16, height // 16), "layers": 2, "resolution": 1024}


LAYERED = Specimen("layered", layered, layers, (1024, 1024), (768, 1344), batches=False, self_similar=False)


KIT = ("exact", "exact, guided", "exact, odd size", "restore", "multiple one", "output", "cost", "report", "paths")


@pytest.mark.parametrize("check", KIT)
def test_layers_go_through_the_conformity_kit(check):
    assert run_check(LAYERED, check).verdict == "pass"


def test_layers_are_the_frames_of_a_latent_and_keep_their_places():
    caught = first_call(LAYERED, height=768, width=1344)
    geometry = caught.call.geometry
    assert geometry == FAMILY.geometry(caught.pipe, 768, 1344, 2) == Geometry(4, 3, 24, 42, 2)
    sizes, device = caught.arguments["img_shapes"], torch.device("cpu")
    rope = caught.module.pos_embed
    full = rope(sizes, max_txt_seq_len=5, device=device)
    small = rope([[(1, 6, 11)] * 3 + [(1, 12, 21)]], max_txt_seq_len=5, device=device)

    def rotations(native):
        seen = []
        hook = rope.register_forward_hook(lambda _, args, output: seen.append(output))
        low = torch.zeros(1, 4, 3, 12, 22)
        FAMILY.run_low(caught.module, caught.module.forward, caught.call, low, 0.5, 2, native)
        hook.remove()
        return seen[0]

    native, interpolated = rotations(True), rotations(False)
    assert all(torch.equal(one, other) for one, other in zip(native, small))
    assert torch.equal(interpolated[1], full[1]) and torch.equal(interpolated[0][3 * 66 :], full[0][3 * 252 :])
    # the layer's own axis is that of the model
    torch.testing.assert_close(interpolated[0][:198, :2], small[0][:198, :2])
    mixed = [[(1, 12, 21), (1, 12, 21), (1, 21, 12), (1, 12, 21)]]
    with pytest.raises(NotCoarseError, match="layers of several sizes"):
        FAMILY.parse(caught.module, {**caught.arguments, "img_shapes": mixed})


@pytest.fixture(scope="module")
def published():
    """Qwen-Image without weights; Edit-2511 differs by ``zero_cond_t``."""
    with torch.device("meta"):
        return {clean: QwenImageTransformer2DModel(zero_cond_t=clean) for clean in (False, True)}


@pytest.mark.parametrize("clean, references, multiple", [(False, [], 1), (True, [(1, 64, 64), (1, 46, 88)], 2)])
def test_flops_of_the_published_model(published, clean, references, multiple):
    module, geometry, text = published[clean], Geometry(16, 1, 128, 128, 2), 300
    rows, columns = geometry.grid(multiple)
    beside = sum(h * w for _, h, w in references)
    arguments = {
        "hidden_states": torch.empty(1, rows * columns + beside, 64, device="meta"),
        "encoder_hidden_states": torch.empty(1, text, 3584, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "img_shapes": [[(1, rows, columns), *references]],
    }
    counted = counted_flops(lambda: module(**arguments))
    assert FAMILY.flops(module, geometry, multiple, text + beside) == pytest.approx(counted, rel=0.003)
