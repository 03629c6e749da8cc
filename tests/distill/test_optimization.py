"""Optimizer, learning-rate schedule and moving average; and where their numbers are written."""

import json

import pytest
import tiny
import torch
from diffusers.training_utils import EMAModel
from distill_models import pipeline

import ddit_rt
from ddit_rt.distill import DistillConfig, tracking
from ddit_rt.distill.optimization import build_optimizer, build_schedule, moving_average, optimizer_name
from ddit_rt.families import family_of


def test_learning_rate():
    config = DistillConfig(steps=100, lr_warmup_steps=10, lr_decay=0.5)
    assert [config.lr_factor(step) for step in (0, 9, 50, 75)] == pytest.approx([0.1, 1, 1, 0.5])


def test_the_schedule_sets_the_learning_rate_of_every_step():
    config = DistillConfig(steps=20, lr_warmup_steps=4, lr_decay=0.25, optimizer="adamw", lr=3e-3)
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(config, family_of(pipeline()), [weights])
    schedule = build_schedule(config, optimizer)
    rates = []
    for _ in range(config.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [3e-3 * config.lr_factor(step) for step in range(config.steps)]
    assert rates[0] == 3e-3 / 4 and set(rates[3:16]) == {3e-3} and rates[-1] == pytest.approx(3e-3 / 5)


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.99])
def test_the_average_is_diffusers(decay):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    averaged, expected = moving_average(model, decay), EMAModel(model.parameters(), decay=decay)
    for _ in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update_parameters(model)
        expected.step(model.parameters())
    for found, other, last in zip(averaged.module.parameters(), expected.shadow_params, model.parameters()):
        torch.testing.assert_close(found, other)
        assert torch.equal(found, last) == (decay == 0)
        assert not found.requires_grad


@pytest.mark.parametrize(("optimizer", "names"), [("auto", ("prodigy", "adamw")), ("adamw", ("adamw", "adamw"))])
def test_auto_is_the_familys_optimizer(optimizer, names):
    config = DistillConfig(optimizer=optimizer)
    assert tuple(optimizer_name(config, family_of(pipe)) for pipe in (pipeline(), tiny.wan())) == names


def test_log_lines(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    tracker = tracking.JsonLines(path)
    assert tracker.tracker == path and not path.parent.exists()
    tracker.log({"loss": 0.123456789}, step=20)
    tracker.log({"loss": 0.1, "lr": 1e-4}, step=40)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries == [{"step": 20, "loss": 0.12346}, {"step": 40, "loss": 0.1, "lr": 1e-4}]


def test_tensorboard_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_tensorboard_available", lambda: False)
    with pytest.raises(ddit_rt.ConfigError, match=r"ddit-rt\[distill\]"):
        tracking.build_trackers(tmp_path, tensorboard=True)
    assert len(tracking.build_trackers(tmp_path, tensorboard=False)) == 1
