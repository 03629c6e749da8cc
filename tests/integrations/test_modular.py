"""Modular Diffusers: its FLUX pipeline on the demo model, accelerated as a pipeline and by blocks within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines import FluxAutoBlocks

import ddit_rt
from ddit_rt import ConfigError, UnsupportedPipelineError
from ddit_rt.integrations.modular import DDiTAccelerateStep, DDiTReportStep
from ddit_rt.pipeline import SHIPPED, find_accelerated

MODEL = str(SHIPPED["demo"])
SCHEDULE = [1, 1, 1, 2, 4, 0, 1, 1]
CALL: dict[str, Any] = {
    "prompt": "zebras behind a fence",
    "height": 64,
    "width": 64,
    "num_inference_steps": len(SCHEDULE),
    "guidance_scale": 0.0,
    "max_sequence_length": 24,
}
BLOCK = Path(__file__).parents[2] / "integrations" / "modular_diffusers"


def loaded(pipe: ModularPipeline) -> ModularPipeline:
    pipe.load_components(dtype=torch.float32)
    pipe.to(torch.float32)
    return pipe


def latents(pipe: ModularPipeline, **more: Any) -> torch.Tensor:
    return pipe(**CALL, **more, generator=torch.Generator().manual_seed(3), output="latents")


@pytest.fixture(scope="module")
def ordinary() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def modular() -> ModularPipeline:
    return loaded(ModularPipeline.from_pretrained(MODEL))


def of_ordinary(pipe: FluxPipeline, **settings: Any) -> tuple[torch.Tensor, list[int]]:
    """The latents of an accelerated ordinary pipeline, unpacked, and its schedule."""
    with ddit_rt.accelerated(pipe, **settings):
        packed = pipe(**CALL, generator=torch.Generator().manual_seed(3), output_type="latent").images
        schedule = ddit_rt.report(pipe).schedule
    return pipe._unpack_latents(packed, CALL["height"], CALL["width"], pipe.vae_scale_factor), schedule


@pytest.mark.parametrize(
    "settings",
    [{"schedule": SCHEDULE}, {"speedup": 2, "reference": "converged"}, {"threshold": 0.05}],
    ids=["schedule", "target", "threshold"],
)
def test_a_modular_pipeline_is_accelerated_as_the_ordinary_one(
    settings: dict[str, Any], modular: ModularPipeline, ordinary: FluxPipeline
) -> None:
    plain = latents(modular)
    assert ddit_rt.accelerate(modular, **settings) is modular
    fast = latents(modular)
    report = ddit_rt.report(modular)
    wanted, schedule = of_ordinary(ordinary, **settings)
    assert report.complete and report.schedule == schedule and set(schedule) != {1}
    assert torch.equal(fast, wanted) and not torch.equal(fast, plain)
    ddit_rt.accelerate(modular, threshold=0)
    assert torch.equal(latents(modular), plain)
    ddit_rt.restore(modular)
    assert torch.equal(latents(modular), plain) and find_accelerated(modular) is None


def test_blocks_accelerate_by_the_settings_of_a_call(ordinary: FluxPipeline) -> None:
    blocks = FluxAutoBlocks()
    names = list(blocks.sub_blocks)
    blocks.sub_blocks.insert("ddit", DDiTAccelerateStep(), names.index("denoise"))
    blocks.sub_blocks.insert("ddit_report", DDiTReportStep(), names.index("denoise") + 2)
    pipe = loaded(blocks.init_pipeline(MODEL))
    for settings in ({"schedule": SCHEDULE}, {"schedule": SCHEDULE}, {"threshold": 0.05}):
        found = pipe(
            **CALL, ddit=settings, generator=torch.Generator().manual_seed(3), output=["latents", "ddit_report"]
        )
        wanted, schedule = of_ordinary(ordinary, **settings)
        assert torch.equal(found["latents"], wanted)
        assert [step["multiple"] for step in found["ddit_report"]["steps"]] == schedule
    kept = find_accelerated(pipe)
    latents(pipe, ddit={"threshold": 0.05})
    assert find_accelerated(pipe) is kept
    assert torch.equal(latents(pipe, ddit={"threshold": 0}), of_ordinary(ordinary, threshold=0)[0])
    with pytest.raises(ConfigError, match=r"speedup=0\.5"):
        latents(pipe, ddit={"speedup": 0.5})
    with pytest.raises(ConfigError, match="ddit=2: give settings by name"):
        latents(pipe, ddit=2)


def test_the_block_is_loaded_as_a_custom_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    block = ModularPipelineBlocks.from_pretrained(str(BLOCK), trust_remote_code=True)
    assert isinstance(block, DDiTAccelerateStep)
    blocks = FluxAutoBlocks()
    blocks.sub_blocks.insert("ddit", block, 2)
    pipe = loaded(blocks.init_pipeline(MODEL))
    latents(pipe, ddit={"schedule": SCHEDULE})
    assert ddit_rt.report(pipe).schedule == SCHEDULE


def test_an_interrupted_call_leaves_nothing(modular: ModularPipeline) -> None:
    ddit_rt.accelerate(modular, schedule=SCHEDULE)
    wanted = latents(modular)
    forward, calls = modular.transformer.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    modular.transformer.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        latents(modular)
    modular.transformer.forward = forward
    assert torch.equal(latents(modular), wanted)


def test_it_is_warmed_up_as_the_ordinary_one(modular: ModularPipeline, capfd: pytest.CaptureFixture[str]) -> None:
    ddit_rt.accelerate(modular, schedule=SCHEDULE)
    wanted = latents(modular)
    capfd.readouterr()
    warm = ddit_rt.warmup(modular, 64, 64, progress=False, max_sequence_length=24)
    assert warm.complete and {1, 2, 4} == set(warm.schedule) and "it/s" not in capfd.readouterr().err
    assert ddit_rt.report(modular).schedule == SCHEDULE
    assert torch.equal(latents(modular), wanted)
    assert "it/s" in capfd.readouterr().err  # the bar is back


def test_a_fit_to_its_first_calls_is_refused(modular: ModularPipeline) -> None:
    with pytest.raises(ConfigError, match="fit='first-calls': the calls of FluxModularPipeline cannot be fitted to"):
        ddit_rt.accelerate(modular, speedup=2, fit="first-calls")
    assert find_accelerated(modular) is None


def test_before_components_are_loaded_there_is_nothing_to_accelerate() -> None:
    with pytest.raises(UnsupportedPipelineError, match="FluxModularPipeline has no transformer loaded"):
        ddit_rt.accelerate(ModularPipeline.from_pretrained(MODEL))
