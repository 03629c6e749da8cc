"""The contract of a baseline: one class and its name in the registry are all that a new one needs."""

from contextlib import contextmanager

import pytest
import torch
from prompted import CALL, prompted

from ddit_rt import ConfigError
from ddit_rt.evaluate import BASELINES, Baseline, Library, Listing, Method, Plan, generate, run_sweep
from ddit_rt.evaluate.standard import standard_plan


class Scaled(Library):
    """A toy library, this very module, that scales what the transformer predicts and says that it cached a step."""

    name = "scaled"
    module, title = __name__, "the scaler"

    def methods(self, listing: Listing) -> list[Method]:
        settings = {"library": {"type": self.name, "factor": 0.5}}
        return [Method(f"scaled-0.5@{listing.steps}", "scaled", listing.steps, listing.steps, settings)]

    def check(self, where, options):
        if not options.get("factor", 1.0) > 0:
            raise ConfigError(f"{where}: factor={options['factor']}: above 0.")

    def check_with_library(self, options):
        (lambda factor=1.0: None)(**options)

    @contextmanager
    def put_on(self, pipe, options, call):
        forward = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **kwargs: (options["factor"] * forward(*args, **kwargs)[0],)
        yield lambda: 1.0


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr("ddit_rt.evaluate.baselines.registry.BASELINES", [*BASELINES, Scaled()])
    return Scaled()


def test_names_are_unique_and_everything_listed_is_plain_data():
    names = [baseline.name for baseline in BASELINES]
    assert len(set(names)) == len(names) and all(isinstance(baseline, Baseline) for baseline in BASELINES)
    methods = [m for baseline in BASELINES for m in baseline.methods(Listing(prompted(), 20, CALL))]
    again = Plan("x", [Method("base", "base", 20, 20), *methods], ["a"]).to_dict()["methods"]
    assert [Method(**values) for values in again[1:]] == methods


def test_a_new_library_runs_through_a_sweep(scaled, tmp_path):
    pipe = prompted()
    methods = [Method("base", "base", 4, 4), *scaled.methods(Listing(pipe, 4, CALL))]
    rows = run_sweep(pipe, Plan("tiny", methods, ["a", "b"], call=CALL), tmp_path, progress=False)
    (timed, other) = [row for row in rows if row["method"] == "scaled-0.5@4" and "seconds" in row]
    assert timed["cached"] == other["cached"] == 1.0 and timed["psnr"] < 60
    flops = {row["method"]: row["flops"] for row in rows if "flops" in row}
    assert flops["scaled-0.5@4"] == flops["base"] > 0
    assert "forward" not in vars(pipe.transformer), "the toy leaves its forward behind; the contract clears it away"


def test_a_new_library_is_checked(scaled, tmp_path, monkeypatch):
    def planned(**options):
        method = Method("odd", "scaled", 4, 4, {"library": {"type": "scaled", **options}})
        return Plan("tiny", [Method("base", "base", 4, 4), method], ["a"], call=CALL)

    with pytest.raises(ConfigError, match=r"odd: factor=-1: above 0"):
        planned(factor=-1)
    with pytest.raises(ConfigError, match=r"odd: the scaler refuses its options: .*colour"):
        run_sweep(prompted(), planned(colour=1), tmp_path, progress=False)
    monkeypatch.setattr(Scaled, "module", "no_such_module")
    with pytest.raises(
        ConfigError, match=r"odd needs the scaler, which cannot be .*: pip install 'ddit-rt\[baselines\]'"
    ):
        run_sweep(prompted(), planned(factor=1.0), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_unknown_library_is_refused_with_those_there_are(scaled):
    pipe = prompted()
    with pytest.raises(ConfigError, match="library type 'nope' is none of dbcache, scaled"):
        generate(pipe, {"library": {"type": "nope"}}, 0, prompt="a", num_inference_steps=2, **CALL)
    plain = generate(pipe, None, 0, prompt="a", num_inference_steps=2, **CALL).frames
    same = generate(pipe, {"library": {"type": "scaled", "factor": 1.0}}, 0, prompt="a", num_inference_steps=2, **CALL)
    assert torch.equal(same.frames, plain)


def test_the_standard_plan_lists_a_new_baseline(monkeypatch):
    monkeypatch.setattr("ddit_rt.evaluate.standard.policies", lambda steps: [])
    monkeypatch.setattr("ddit_rt.evaluate.standard.BASELINES", [*BASELINES, Scaled()])
    monkeypatch.setattr("ddit_rt.evaluate.baselines.registry.BASELINES", [*BASELINES, Scaled()])
    plan = standard_plan(prompted(), "some/model", ["a"], [10], [0], CALL, ["psnr"])
    assert "scaled-0.5@10" in {method.name for method in plan.methods}
