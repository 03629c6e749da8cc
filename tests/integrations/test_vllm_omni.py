"""The vLLM-Omni plug-in, against the engine where it is installed and against a double of what it touches."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import engine_doubles
import pytest
import tiny
import torch

from ddit_rt import ConfigError
from ddit_rt.integrations import vllm_omni as plugin
from ddit_rt.pipeline import find_accelerated, report

SCHEDULE = [1, 1, 0, 1, 2, 0, 1, 1]
SELECTOR = "vllm_omni.diffusion.cache.selector"
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
OWN_CLASS = "ddit_rt.integrations.vllm_omni_pipeline"


class Engine:
    def __init__(self, real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self._monkeypatch = real, monkeypatch
        self.selector, self.runner = importlib.import_module(SELECTOR), importlib.import_module(RUNNER)
        self.adapter = importlib.import_module(ADAPTER).DiffusersAdapterPipeline

    def config(self, pipe: Any, **more: Any) -> Any:
        """Of a model that loads as ``pipe``."""
        if not self.real:
            return engine_doubles.OmniConfig(lambda: pipe, **more)
        data = importlib.import_module("vllm_omni.diffusion.data")
        self._monkeypatch.setattr(self.adapter, "_load_pipeline_from_pretrained", lambda self, model, kwargs: pipe)
        folder = importlib.import_module("ddit_rt.demo").MODEL_DIR
        return data.OmniDiffusionConfig.from_kwargs(
            model=str(folder), diffusion_load_format="diffusers", dtype="float32", **more
        )

    def load(self, pipe: Any, **more: Any) -> Any:
        """An adapter that has loaded a pipeline."""
        made = self.adapter(od_config=self.config(pipe, **more), device=torch.device("cpu"))
        made.load_weights()
        return made

    def request(self, ddit: Any = None, steps: int | None = 8) -> Any:
        call = tiny.flux_inputs(height=32, width=32)
        call["num_inference_steps"] = steps
        extra = {} if ddit is None else {"ddit": ddit}
        if not self.real:
            return engine_doubles.Batch(engine_doubles.Sampling(call, extra, call.pop("num_inference_steps")))
        data = importlib.import_module("vllm_omni.inputs.data")
        request = importlib.import_module("vllm_omni.diffusion.request")
        batch = importlib.import_module("vllm_omni.diffusion.worker.request_batch")
        sampling = data.OmniDiffusionSamplingParams(seed=1, generator_device="cpu", extra_args=extra)
        for name, value in call.items():
            setattr(sampling, name, value)
        made = request.OmniDiffusionRequest(prompt={"prompt": None}, sampling_params=sampling, request_id="r")
        return batch.DiffusionRequestBatch(requests=[made])


@pytest.fixture(params=["double", "real"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    real = request.param == "real"
    if real:
        if importlib.util.find_spec("vllm_omni") is None or importlib.util.find_spec("vllm") is None:
            pytest.skip("vllm and vllm-omni are not installed")
    else:
        for name, module in engine_doubles.vllm_omni().items():
            monkeypatch.setitem(sys.modules, name, module)
    plugin._backend_class.cache_clear()
    monkeypatch.delitem(sys.modules, OWN_CLASS, raising=False)
    made = Engine(real, monkeypatch)
    owners: list[tuple[Any, str]] = [(made.selector, "get_cache_backend"), (made.runner, "get_cache_backend")]
    owners += [(made.adapter, name) for name in plugin._OF_ADAPTER]
    kept = [(owner, name, getattr(owner, name)) for owner, name in owners]
    yield made
    for owner, name, original in kept:
        setattr(owner, name, original)
    plugin._backend_class.cache_clear()
    sys.modules.pop(OWN_CLASS, None)


def image(adapter: Any, request: Any) -> torch.Tensor:
    made = adapter.forward(request).output
    return made.clone()


def test_registering_twice_changes_nothing(engine: Engine) -> None:
    plugin.register()
    first = (engine.selector.get_cache_backend, engine.adapter.forward, engine.adapter.load_weights)
    plugin.register()
    assert first == (engine.selector.get_cache_backend, engine.adapter.forward, engine.adapter.load_weights)
    assert engine.runner.get_cache_backend is engine.selector.get_cache_backend


def test_the_engines_own_caches_are_chosen_as_before(engine: Engine) -> None:
    plugin.register()
    choose = engine.runner.get_cache_backend
    assert choose("none", {}) is None and choose(None, {}) is None
    with pytest.raises(ValueError, match="Unsupported cache backend: nothing"):
        choose("nothing", {})
    with pytest.raises(NotImplementedError, match="Cache backend 'tea_cache' is not supported"):
        engine.load(tiny.flux(), cache_backend="tea_cache")


def test_without_settings_the_adapter_runs_plain(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    plain = image(engine.load(tiny.flux()), engine.request())
    plugin.register()
    assert "waits for --cache-backend ddit" in caplog.text
    adapter = engine.load(tiny.flux())
    assert find_accelerated(adapter._pipeline) is None
    assert torch.equal(image(adapter, engine.request()), plain)


def test_the_environment_accelerates_what_the_adapter_loads(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "2.5")
    plugin.register()
    adapter = engine.load(tiny.flux())
    assert "APPLIED to FluxPipeline of vLLM-Omni: speedup=2.5" in caplog.text
    image(adapter, engine.request())
    assert report(adapter._pipeline).schedule.count(0) > 0


def test_the_cache_back_end_accelerates_when_it_is_enabled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIT_CORRECTOR", "false")
    plugin.register()
    adapter = engine.load(tiny.flux(), cache_backend="ddit", cache_config={"speedup": 2.5})
    config = adapter.od_config
    assert config.cache_backend == "ddit" and find_accelerated(adapter._pipeline) is None
    plain = image(adapter, engine.request())
    backend = engine.runner.get_cache_backend(config.cache_backend, config.cache_config)
    assert not backend.is_enabled()
    backend.enable(adapter)
    backend.refresh(adapter, 8)
    found = find_accelerated(adapter._pipeline)
    assert backend.is_enabled() and found is not None
    assert (found.config.speedup, found.config.corrector) == (2.5, False)
    assert not torch.equal(image(adapter, engine.request()), plain)
    assert torch.equal(image(adapter, engine.request({"speedup": 1})), plain)
    image(adapter, engine.request({"schedule": SCHEDULE}))
    assert report(adapter._pipeline).schedule == SCHEDULE


def test_the_dummy_run_of_one_step_is_plain(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = image(engine.load(tiny.flux()), engine.request(steps=1))
    monkeypatch.setenv("DDIT_SCHEDULE", "1,1,0,1,2,0,1,1")
    plugin.register()
    adapter = engine.load(tiny.flux(), diffusers_call_kwargs={"num_inference_steps": 6})
    assert torch.equal(image(adapter, engine.request(steps=1)), plain)
    image(adapter, engine.request(steps=None))  # six
    assert report(adapter._pipeline).schedule == [1] * 6
    image(adapter, engine.request())
    assert report(adapter._pipeline).schedule == SCHEDULE


def test_a_request_without_steps_makes_the_pipelines_own_number(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SCHEDULE", "1,1,0,1,2,0,1,1")
    plugin.register()
    adapter = engine.load(tiny.flux())
    image(adapter, engine.request(steps=None))
    assert report(adapter._pipeline).schedule == [1] * 28
    assert "a request of 28 steps runs plain" in caplog.text


def test_bad_settings_of_the_cache_are_refused_before_anything_is_loaded(engine: Engine) -> None:
    plugin.register()
    with pytest.raises(ConfigError, match=r"--cache-config: speedup=0\.5"):
        engine.adapter(od_config=engine.config(None, cache_backend="ddit", cache_config={"speedup": 0.5}))
    config = engine.config(None, cache_backend="ddit", cache_config={"speed": 2})
    with pytest.raises(ConfigError, match="--cache-config: unknown setting 'speed'"):
        engine.adapter(od_config=config)
    assert config.cache_backend == "ddit"
    fit = {"speedup": 3, "fit": "first-calls"}
    with pytest.raises(ConfigError, match="--cache-config: fit='first-calls' would keep requests waiting"):
        engine.adapter(od_config=engine.config(None, cache_backend="ddit", cache_config=fit))


def test_what_else_the_adapter_refuses_it_refuses_with_our_back_end_too(engine: Engine) -> None:
    plugin.register()
    config = engine.config(None, cache_backend="ddit", enforce_eager=True)
    with pytest.raises(NotImplementedError, match="Eager execution is not supported"):
        engine.adapter(od_config=config)
    assert config.cache_backend == "ddit"


def test_a_model_of_the_engines_own_is_left_alone_and_told_of(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    plugin.register()
    native = SimpleNamespace(transformer=object())
    backend = engine.runner.get_cache_backend("ddit", {"speedup": 2})
    backend.enable(native)
    assert not backend.is_enabled() and set(vars(native)) == {"transformer"}
    assert "NOT APPLIED" in caplog.text and "--diffusion-load-format diffusers" in caplog.text


def test_bad_variables_leave_the_engine_alone_and_are_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIT_SPEEDUP", "0.5")
    before = (engine.selector.get_cache_backend, engine.adapter.forward)
    plugin.register()
    assert (engine.selector.get_cache_backend, engine.adapter.forward) == before
    assert "DDIT_SPEEDUP: speedup=0.5" in caplog.text


def test_another_version_without_a_hooked_method_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if engine.real:
        pytest.skip("of a version that is not the installed one")
    monkeypatch.delattr(engine.adapter, "_raise_unsupported_features")
    before = engine.selector.get_cache_backend
    plugin.register()
    assert engine.selector.get_cache_backend is before
    assert "has no DiffusersAdapterPipeline._raise_unsupported_features" in caplog.text
    monkeypatch.undo()


@pytest.mark.parametrize("patched", [False, True], ids=["alone", "beside-the-plug-in"])
def test_the_pipeline_class_needs_no_patch(
    engine: Engine, patched: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if patched:
        monkeypatch.setenv("DDIT_SPEEDUP", "4")
        plugin.register()
    cls = importlib.import_module(OWN_CLASS).DDiTDiffusersPipeline
    arguments = {"pipeline_class": f"{OWN_CLASS}.DDiTDiffusersPipeline", "ddit": {"schedule": SCHEDULE}}
    adapter = cls(od_config=engine.config(tiny.flux(), custom_pipeline_args=arguments), device=torch.device("cpu"))
    adapter.load_weights(iter(()))  # as the engine's loader calls it
    image(adapter, engine.request())
    assert report(adapter._pipeline).schedule == SCHEDULE
    assert caplog.text.count(" APPLIED to ") == 1
    image(adapter, engine.request({"speedup": 1}))
    assert report(adapter._pipeline).schedule == [1] * 8
    bad = {"pipeline_class": "", "ddit": {"speedup": 0}}
    with pytest.raises(ConfigError, match="speedup=0"):
        cls(od_config=engine.config(None, custom_pipeline_args=bad), device=torch.device("cpu"))
