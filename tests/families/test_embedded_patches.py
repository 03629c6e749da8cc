"""What only DiT and PixArt have: positions spread over the range of training, a variance beside the prediction, sizes
that the model is told, times between those of training."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from specimens import SPECIMENS
from specimens.dit import SizedDiTPipeline

import ddit_rt
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.families.dit import DiT
from ddit_rt.families.patch_embed import centred_positions
from ddit_rt.families.pixart import PixArt
from ddit_rt.families.testing import counted_flops, run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry

NAMES = ["dit", "pixart-alpha", "pixart-sigma", "pixart-v"]
SCHEDULE = [1, 1, 2, 4, 1, 0, 2, 1]


@pytest.mark.parametrize("name, sides", [("dit", (16, 16)), ("pixart-alpha", (24, 40)), ("pixart-sigma", (20, 12))])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_interpolated_positions_are_the_centres_on_the_full_grid(name, sides, multiple):
    embedding = SPECIMENS[name].make().transformer.pos_embed
    geometry = Geometry(4, 1, *sides, 2)
    rows, columns = geometry.grid(multiple)
    range_of_training = embedding.base_size / embedding.interpolation_scale
    row, column = (
        (torch.arange(n) * multiple + (multiple - 1) / 2) / (side // 2) * range_of_training
        for n, side in zip((rows, columns), sides)
    )
    grid = torch.stack([column.expand(rows, columns), row[:, None].expand(rows, columns)])[:, None]
    wanted = get_2d_sincos_pos_embed_from_grid(embedding.proj.out_channels, grid, output_type="pt")
    torch.testing.assert_close(centred_positions(embedding, geometry, multiple)[0], wanted.float(), atol=1e-5, rtol=0)
    if multiple == 1:  # the model's own
        plain = embedding(torch.zeros(1, 4, *sides)) - embedding.proj.bias
        torch.testing.assert_close(plain[0], wanted.float(), atol=1e-5, rtol=0)


def test_native_positions_are_the_firsts_of_the_full_ones_that_a_coarse_token_covers():
    embedding = SPECIMENS["dit"].make().transformer.pos_embed
    full, coarse = (embedding(torch.zeros(1, 4, side, side)).unflatten(1, (side // 2, -1)) for side in (16, 8))
    torch.testing.assert_close(coarse, full[:, ::2, ::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_model_says_of_the_variance_is_left_out_and_filled_with_zeros(name):
    caught = first_call(SPECIMENS[name])
    family, module, call = caught.family, caught.module, caught.call
    with torch.no_grad():
        raw = module(**caught.arguments)
    prediction = family.output(module, call, raw)
    assert torch.equal(prediction[:, :, 0], raw[0][:, :4])
    wrapped = family.wrap(module, call, prediction)[0]
    assert wrapped.shape == raw[0].shape
    assert torch.equal(wrapped[:, :4], raw[0][:, :4]) and not wrapped[:, 4:].any()
    ends = family.projections(module)
    assert ends.channels == 4 and ends.deembed_bias.shape == (16,)
    tokens = torch.randn(3, module.inner_dim)
    last = module.get_submodule(family.projection_names[1])
    own = last(tokens).unflatten(1, (4, -1))[..., :4].flatten(1)
    torch.testing.assert_close(torch.nn.functional.linear(tokens, ends.deembed_weight, ends.deembed_bias), own)


def test_other_outputs_are_refused():
    pipe = SPECIMENS["pixart-sigma"].make()
    pipe.transformer.out_channels = 12
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="12 channels for 4"):
        family_of(pipe)


@pytest.mark.parametrize("sides, rows, columns", [((128, 128), 64.0, 64.0), ((144, 80), 160 / 2, 96 / 2)])
def test_a_coarse_run_is_told_the_size_of_the_smaller_picture(sides, rows, columns):
    """Padded sides included: 18 x 10 latent pixels are 5 x 3 coarse tokens, as a picture of 80 x 48 has."""
    caught = first_call(SPECIMENS["pixart-alpha"], height=sides[0], width=sides[1], batch=2)
    family, call = caught.family, caught.call
    told = call.arguments["added_cond_kwargs"]
    assert told["resolution"].tolist() == [[float(side) for side in sides]] * 2
    low = family.low_arguments(call, call.latent, 0.5, 2, True)["added_cond_kwargs"]
    torch.testing.assert_close(low["resolution"], torch.tensor([[rows, columns]] * 2))
    torch.testing.assert_close(low["aspect_ratio"], torch.full((2, 1), rows / columns))
    assert family.low_arguments(call, call.latent, 0.5, 2, False)["added_cond_kwargs"] is told
    assert told["resolution"].tolist() == [[float(side) for side in sides]] * 2, "the pipeline's own was changed"


def test_pixart_sigma_is_told_no_size():
    call = first_call(SPECIMENS["pixart-sigma"]).call
    assert PixArt().low_arguments(call, call.latent, 0.5, 2, True)["added_cond_kwargs"]["resolution"] is None


@pytest.mark.parametrize("name", NAMES)
def test_times_of_coarse_runs_lie_between_those_of_training(name):
    caught = first_call(SPECIMENS[name], batch=2)
    assert not caught.arguments["timestep"].is_floating_point()
    found = caught.family.low_arguments(caught.call, caught.call.latent, 0.4563, 2, True)["timestep"]
    torch.testing.assert_close(found, torch.full((2,), 456.3))


def test_a_mask_of_full_tokens_has_a_call_run_full():
    caught = first_call(SPECIMENS["pixart-sigma"])
    with pytest.raises(NotCoarseError, match="attention_mask"):
        caught.family.parse(caught.module, {**caught.arguments, "attention_mask": torch.ones(1, 64)})


def test_dits_pipeline_makes_one_size():
    pipe = SPECIMENS["dit"].make()
    assert DiT().geometry(pipe, 512, 256) == Geometry(4, 1, 16, 16, 2)


def test_dits_own_pipeline_runs_and_warms_up():
    made = SPECIMENS["dit"].make()
    assert type(made) is SizedDiTPipeline
    pipe = DiTPipeline(made.transformer, made.vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [1, 3], "num_inference_steps": 8, "output_type": "pt"}

    def picture():
        return run(pipe, {**call, "generator": torch.Generator().manual_seed(0)})

    plain = picture()
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(picture(), plain)
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE):
        report = ddit_rt.warmup(pipe, 128, 128, progress=False, class_labels=[1, 3])
        assert {step.multiple for step in report.steps} == {1, 2, 4}
        assert not torch.equal(picture(), plain)
        assert ddit_rt.report(pipe).schedule == SCHEDULE


def test_half_precision_with_a_solver_that_remembers():
    pipe = SPECIMENS["pixart-alpha"].make().to(torch.bfloat16)
    call = SPECIMENS["pixart-alpha"].arguments(guided=True)
    call |= {name: call[name].to(torch.bfloat16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    plain = run(pipe, {**call, "generator": torch.Generator().manual_seed(0)})
    for settings, tolerance in (({"threshold": 0}, 0.05), ({"schedule": SCHEDULE}, None)):
        with ddit_rt.accelerated(pipe, **settings):
            found = run(pipe, {**call, "generator": torch.Generator().manual_seed(0)})
            assert ddit_rt.report(pipe).complete
        assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
        if tolerance:
            assert (found - plain).float().abs().max() < tolerance * plain.float().abs().max()


def published(name):
    common = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
    with torch.device("meta"):
        if name == "dit":  # DiT-XL-2-256
            return DiT(), DiTTransformer2DModel(sample_size=32, **common), 32, 0
        # PixArt-XL-2-1024-MS
        return PixArt(), PixArtTransformer2DModel(sample_size=128, caption_channels=4096, **common), 128, 120


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_flops_of_the_published_models_are_those_that_torch_counts(name, multiple):
    family, module, side, text = published(name)
    geometry = Geometry(4, 1, side, side, 2)
    zeros = partial(torch.zeros, device="meta")
    arguments = {"hidden_states": zeros(1, 4, side // multiple, side // multiple), "timestep": zeros(1)}
    if name == "dit":
        arguments["class_labels"] = zeros(1, dtype=torch.long)
    else:
        sizes = {"resolution": zeros(1, 2), "aspect_ratio": zeros(1, 1)}
        arguments |= {"encoder_hidden_states": zeros(1, text, 4096), "added_cond_kwargs": sizes}
    counted = counted_flops(lambda: module.eval()(**arguments))
    assert family.flops(module, geometry, multiple, text) == pytest.approx(counted, rel=0.01)
