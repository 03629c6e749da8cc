"""What only Stable Diffusion 3 has: a table of positions, guidance that comes and goes, IP-adapters."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from specimens import sd3

import ddit_rt
from ddit_rt.families import family_of
from ddit_rt.families.sd3 import SD3, centred_positions
from ddit_rt.families.testing import counted_flops, randomise, run
from ddit_rt.granularity import Geometry

SIZE = {"height": 128, "width": 128}
SCHEDULE = [1, 1, 2, 4, 1, 0, 2, 1]


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    return sd3.transformer().pos_embed  # 24 x 24 places, a base of 8: three places to a unit


def test_positions_at_multiple_one_are_the_transformers_own(table):
    own = table.cropped_pos_embed(18, 10)
    torch.testing.assert_close(centred_positions(table, Geometry(4, 1, 18, 10, 2), 1), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiple", [2, 4])
def test_positions_of_coarse_tokens_lie_at_the_centres(table, multiple):
    geometry = Geometry(4, 1, 16, 32, 2)  # 8 x 16 full tokens, the first of them at place (8, 4)
    rows, columns = geometry.grid(multiple)
    row = torch.arange(rows) * multiple + (multiple - 1) / 2 + 8
    column = torch.arange(columns) * multiple + (multiple - 1) / 2 + 4
    grid = torch.stack(torch.meshgrid(column / 3, row / 3, indexing="xy"))
    wanted = get_2d_sincos_pos_embed_from_grid(32, grid, output_type="pt").float()[None]
    found = centred_positions(table, geometry, multiple)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # means alone are too short
    full = table.cropped_pos_embed(16, 32).reshape(rows, multiple, columns, multiple, -1)
    assert (full.mean((1, 3)).flatten(0, 1) - wanted[0]).abs().max() > 5e-3


def test_a_grid_may_reach_beyond_the_table(table):
    geometry = Geometry(4, 1, 46, 46, 2)  # 23 x 23 of 24 x 24: the last of six coarse rows begins at the 20th
    found = centred_positions(table, geometry, 4)
    assert found.shape == (1, 36, 32) and torch.isfinite(found).all()


# -- guidance that skips layers ---------------------------------------------------------------------------------------


def skipping(**options):
    """Layer 1 is skipped at steps 3, 4 and 5 of 8."""
    window = {"skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.7}
    return {**sd3.call(guided=True, **SIZE), "skip_guidance_layers": [1], **window, **options}


def test_guidance_that_skips_layers_is_exact_at_full_steps():
    pipe = sd3.make()
    plain = run(pipe, skipping())
    assert not torch.equal(plain, run(pipe, sd3.call(guided=True, **SIZE)))
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, skipping()), plain)


@pytest.mark.parametrize("first", [0, 2])
def test_guidance_that_begins_at_a_step_that_is_not_full_begins_with_a_full_run(first):
    """Its next runs are coarse, skip the same layers, and lean on its own full one."""
    pipe = sd3.make()
    runs = []
    own = pipe.transformer.forward

    def forward(**kwargs):
        hidden = kwargs["hidden_states"]
        runs.append((hidden.shape[-1] // 2, hidden.shape[0], kwargs.get("skip_layers")))
        return own(**kwargs)

    pipe.transformer.forward = forward
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 1, first, 2, 2, 1, 1], residual="constant"):
        result, report = run(pipe, skipping()), ddit_rt.report(pipe)
    assert torch.isfinite(result).all() and report.complete
    skipped = [(side, batch) for side, batch, layers in runs if layers == [1]]
    # full at step 3; at step 4 what the coarse model misses there, and the coarse run; at step 5 the coarse run
    assert skipped == [(8, 1), (4, 1), (4, 1), (4, 1)]
    assert [step.index for step in report.steps if "no full one to start from" in step.note] == [3]
    assert report.steps[3].executed == "eager" and report.steps[3].multiple == first


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive", "extrapolate"])
@pytest.mark.parametrize("schedule", [SCHEDULE, [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 2, 2, 2, 0, 1, 1]])
def test_guidance_of_weight_zero_changes_nothing(coarse, schedule):
    """Its calls stay out of the others' memory."""
    settings = {"schedule": schedule, "coarse": coarse, "corrector": False}
    with ddit_rt.accelerated(sd3.make(), **settings) as pipe:
        without = run(pipe, sd3.call(guided=True, **SIZE))
        assert torch.equal(run(pipe, skipping(skip_layer_guidance_scale=0.0)), without)


