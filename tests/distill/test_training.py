"""A whole training of a tiny model: it learns, and the base model stays as it was."""

import hashlib
import json
from dataclasses import replace

import pytest
import tiny
import torch
from distill_models import CALL, PROMPTS, SMALL, equal, pipeline, trainer

import ddit_rt
from ddit_rt.distill import DistillConfig, Prompts, Trainer
from ddit_rt.distill.objective import Student
from ddit_rt.distill.optimization import build_optimizer
from ddit_rt.families import family_of
from ddit_rt.granularity import unpatchify
from ddit_rt.trajectories.recording import record


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Shared by the tests of one model, call and data."""
    return tmp_path_factory.mktemp("recordings")


def digest(module):
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def test_a_full_run_learns_and_leaves_the_base_alone(tmp_path, recordings):
    pipe = pipeline()
    before, picture = digest(pipe.transformer), pipe(PROMPTS[0], generator=_noise(), output_type="pt", **CALL).images
    config = replace(SMALL, steps=240, batch=8, accumulate=1, multiples=(2,), validate_every=240, ema=0.95)
    run = trainer(tmp_path, recordings, config, pipe, tensorboard=_has_tensorboard())
    untrained = run.evaluate()
    assert untrained.gain_db[2] == pytest.approx(0)
    run.train()
    after = run.evaluate()
    assert after.loss[2] <= untrained.loss[2] / 2
    assert after.untrained == untrained.untrained and after.forecast == untrained.forecast > 0
    assert after.gain_over_forecast_db[2] > untrained.gain_over_forecast_db[2]

    assert digest(pipe.transformer) == before
    assert torch.equal(pipe(PROMPTS[0], generator=_noise(), output_type="pt", **CALL).images, picture)

    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("loss" in entry for entry in entries) and any("psnr_db/adapter@2p" in entry for entry in entries)
    assert list((tmp_path / "pictures").glob("*.png"))
    assert not _has_tensorboard() or list((tmp_path / "tensorboard").iterdir())

    adapter = ddit_rt.load_adapter(tmp_path)
    assert adapter.spec.training["step"] == 240
    schedule = [1, 2, 2, 1, 2, 2, 1, 2]
    found = []
    for source in (tmp_path / "adapter.safetensors", adapter):
        with ddit_rt.accelerated(pipe, adapter=source, schedule=schedule, multiples=(1, 2)):
            found.append(pipe(PROMPTS[0], generator=_noise(), output_type="pt", **CALL).images)
    assert torch.equal(*found)


def _noise():
    return torch.Generator().manual_seed(0)


def _has_tensorboard():
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def test_recording_on_the_fly_is_recording_first(tmp_path, recordings):
    config = replace(SMALL, fill=1.0, steps=4)
    fresh = trainer(tmp_path / "a", None, config)
    assert len(fresh.available(0)) == 1 and len(fresh.available(3)) == len(fresh.recorded.training)
    a = fresh.train()
    b = trainer(tmp_path / "b", recordings, config).train()
    assert equal(a.state_dict(), b.state_dict())


def test_a_run_is_not_overwritten_or_mixed_up(tmp_path, recordings):
    config = replace(SMALL, steps=1)
    trainer(tmp_path, recordings, config).train()
    with pytest.raises(ddit_rt.ConfigError, match="pass --resume"):
        trainer(tmp_path, recordings, config).train()
    with pytest.raises(ddit_rt.ConfigError, match=r"other settings .*batch: 2, 3"):
        trainer(tmp_path, recordings, replace(config, batch=3)).train(resume=True)
    with pytest.raises(ddit_rt.ConfigError, match="recordings of another model"):
        Trainer(pipeline(), Prompts(PROMPTS[1:]), CALL, config, tmp_path, recordings=recordings)


def test_checkpointing_gives_the_same_gradients(tmp_path, recordings):
    run = trainer(tmp_path, recordings, replace(SMALL, objective="delta"))
    with torch.no_grad():
        for parameter in run.adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    gradients = []
    for recompute in (False, True):
        if recompute:
            run.transformer.enable_gradient_checkpointing()
        student, batch = Student(run.adapter, run.family, run.transformer), run.batch(0, 0)
        with student.coarse(batch.multiple):
            student(batch).backward()
        gradients.append([parameter.grad for parameter in run.adapter.parameters() if parameter.grad is not None])
        run.adapter.zero_grad(set_to_none=True)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_relative_loss_is_in_units_of_the_forecasts_error(tmp_path, recordings):
    run = trainer(tmp_path, recordings, replace(SMALL, weighting="relative", blank=0.0, batch=3))
    batch = run.batch(0, 0)
    older, newest = batch.memory
    target = batch.target.prediction
    share = ((batch.target.sigma - newest.sigma) / (newest.sigma - older.sigma)).clamp(max=1)
    forecast = newest.prediction + share * (newest.prediction - older.prediction)
    with torch.no_grad(), run_coarse(run, batch):
        even = Student(run.adapter, run.family, run.transformer)
        errors = (even.predict(batch) - target).square().mean((1, 2, 3, 4))
        relative = Student(run.adapter, run.family, run.transformer, relative=True)(batch)
        torch.testing.assert_close(even(batch), errors.mean())
    units = (forecast - target).square().mean((1, 2, 3, 4)) + 3e-4
    torch.testing.assert_close(relative, (errors / units).mean())


@pytest.mark.parametrize("objective", ["direct", "delta"])
def test_training_sees_what_inference_computes(tmp_path, recordings, objective):
    """The trainer's prediction for a recorded step is the accelerated pipeline's at that step."""
    pipe = pipeline()
    run = trainer(tmp_path, recordings, replace(SMALL, objective=objective, multiples=(2,), max_gap=1, blank=0.0), pipe)
    with torch.no_grad():
        for parameter in run.adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    step = 4
    schedule = [1] * 8
    schedule[step] = 2
    recording = Prompts(PROMPTS).record(pipe, run.family, CALL, [0], SMALL.seed)
    settings = {
        "adapter": run.adapter,
        "schedule": schedule,
        "multiples": (1, 2),
        "coarse": "adapter-delta" if objective == "delta" else "adapter",
        "residual": "constant",
    }
    latents = []

    def keep(pipe, index, timestep, values):
        latents.append(unpatchify(values["latents"], 2, 1, 4, 4)[0])
        return values

    noise = torch.Generator().manual_seed(SMALL.seed * 1_000_003)
    with ddit_rt.accelerated(pipe, **settings):
        pipe(PROMPTS[0], generator=noise, output_type="latent", callback_on_step_end=keep, **CALL)
    torch.testing.assert_close(latents[step - 1], recording.latents[step, 0])
    expected = (latents[step] - latents[step - 1]) / (recording.sigmas[step + 1] - recording.sigmas[step])
    for seed in range(200):
        run.config = replace(run.config, seed=seed, batch=1)
        batch = run.batch(0, 0)
        if torch.allclose(batch.target.latent[0], recording.latents[step, 0], atol=5e-3):
            break
    else:
        pytest.fail("the step was never drawn")
    with torch.no_grad(), run_coarse(run, batch):
        found = Student(run.adapter, run.family, run.transformer).predict(batch)
    torch.testing.assert_close(found[0], expected, rtol=2e-2, atol=2e-2)  # recordings are float16


def run_coarse(run, batch):
    return run.adapter.lora(batch.multiple).active(run.transformer)


def test_recordings_take_calls_in_turn(tmp_path):
    short = {**CALL, "num_inference_steps": 5}
    guided = {**CALL, "true_cfg_scale": 2.0, "negative_prompt": ""}
    config = replace(SMALL, held_out=5, steps=4)
    prompts = [*PROMPTS, *(f"more {i}" for i in range(9))]
    run = Trainer(pipeline(), Prompts(prompts), [CALL, short, guided], config, tmp_path, log=lambda _: None)
    shards = [run.recorded.shard(index) for index in (*run.recorded.training, *run.recorded.held_out)]
    own = CALL["num_inference_steps"]
    turns = [(own, 1), (5, 1), (own, 2)]
    count = len(run.recorded.training)
    assert count > len(turns) and len(run.recorded.held_out) == 2
    expected = [*(turns[i % 3] for i in range(count)), *turns[:2]]
    assert [(shard.steps, shard.streams) for shard in shards] == expected
    run.train()
    other = tmp_path / "other"
    with pytest.raises(ddit_rt.ConfigError, match="height is 32, 48"):
        Trainer(pipeline(), Prompts(prompts), [CALL, {**CALL, "height": 48}], config, other, log=lambda _: None)
    with pytest.raises(ddit_rt.ConfigError, match="matches no linear layer"):
        Trainer(pipeline(), Prompts(prompts), CALL, replace(config, targets=("none",)), other, log=lambda _: None)
    assert not other.exists()


class Embeds:
    """Prompts of a pipeline without text encoders."""

    captions = tuple(map(str, range(6)))

    def describe(self):
        return {"kind": "prompts", "items": 6}

    def record(self, pipe, family, call, items, seed, max_steps=None):
        inputs = tiny.wan_inputs(batch=len(items), steps=4, height=48, width=80)
        return record(pipe, family, lambda: pipe(**inputs), [self.captions[item] for item in items], max_steps)


def test_video_with_guidance_and_padding(tmp_path):
    pipe = tiny.wan()
    run = Trainer(
        pipe, Embeds(), {}, replace(SMALL, optimizer="auto", held_out=2, lr=3e-3), tmp_path, log=lambda _: None
    )
    assert run.recorded.shard(0).streams == 2  # with and without the prompt
    run.train()
    assert type(build_optimizer(run.config, run.family, run.adapter.parameters())).__name__ == "AdamW"
    with ddit_rt.accelerated(pipe, adapter=tmp_path, schedule=[1, 2, 4, 2]):
        assert bool(torch.isfinite(tiny.latents_of(pipe, tiny.wan_inputs(steps=4))).all())


def test_two_transformers_are_refused(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match="transformer and transformer_2"):
        Trainer(tiny.wan(two=True), Embeds(), {}, replace(SMALL, held_out=2), out, log=lambda _: None)
    assert not out.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"objective": "other"},
        {"optimizer": "sgd"},
        {"ema": 1.5},
        {"lr": float("nan")},
        {"precision": "fp8"},
        {"batch": 1.5},
    ],
)
def test_settings_out_of_range(change):
    with pytest.raises(ddit_rt.ConfigError, match=next(iter(change))):
        DistillConfig(**change)


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(ddit_rt.ConfigError, match="none is left"):
        trainer(tmp_path, None, replace(SMALL, held_out=12))


def test_recording_is_the_pipelines_run():
    pipe = pipeline()
    recording = Prompts(PROMPTS).record(pipe, family_of(pipe), CALL, [2, 5], seed=1)
    assert recording.latents.shape == (8, 2, 4, 1, 8, 8) and len(recording.sigmas) == 9
    steps = (recording.sigmas[1:] - recording.sigmas[:-1]).reshape(-1, 1, 1, 1, 1, 1)
    torch.testing.assert_close(
        recording.latents[:-1] + steps[:-1] * recording.predictions[0][:-1], recording.latents[1:]
    )
    alone = Prompts(PROMPTS).record(pipe, family_of(pipe), CALL, [5], seed=1, max_steps=3)
    torch.testing.assert_close(alone.latents[:, 0], recording.latents[:3, 1], rtol=1e-4, atol=1e-4)
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__
