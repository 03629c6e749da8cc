"""The SGLang plug-in, against the engine where it is installed and against a double of what it touches."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
import re
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import engine_doubles
import pytest
import tiny
import torch

from ddit_rt import ConfigError, ScheduleError
from ddit_rt.integrations import sglang as plugin
from ddit_rt.integrations.sglang import APP, FORWARD, LOAD, RESPONSE, SAMPLING
from ddit_rt.pipeline import find_accelerated

SCHEDULE = [1, 1, 0, 1, 2, 0, 1, 1]


class Engine:
    """The functions that the plug-in hooks, with the hooks applied."""

    def __init__(self, real: bool) -> None:
        self.real = real
        self.plugins = importlib.import_module("sglang.multimodal_gen.runtime.platforms.plugins")

    def start(self) -> None:
        """What the engine does in every process."""
        plugin.register()
        self.plugins.HookRegistry.apply_hooks()

    def resolve(self, target: str) -> Any:
        return pkgutil.resolve_name(target)

    def load(self, pipe: Any) -> Any:
        """What the loader of the diffusers back-end returns for a pipeline that it has loaded."""
        owner = pkgutil.resolve_name(LOAD.rsplit(".", 1)[0])
        return owner._load_diffusers_pipeline(SimpleNamespace(loaded=pipe), lambda: pipe, None)

    def stage(self, pipe: Any) -> Any:
        return pkgutil.resolve_name(FORWARD.rsplit(".", 1)[0])(pipe)

    def request(self, ddit: Any = None, seed: int = 0, steps: int = 8, **more: Any) -> Any:
        inputs = tiny.flux_inputs(height=32, width=32)
        own = {name: inputs[name] for name in ("prompt_embeds", "pooled_prompt_embeds", "output_type")} | more
        if ddit is not None:
            own["ddit"] = ddit
        values = {
            "num_inference_steps": steps,
            "height": 32,
            "width": 32,
            "seed": seed,
            "extra": {"diffusers_kwargs": own},
        }
        if not self.real:
            return engine_doubles.Req(**values)
        batch = importlib.import_module("sglang.multimodal_gen.runtime.pipelines_core.schedule_batch")
        return batch.Req(**values, prompt=None, generator_device="cpu")


@pytest.fixture(params=["double", "real"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    real = request.param == "real"
    if real:
        if importlib.util.find_spec("sglang") is None:
            pytest.skip("sglang is not installed")
        kept = {target: pkgutil.resolve_name(target) for target in (FORWARD, SAMPLING, RESPONSE, APP)}
        loader = pkgutil.resolve_name(LOAD.rsplit(".", 1)[0])
        # the engine's own loader needs its arguments of start; what it returns is what is hooked
        monkeypatch.setattr(loader, "_load_diffusers_pipeline", lambda self, model, server_args: model())
        arguments = importlib.import_module("sglang.multimodal_gen.runtime.server_args.server_args")
        monkeypatch.setattr(arguments, "_global_server_args", SimpleNamespace())
    else:
        for name, module in engine_doubles.sglang().items():
            monkeypatch.setitem(sys.modules, name, module)
    made = Engine(real)
    made.plugins.HookRegistry.reset()
    yield made
    made.plugins.HookRegistry.reset()
    if real:
        for target, original in kept.items():
            owner, name = target.rsplit(".", 1)
            setattr(pkgutil.resolve_name(owner), name, original)


def outputs(stage: Any, request: Any) -> tuple[torch.Tensor, dict[str, Any] | None]:
    result = stage.forward(request, None)
    return result.output, (result.usage or {}).get("ddit")


def test_the_engine_has_what_is_hooked(engine: Engine) -> None:
    for target in (LOAD, FORWARD, SAMPLING, RESPONSE, APP):
        assert callable(engine.resolve(target)), target


def test_nothing_is_hooked_unless_asked_for(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.start()
    assert not engine.plugins.HookRegistry._hooks
    assert "NOT APPLIED: no DDIT_* variable is set" in caplog.text
    pipe = tiny.flux()
    assert engine.load(pipe) is pipe and find_accelerated(pipe) is None


def test_bad_settings_leave_the_engine_alone_and_are_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "0.5")
    engine.start()
    assert not engine.plugins.HookRegistry._hooks
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "DDIT_SPEEDUP: speedup=0.5" in record.message


def test_what_it_loads_is_accelerated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2.5")
    engine.start()
    pipe = tiny.flux()
    assert engine.load(pipe) is pipe
    found = find_accelerated(pipe)
    assert found is not None and found.config.speedup == 2.5
    assert "APPLIED to FluxPipeline of SGLang: speedup=2.5" in caplog.text
    image, facts = outputs(engine.stage(pipe), engine.request())
    assert facts is not None and facts["applied"] and facts["sizes"]["skipped"] > 0
    plain, nothing = outputs(engine.stage(tiny.flux()), engine.request())
    assert nothing is None and not torch.equal(image, plain)


def test_a_pipeline_that_cannot_be_accelerated_stays_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    pipe = SimpleNamespace(transformer=None)
    assert engine.load(pipe) is pipe and vars(pipe) == {"transformer": None}
    assert "NOT APPLIED, SGLang runs SimpleNamespace plain" in caplog.text


def test_a_request_has_settings_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    pipe = engine.load(tiny.flux())
    stage = engine.stage(pipe)
    plain, _ = outputs(engine.stage(tiny.flux()), engine.request())
    default, before = outputs(stage, engine.request())
    _, own = outputs(stage, engine.request({"schedule": SCHEDULE}))
    same, one = outputs(stage, engine.request({"speedup": 1}))
    again, after = outputs(stage, engine.request())
    assert own is not None and own["steps"] == SCHEDULE
    assert own["sizes"] == {"p": 5, "2p": 1, "4p": 0, "skipped": 2}
    assert one is not None and one["steps"] == [1] * 8 and torch.equal(same, plain)
    assert before == after and torch.equal(default, again)
    if not engine.real:
        assert stage.ignored == []


def test_the_request_keeps_its_other_arguments(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    stage = engine.stage(engine.load(tiny.flux()))
    request = engine.request({"speedup": 3}, guidance_scale=1.5)
    given = request.extra["diffusers_kwargs"]
    stage.forward(request, None)
    assert "ddit" not in request.extra["diffusers_kwargs"]
    assert request.extra["diffusers_kwargs"]["guidance_scale"] == 1.5
    assert given["ddit"] == {"speedup": 3}  # what came in is another's


def test_a_request_to_a_plain_pipeline_is_told_that_it_is_plain(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    stage = engine.stage(tiny.flux())
    _, facts = outputs(stage, engine.request({"speedup": 3}))
    assert facts is not None and facts["applied"] is False and "not accelerated" in facts["reason"]
    assert "runs plain" in caplog.text
    assert outputs(stage, engine.request())[1] is None


@pytest.mark.parametrize("variable", [("DDIT_SPEEDUP", "4"), ("DDIT_SCHEDULE", "1,1,0,1,2,0,1,1")])
def test_a_run_too_short_for_the_default_is_plain_as_an_engines_warm_up(
    engine: Engine, variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(*variable)
    engine.start()
    stage = engine.stage(engine.load(tiny.flux()))
    image, facts = outputs(stage, engine.request(steps=2))
    plain, _ = outputs(engine.stage(tiny.flux()), engine.request(steps=2))
    assert torch.equal(image, plain)
    assert facts is not None and not facts["applied"] and re.search("2 (denoising )?steps", facts["reason"])
    assert "a request of 2 steps runs plain" in caplog.text
    with pytest.raises(ScheduleError):  # who asks for it is told
        stage.forward(engine.request({"speedup": 4}, steps=2), None)
    _, facts = outputs(stage, engine.request())
    assert facts is not None and facts["applied"] and 0 in facts["steps"]


def test_a_run_from_a_picture_makes_a_part_of_the_steps_that_are_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIT_SCHEDULE", ",".join(map(str, SCHEDULE)))
    engine.start()
    stage = engine.stage(engine.load(tiny.flux("image")))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # the pipeline's own strength, 0.6, makes 8 of 12 steps
    _, facts = outputs(stage, engine.request(steps=12, image=picture))
    assert facts is not None and facts["applied"] and facts["steps"] == SCHEDULE
    _, facts = outputs(stage, engine.request(steps=12, image=picture, strength=1.0))
    assert facts is not None and not facts["applied"] and "12 denoising steps" in facts["reason"]
    _, facts = outputs(stage, engine.request(steps=8, image=picture, strength=1.0))
    assert facts is not None and facts["applied"] and facts["steps"] == SCHEDULE


def test_steps_among_the_pipelines_own_arguments_count(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_SCHEDULE", ",".join(map(str, SCHEDULE)))
    engine.start()
    stage = engine.stage(engine.load(tiny.flux()))
    _, facts = outputs(stage, engine.request(steps=8, num_inference_steps=5))
    assert facts is not None and not facts["applied"] and "5 denoising steps" in facts["reason"]


def test_requests_at_once_do_not_share_settings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    stage = engine.stage(engine.load(tiny.flux()))
    schedules = [SCHEDULE, [1] * 8, [1, 0] * 4, [1, 1, 1, 4, 4, 1, 1, 1]]
    alone = [outputs(stage, engine.request({"schedule": schedule})) for schedule in schedules]
    together: dict[int, Any] = {}

    def run(place: int) -> None:
        together[place] = outputs(stage, engine.request({"schedule": schedules[place]}))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, (image, facts) in enumerate(alone):
        assert together[place][1] == facts and facts is not None and facts["steps"] == schedules[place]
        assert torch.equal(together[place][0], image)


def test_a_schedule_of_another_length_is_refused_and_the_next_request_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    stage = engine.stage(engine.load(tiny.flux()))
    before = outputs(stage, engine.request())
    with pytest.raises(ScheduleError):
        stage.forward(engine.request({"schedule": [1, 1, 0]}), None)
    after = outputs(stage, engine.request())
    assert after[1] == before[1] and torch.equal(after[0], before[0])


def test_a_bad_request_is_refused_before_it_is_sent_to_a_worker(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    build = engine.resolve(SAMPLING)
    with pytest.raises(ConfigError, match=r"ddit: speedup=0\.5") as refused:
        build("id", diffusers_kwargs={"ddit": {"speedup": 0.5}})
    with pytest.raises(ScheduleError, match="3"):
        build("id", num_inference_steps=8, diffusers_kwargs={"ddit": {"schedule": [1, 1, 0]}})
    with pytest.raises(ScheduleError, match="5 denoising steps"):
        own = {"ddit": {"schedule": SCHEDULE}, "num_inference_steps": 5}
        build("id", num_inference_steps=8, diffusers_kwargs=own)
    assert isinstance(refused.value, ValueError)  # of which the engine makes status 400
    if not engine.real:  # the engine's own needs its arguments of start
        assert build("id", diffusers_kwargs={"ddit": {"speedup": 2}, "a": 1}, seed=3)["seed"] == 3
        own = {"ddit": {"schedule": [1, 1, 0]}, "strength": 0.5}
        assert build("id", num_inference_steps=6, diffusers_kwargs=own)["num_inference_steps"] == 6
        of_picture = {"num_inference_steps": 12, "image_path": ["a.png"], "diffusers_kwargs": {"ddit": {"speedup": 8}}}
        assert build("id", **of_picture) == of_picture  # the pipeline's own strength is not known here
        assert build("id", diffusers_kwargs=None) == {"diffusers_kwargs": None}


@pytest.mark.parametrize(
    ("variables", "ddit", "message"),
    [
        ({"DDIT_QUALITY": "30"}, {"toward_converged": 0.3}, "toward_converged=0.3: quality=30"),
        ({"DDIT_REFERENCE": "converged"}, {"toward_converged": 0.3}, "reference='converged'"),
        ({"DDIT_CORRECTOR": "false"}, {"toward_converged": 0.3}, "corrector=False"),
        ({"DDIT_MULTIPLES": "1,2"}, {"schedule": [1] * 4 + [4]}, r"schedule\[4\]=4 is not among multiples=\(1, 2\)"),
        ({"DDIT_SCHEDULE": "1,1,0,1,2,0,1,1"}, {"toward_converged": 0.5}, "8 entries, this run has 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_stand_beside_the_servers_settings_is_refused_before_a_worker(
    engine: Engine, variables: dict[str, str], ddit: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    engine.start()
    with pytest.raises((ConfigError, ScheduleError), match=message):
        engine.resolve(SAMPLING)("id", num_inference_steps=5, diffusers_kwargs={"ddit": ddit})


def test_responses_tell(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2")
    engine.start()
    protocol = importlib.import_module("sglang.multimodal_gen.runtime.entrypoints.openai.protocol")
    try:
        plugin.let_responses_tell()
        facts = {"applied": True, "steps": [1, 0]}
        result = SimpleNamespace(usage={"ddit": facts})
        response = plugin.tell_in_response({"data": [], "usage": dict(result.usage)}, request_id="a", result=result)
        assert response == {"data": [], "ddit": facts}
        assert protocol.ImageResponse(**response, id="a").model_dump()["ddit"] == facts
        assert protocol.VideoResponse(id="a", ddit=facts).model_dump()["ddit"] == facts
        theirs = {"usage": {"prompt_tokens": 3, "ddit": facts}}
        assert plugin.tell_in_response(theirs) == {"usage": {"prompt_tokens": 3}, "ddit": facts}
        assert plugin.tell_in_response({"id": "a"}) == {"id": "a"}
    finally:
        for cls in (protocol.ImageResponse, protocol.VideoResponse):
            cls.model_config.pop("extra", None)
            cls.model_rebuild(force=True)
