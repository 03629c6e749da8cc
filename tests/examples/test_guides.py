"""What the guides show fulfils the contracts that they explain."""

import re
import types
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig
from tiny import flux, flux_inputs, latents_of

import ddit_rt
from ddit_rt import families
from ddit_rt.evaluate import Listing, baselines
from ddit_rt.evaluate.settings import run_settings
from ddit_rt.families.testing import CHECKS, run_check
from ddit_rt.granularity import Anchor, Geometry, Models, PathOptions, PredictionHistory, make_path
from ddit_rt.granularity.paths import registry
from ddit_rt.schedule import Policy

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def blocks(guide: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / guide).read_text(encoding="utf-8"), re.DOTALL)


def test_the_policies_of_the_guide():
    pipe = flux()
    names: dict = {"ddit_rt": ddit_rt, "pipe": pipe}
    for block in blocks("add-a-policy.md"):
        exec(compile(block, "add-a-policy.md", "exec"), names)
        if "accelerate(" in block:
            latents_of(pipe, flux_inputs())
            assert 2 in ddit_rt.report(pipe).schedule
    assert isinstance(names["LateSteps"](sigma=0.5, every=2), Policy)


def test_the_coarse_path_of_the_guide(monkeypatch):
    monkeypatch.setattr(registry, "_MAKERS", dict(registry._MAKERS))
    module = types.ModuleType("ddit_rt.granularity.paths.half")
    module.__package__ = registry.__package__
    exec(compile(blocks("add-a-coarse-path.md")[0], "add-a-coarse-path.md", "exec"), module.__dict__)
    path = make_path("half", PathOptions())
    geometry = Geometry(3, 1, 6, 10, 2)  # 4p does not divide it
    models = Models(low=lambda latent, sigma, multiple: latent, tokens=lambda latent, sigma, multiple: latent)
    latent = torch.randn(1, 3, 1, 6, 10, generator=torch.Generator().manual_seed(0))
    history = PredictionHistory()
    history.add_full(Anchor(0.9, latent, latent, models))
    for multiple in (2, 4):
        assert path.predict(history, latent, 0.8, multiple, geometry, models).shape == latent.shape


def test_the_model_of_the_guide(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    names: dict = {"__name__": "guide"}
    whole = blocks("add-a-model.md")[1:]
    for block in whole:
        exec(compile(block, "add-a-model.md", "exec"), names)
    assert sum(len(block.splitlines()) for block in whole) < 120
    verdicts = {check: run_check(names["BRIA"], check).verdict for check in CHECKS}
    assert {check for check, verdict in verdicts.items() if verdict == "limit"} == {"first-block cache"}
    assert "not run" not in verdicts.values()


def test_the_step_cache_of_the_guide():
    module = types.ModuleType("ddit_rt.evaluate.baselines.shown")
    module.__package__ = baselines.__name__
    exec(compile(blocks("add-a-baseline.md")[0], "add-a-baseline.md", "exec"), module.__dict__)
    (method,) = module.FirstBlock().methods(Listing(None, 8, {}))
    assert (method.name, method.kind, method.steps) == ("first-block-0.1@8", "FirstBlockCache", 8)
    assert run_settings(method)["cache"] == FirstBlockCacheConfig(threshold=0.1)


def test_the_solver_of_the_guide():
    module = types.ModuleType("ddit_rt.evaluate.baselines.shown")
    module.__package__ = baselines.__name__
    exec(compile(blocks("add-a-baseline.md")[1], "add-a-baseline.md", "exec"), module.__dict__)
    names = [method.name for method in module.Heun().methods(Listing(flux(), 8, {}))]
    assert names == ["heun-3@8", "heun-1@8", "heun-3-w1.4@8", "heun-1-w1.4@8"]