def test_a_gap_is_not_corrected_across_the_end_of_guidance():
    """Guidance ends at step 6, amid skipped ones: with the corrector, the result stays as near as without it."""
    errors = []
    for corrector in (False, True):
        pipe = sd3.make()
        with torch.no_grad():  # a calm model: what is left are the jumps of guidance
            pipe.transformer.time_text_embed.timestep_embedder.linear_2.weight.mul_(0.02)
            pipe.transformer.proj_out.weight.mul_(0.1)
        arguments = {"skip_layer_guidance_scale": 20.0}
        plain = run(pipe, skipping(**arguments))
        with ddit_rt.accelerated(pipe, schedule=[1, 1, 1, 1, 1, 0, 0, 1], corrector=corrector):
            errors.append(float((run(pipe, skipping(**arguments)) - plain).square().mean().sqrt()))
    assert errors[1] <= errors[0] * 1.05


# -- what runs full, and what rides along -----------------------------------------------------------------------------


class Picture(torch.nn.Module):
    """In place of an IP-adapter's resampler: tokens of a picture, made for a timestep."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, embeds, timestep):
        self.times.append(float(timestep[0]))
        return embeds, (timestep[:, None] / 1000).expand(-1, 6)


def test_a_picture_prompt_is_seen_at_every_steps_own_noise_level():
    pipe = sd3.make()
    pipe.transformer.image_proj = Picture()
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(randomise(SD3IPAdapterJointAttnProcessor2_0(32, 8, 16, timesteps_emb_dim=6)))
    picture = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))

    def call():
        return {**sd3.call(guided=True, **SIZE), "joint_attention_kwargs": {"ip_adapter_image_embeds": picture}}

    plain = run(pipe, call())
    assert not torch.equal(plain, run(pipe, {**sd3.call(guided=True, **SIZE)}))
    with ddit_rt.accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, call()), plain)
    pipe.transformer.image_proj.times.clear()
    with ddit_rt.accelerated(pipe, schedule=[1, 2, 1, 1, 1, 1, 1, 1], coarse="band-split"):
        assert torch.isfinite(run(pipe, call())).all()
        levels = [step.sigma for step in ddit_rt.report(pipe).steps]
    times = pipe.transformer.image_proj.times
    levels[1] = levels[1] / 2 / ((1 - levels[1]) + levels[1] / 2)
    assert times == pytest.approx([1000 * level for level in levels], rel=1e-5)


def test_caches_that_diffusers_lacks_are_refused():
    with pytest.raises(ddit_rt.ConfigError, match="no caches for SD3Transformer2DModel"):
        ddit_rt.accelerate(sd3.make(), cache=FirstBlockCacheConfig())


def test_a_transformer_without_a_table_of_positions_is_refused():
    pipe = sd3.make()
    pipe.transformer.register_to_config(pos_embed_max_size=None)
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="pos_embed_max_size"):
        family_of(pipe)


# -- cost -------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "3-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "3.5-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "3.5-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_flops_of_the_published_sizes(model):
    with torch.device("meta"):
        module = SD3Transformer2DModel(**PUBLISHED[model])
        for multiple in (1, 2):
            geometry = Geometry(16, 1, 128, 128, 2)
            arguments = {
                "hidden_states": torch.empty(1, 16, 128 // multiple, 128 // multiple),
                "encoder_hidden_states": torch.empty(1, 333, 4096),
                "pooled_projections": torch.empty(1, 2048),
                "timestep": torch.empty(1),
            }
            counted = counted_flops(lambda a=arguments: module(**a))
            assert SD3().flops(module, geometry, multiple, 333) == pytest.approx(counted, rel=1e-3)
