"""Context parallelism: what several ranks make is what one process makes, at every size, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig
from ranks import Run, alone, on_ranks
from specimens import SPECIMENS

import ddit_rt
from ddit_rt import FittedSchedule, UnsupportedPipelineError
from ddit_rt.runtime import parallel

gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

ALWAYS = {"threshold": 1e9, "order": 1, "max_consecutive_coarse": None}
SWITCHING = {"schedule": [1, 2, 4, 0, 1]}
FIVE = {"steps": 5}
TWICE = {"steps": 5, "guided": True}
# texts are split too, and have an even number of tokens
FLUX = {"prompt_embeds": torch.ones(1, 8, 24)}
GUIDED = {**FLUX, "negative_prompt_embeds": -torch.ones(1, 8, 24)}
QWEN = {"prompt_embeds": torch.ones(1, 6, 12), "prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long)}
ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
UNEVEN = {**ULYSSES, "ulysses_anything": True}
ULYSSES_4, RING_4, BOTH = {"ulysses_degree": 4}, {"ring_degree": 4}, {"ulysses_degree": 2, "ring_degree": 2}


def same_everywhere(
    world: int, runs: dict[str, Run], folder: Path, instead: dict[str, Run] | None = None
) -> dict[str, tuple[list[int], set[str]]]:
    """Schedule and notes of every run, once all ranks are found to have the latents of one process.

    Args:
        world: Number of ranks.
        runs: By name.
        folder: For the processes.
        instead: What one process runs in place of the run of that name.
    """
    found = on_ranks(world, runs, folder)
    for name, run in {**runs, **(instead or {})}.items():
        wanted = alone(run, world)
        largest = max(1.0, float(wanted.latents.abs().max()))
        for rank, made in enumerate(found[name]):
            assert made.schedule == wanted.schedule, (name, rank)
            difference = float((made.latents - wanted.latents).abs().max())
            assert difference < 1e-5 * largest, (name, rank, difference)
    return {name: (made[0].schedule, made[0].notes) for name, made in found.items()}


@gloo
def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    # left to itself, the second rank would keep every step full
    lazy: dict[str, Any] = {"elsewhere": {"threshold": 1e-12}}
    centred = {**ALWAYS, "positions": "interpolated"}
    levels = [1.0, 0.9, 0.7, 0.5, 0.2, 0.0]
    fitted = FittedSchedule([1, 1, 0, 1, 1], 1.2, 30.0, 1, sigmas=levels, reference="converged")
    target = {"speedup": 1.2, "reference": "converged"}
    runs = {
        "flux": Run("flux", SWITCHING, TWICE, GUIDED),
        "wan": Run("wan", SWITCHING, TWICE),
        "flux, ring": Run("flux", SWITCHING, TWICE, GUIDED, RING),
        "wan, ring": Run("wan", SWITCHING, TWICE, parallel=RING),
        # 36 full tokens, 9 at 2p, which are padded to 12
        "odd": Run("flux", {**ALWAYS, "multiples": (1, 2)}, {"steps": 3, "height": 48, "width": 48}, FLUX, **lazy),
        "uneven": Run("flux", SWITCHING, FIVE, {"prompt_embeds": torch.ones(1, 5, 24)}, UNEVEN),
        "flux, centred": Run("flux", centred, {"steps": 4}, FLUX, **lazy),
        # these make positions inside
        "wan, centred": Run("wan", centred, {"steps": 4}, **lazy),
        "qwen": Run("qwen-image", ALWAYS, {"steps": 4}, QWEN, **lazy),
        "qwen, centred": Run("qwen-image", centred, {"steps": 4}, QWEN, **lazy),
        "target": Run("flux", {"speedup": 2}, {"steps": 8}, FLUX),
        "kept": Run("flux", target, {"steps": 5}, FLUX, kept=fitted),
    }
    runs["naive"] = Run("flux", {**ALWAYS, "coarse": "naive"}, {"steps": 3}, FLUX)
    plain = Run("flux", {"threshold": 0}, {"steps": 3}, FLUX)
    told = same_everywhere(2, runs, tmp_path, {"naive": plain})
    for name in ("flux", "wan", "flux, ring", "wan, ring", "uneven"):
        assert told[name] == (SWITCHING["schedule"], {""}), name
    for name in ("flux, centred", "wan, centred", "qwen", "qwen, centred"):
        assert told[name] == ([1, 4, 4, 4], {""}), name
    assert told["odd"] == ([1, 2, 2], {""})
    assert told["target"][0].count(0) >= 3 and told["kept"][0] == fitted.schedule
    assert any("projections of their own" in note for note in told["naive"][1])


@gloo
def test_four_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    # 6 x 6 tokens; 3 x 3 at 2p and 2 x 2 at 4p, the first of which are padded to 3 x 4
    odd = {**TWICE, "height": 48, "width": 48}
    runs = {
        "flux, ulysses": Run("flux", SWITCHING, FIVE, FLUX, ULYSSES_4, heads=4),
        "flux, ring": Run("flux", SWITCHING, FIVE, FLUX, RING_4),
        "flux, both": Run("flux", SWITCHING, odd, GUIDED, BOTH),
        "wan, ulysses": Run("wan", SWITCHING, FIVE, {"guidance_scale": 1.0}, ULYSSES_4, heads=4),
        "wan, ring": Run("wan", SWITCHING, FIVE, {"guidance_scale": 1.0}, RING_4),
        "wan, both": Run("wan", SWITCHING, TWICE, parallel=BOTH),
        "target": Run("wan", {"speedup": 1.5}, {"steps": 6}, {"guidance_scale": 1.0}, BOTH),
    }
    told = same_everywhere(4, runs, tmp_path)
    assert all(notes == {""} for _, notes in told.values()), told
    assert 0 in told["target"][0]


def split(transformer: Any, **degrees: int) -> None:
    """Sets a transformer up as diffusers does, but for the processes."""
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))
    transformer._parallel_config = config
    for layer in transformer.modules():
        if hasattr(getattr(layer, "processor", None), "_parallel_config"):
            layer.processor._parallel_config = config


@pytest.mark.parametrize(
    ("degrees", "settings", "told"),
    [
        ({"ulysses_degree": 4}, {}, "transformer is context parallel, and its 2 attention heads.*ulysses_degree=4"),
        ({"ring_degree": 2}, {}, "ring_degree=2 needs the log-sum-exp.*'native' does not give.*_native_cudnn"),
        ({"ulysses_degree": 2}, {"cache": "teacache"}, "cache='teacache' decides by the tokens it sees"),
        ({"ulysses_degree": 2}, {"cache": FirstBlockCacheConfig(threshold=0.1)}, "cache='FirstBlockCacheConfig'"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(degrees: Any, settings: Any, told: str) -> None:
    pipe = tiny.flux()
    split(pipe.transformer, **degrees)
    with pytest.raises(UnsupportedPipelineError, match=told):
        ddit_rt.accelerate(pipe, **settings)
    # parallelism may also come after accelerate()
    pipe = ddit_rt.accelerate(tiny.flux(), **settings)
    split(pipe.transformer, **degrees)
    seen: list[Any] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(_))
    with pytest.raises(UnsupportedPipelineError, match=told):
        pipe(**tiny.flux_inputs())
    assert not seen


@pytest.mark.parametrize(
    ("specimen", "options", "told"),
    [
        ("flux", {}, "5 text tokens do not divide among 2 ranks"),
        ("flux", {"height": 24, "width": 24}, "9 tokens do not divide among 2 ranks.*height, width"),
    ],
)
def test_full_steps_that_do_not_divide_are_refused(
    specimen: str, options: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ddit_rt.accelerate(SPECIMENS[specimen].make(), threshold=1e-3)
    split(pipe.transformer, ulysses_degree=2)
    monkeypatch.setattr(parallel, "sequence_ranks", lambda module: "group")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(parallel, "_split_names", lambda module: set(pipe.transformer._cp_plan[""]))
    with pytest.raises(ddit_rt.ConfigError, match=told):
        pipe(**SPECIMENS[specimen].arguments(**options))
