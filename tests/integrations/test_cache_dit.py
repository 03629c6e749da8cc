"""A fitted schedule as cache-dit's mask of steps: what is written, what is refused, and what cache-dit makes of it."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import ddit_rt
from ddit_rt import FittedSchedule, ScheduleError
from ddit_rt.cli import app, main
from ddit_rt.demo import CALL_DEFAULTS, DEMO_PROMPTS, load_pipeline
from ddit_rt.integrations.cache_dit import cache_settings, export

MASK = [1, 1, 1, 0, 1, 0, 0, 1]
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed (extra baselines)"
)


def fitted(schedule=MASK, **more):
    return FittedSchedule(list(schedule), 1.6, 40.0, 4, **more)


def test_the_file_holds_the_mask(tmp_path):
    path = export(fitted(), tmp_path / "new" / "mask.json", guided=True)
    config = json.loads(path.read_text())["cache_config"]
    assert config["steps_computation_mask"] == MASK and config["num_inference_steps"] == 8
    assert config["steps_computation_policy"] == "static" and config["enable_separate_cfg"] is True
    assert "enable_separate_cfg" not in cache_settings(fitted())["cache_config"]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (fitted([1, 1, 2, 1]), r"schedule\[2\]=2: cache-dit has no coarse steps.*--kinds 1,0"),
        (fitted([1, 0], sigmas=[1.0, 0.4, 0.0], reference="converged"), r"reference='converged'.*noise levels"),
        (fitted([1, 0], reference="converged"), r"reference='converged'.*--reference plain"),
        (fitted([0, 1]), r"schedule\[0\]=0"),
        (fitted([1, 1]), "skips no step"),
    ],
    ids=["coarse", "moved", "converged", "first", "none"],
)
def test_what_a_mask_cannot_say_is_refused(schedule, message, tmp_path):
    with pytest.raises(ScheduleError, match=message):
        export(schedule, tmp_path / "mask.json", None)
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_known_schedule(tmp_path, monkeypatch, capsys):
    source = fitted().save(tmp_path / "known.json")
    given = ["fit", "--schedule", str(source), "--export", "cache-dit", "--output", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0 and "5 of 8 steps" in result.stdout
    assert json.loads((tmp_path / "s.cache-dit.json").read_text()) == cache_settings(fitted())
    for wrong, message in {
        ("--schedule", str(source)): "a fitted schedule is only for --export",
        ("demo", "--export", "cache-dit", "--kinds", "1,2,0"): "kinds with 2 and --export cache-dit",
        ("demo", "--export", "cache-dit", "--reference", "converged"): "use --reference plain",
        ("demo", "--schedule", str(source), "--export", "cache-dit"): "give one of MODEL, --schedule",
    }.items():
        monkeypatch.setattr("sys.argv", ["ddit-rt", "fit", *wrong])
        with pytest.raises(SystemExit):
            main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_fits_full_and_skipped_steps_and_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIT_RT_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "s.json"
    given = ["fit", "demo", "--steps", "6", "--count", "1", "--speedup", "2", "--height", "64", "--width", "64"]
    result = CliRunner().invoke(app, [*given, "--export", "cache-dit", "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "s.cache-dit.json").read_text())["cache_config"]
    assert config["steps_computation_mask"] == FittedSchedule.load(output).schedule
    assert set(config["steps_computation_mask"]) == {0, 1} and config["enable_separate_cfg"] is True


def psnr(picture, plain):
    return -10 * math.log10((picture - plain).square().mean())


@needs_library
def test_cache_dit_computes_the_steps_of_the_mask(tmp_path):
    """On the shipped model: the first block runs in every step, the others where the mask says, twice with guidance."""
    import cache_dit

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL_DEFAULTS, "height": 64, "width": 64, "num_inference_steps": len(MASK), "output_type": "pt"}

    def picture():
        return pipe(next(iter(DEMO_PROMPTS.values())), generator=torch.Generator().manual_seed(0), **call).images

    plain = picture()
    with ddit_rt.accelerated(pipe, schedule=MASK, cuda_graphs=False):
        ours = picture()
    path = export(fitted(), tmp_path / "mask.json", guided=True)
    last = pipe.transformer.single_transformer_blocks[-1]
    steps: list[int] = []
    at = {"step": 0}
    inside = last.register_forward_hook(lambda *_: steps.append(at["step"]))
    call["callback_on_step_end"] = lambda pipe, index, timestep, tensors: at.update(step=index + 1) or {}
    try:
        cache_dit.enable_cache(pipe, **cache_dit.load_configs(str(path)))
        theirs = picture()
        cache_dit.disable_cache(pipe)
    finally:
        inside.remove()
    computed = [index for index, one in enumerate(MASK) if one]
    assert steps == [index for index in computed for _ in range(2)]
    assert torch.isfinite(theirs).all() and torch.isfinite(ours).all()
    print(f"\nPSNR to plain: ours {psnr(ours, plain):.1f} dB, cache-dit's {psnr(theirs, plain):.1f} dB")
    del call["callback_on_step_end"]
    assert torch.equal(picture(), plain)
