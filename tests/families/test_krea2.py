"""What only Krea 2 has: ids of text and picture in one tensor, sizes rounded up, guidance at any scale."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from specimens import SPECIMENS

import ddit_rt
from ddit_rt.families import family_of
from ddit_rt.families.testing import counted_flops, run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Geometry

krea2 = pytest.importorskip("ddit_rt.families.krea2", reason="diffusers has no Krea 2", exc_type=ImportError)


@pytest.mark.parametrize("scale, calls", [(0.0, 2), (0.5, 4), (3.0, 4)])
def test_any_scale_above_zero_guides(scale, calls):
    specimen = SPECIMENS["krea2"]
    pipe = specimen.make()
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    given = {**specimen.arguments(guided=True, steps=2), "guidance_scale": scale}
    run(pipe, given)
    assert len(seen) == calls and family_of(pipe).is_guided(pipe, given) == (calls == 4)


@pytest.mark.parametrize("native, places", [(True, [0.0, 1.0]), (False, [0.5, 2.5])])
def test_ids_of_the_text_stay_before_the_pictures(native, places):
    caught = first_call(SPECIMENS["krea2"])
    ids = caught.family.placed_arguments(caught.call, 2, native)["position_ids"]
    assert ids.shape == (6 + 16, 3) and not ids[:6].any()
    assert ids[6:8].tolist() == [[0.0, places[0], place] for place in places]


def test_sizes_are_rounded_up():
    pipe = SPECIMENS["krea2"].make()
    assert family_of(pipe).geometry(pipe, 57, 64).grid(1) == (8, 8)
    run_at = first_call(SPECIMENS["krea2"], height=57, width=64)
    assert run_at.call.geometry.grid(1) == (8, 8)


def test_other_patches_are_refused():
    pipe = SPECIMENS["krea2"].make()
    pipe.patch_size = 1
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="patches of side 1: only 2"):
        ddit_rt.accelerate(pipe)


def test_a_cache_of_diffusers_is_refused_where_there_is_none():
    pipe = SPECIMENS["krea2"].make()
    with pytest.raises(ddit_rt.ConfigError, match="no caches for Krea2Transformer2DModel"):
        ddit_rt.accelerate(pipe, cache=FirstBlockCacheConfig())
    assert "forward" not in pipe.transformer.__dict__


def test_flops_of_the_published_size():
    geometry = Geometry(16, 1, 128, 128, 2)
    with torch.device("meta"):
        module = krea2.Krea2Transformer2DModel()
        for multiple in (1, 2):
            count = geometry.tokens(multiple)
            given = {
                "hidden_states": torch.empty(1, count, 64),
                "encoder_hidden_states": torch.empty(1, 512, 12, 2560),
                "timestep": torch.empty(1),
                "position_ids": torch.empty(512 + count, 3),
                "encoder_attention_mask": torch.empty(1, 512, dtype=torch.bool),
            }
            counted = counted_flops(lambda given=given: module(**given))
            assert krea2.Krea2().flops(module, geometry, multiple, 512) == pytest.approx(counted, rel=1e-3)
