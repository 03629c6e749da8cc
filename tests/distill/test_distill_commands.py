"""ddit-rt distill, as typed."""

import json

import pytest
import torch
from distill_models import CALL, PROMPTS, pipeline
from PIL import Image
from typer.testing import CliRunner

import ddit_rt
from ddit_rt.cli import app
from ddit_rt.distill import estimate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(path)
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


def distill(*arguments):
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


def size():
    return ["--height", 32, "--width", 32, "--sampling-steps", 6, "--guidance", 0.0, "--held-out", 4]


def test_train_resume_and_dry_run(model, tmp_path):
    out = tmp_path / "run"
    options = [model, "--prompts", model / "prompts.txt", *size(), "--device", "cpu", "--steps", 2, "--rank", 2]
    options += ["--optimizer", "adamw", "--fill", 1.0, "--recordings", tmp_path / "recordings"]
    options += ["--targets", "attention", "--targets", "feed-forward"]
    turns = ["--call", "{}", "--call", '{"true_cfg_scale": 2.0, "negative_prompt": ""}']
    options += turns
    result = distill("train", *options, "--out", out, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "trained parameters" in result.output and "estimated" in result.output
    assert not out.exists()

    result = distill("record", model, tmp_path / "x", "--help")
    assert result.exit_code == 0
    result = distill(
        "record", model, "--recordings", tmp_path / "recordings", "--prompts", model / "prompts.txt", *size(), *turns
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((tmp_path / "recordings").glob("*.safetensors"))) == 3

    result = distill("train", *options, "--out", out)
    assert result.exit_code == 0, (result.output, result.exception)
    adapter = ddit_rt.load_adapter(out)
    assert adapter.spec.base_model == model.name and adapter.spec.rank == 2
    assert any("attn.to_q" in path for path in adapter.spec.layers) and len(adapter.spec.training["calls"]) == 2
    result = distill("train", *options, "--out", out, "--resume")
    assert result.exit_code == 0, (result.output, result.exception)


def test_items_of_a_folder_of_pictures(model, tmp_path):
    for index in range(4):
        Image.new("RGB", (40, 40), (index * 60, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"a red square {index}")
    options = ["--pictures", tmp_path, "--items", 3, *size()[:-1], 1, "--max-gap", 2, "--device", "cpu"]
    result = distill("record", model, "--recordings", tmp_path / "recordings", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "recordings" / "manifest.json").read_text())["data"]["items"] == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "give the data as one of"),
        (["--prompts", "a", "--pictures", "b"], "give the data as one of"),
        (["--pictures", "."], "pictures need --height"),
        (["--prompts", "a", "--steps", "0"], "steps=0"),
        (["--prompts", "a", "--sampling-steps", "3"], "at least 4 denoising steps"),
        (["--prompts", "a", "--call", "{}", "--call", '{"num_inference_steps": 3}'], "at least 4 denoising steps"),
        (["--prompts", "a", "--call", '{"num_inference_steps": "x"}'], "num_inference_steps='x': at least 4"),
        (["--prompts", "a", "--call", "guidance_scale=2"], "is no JSON"),
    ],
)
def test_errors_come_before_the_model_is_loaded(options, match, tmp_path):
    result = distill("train", "owner/model", "--out", tmp_path / "run", *options)
    assert isinstance(result.exception, ddit_rt.ConfigError) and match in str(result.exception)


def test_estimate_scales_with_the_run():
    from ddit_rt.distill import DistillConfig, Prompts

    config = DistillConfig(steps=100, rank=2, held_out=4, batch=2, accumulate=2)
    found = estimate(pipeline(), Prompts(PROMPTS), CALL, config)
    assert found.parameters > 0 and found.adapter_bytes == 2 * found.parameters
    assert found.recording_bytes > 12 * 8 * 256 * 2 * 2  # items x steps x values x 2 bytes x (latent, prediction)
    assert found.memory_bytes > 1e7 and found.hours > 0


def test_any_seed_of_the_command_line_gives_noise():
    from ddit_rt.distill.data import mixed_seed

    generator = torch.Generator()
    assert mixed_seed(3, 5) == 3 * 1_000_003 + 5
    generator.manual_seed(mixed_seed(2**63 - 1, 7))
