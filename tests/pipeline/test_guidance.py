"""The two calls of guidance in one batch: what runs, when it does not, and that pictures stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters import trained
from diffusers import ClassifierFreeGuidance, FirstBlockCacheConfig
from recorded import recorded
from specimens.hunyuan_video15 import hunyuan_call, hunyuan_video
from specimens.ltx2 import SPECIMENS as LTX2
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError, Report, TeaCacheConfig
from ddit_rt.demo import load_pipeline
from ddit_rt.families import Joiner, NotJoinedError, expected_second, family_of
from ddit_rt.pipeline import call_arguments

SCHEDULE = (1, 1, 2, 4, 1, 0, 4, 2)
COARSE = sum(k > 1 for k in SCHEDULE)


class Batches:
    """Batch sizes of the transformer's runs, by whether they were coarse, in order."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full: list[int] = []
        self.coarse: list[int] = []
        cls = type(pipe.transformer)
        inner, seen = cls.forward, self

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"]
            # rows and columns of Wan's latents, tokens of FLUX's
            size = hidden.shape[-1] if hidden.ndim == 5 else hidden.shape[1]
            seen.largest = max(seen.largest, size)
            (seen.full if size == seen.largest else seen.coarse).append(len(hidden))
            return inner(self, *args, **kwargs)

        self.largest = 0
        monkeypatch.setattr(cls, "forward", forward)

    def clear(self) -> None:
        self.full.clear()
        self.coarse.clear()


def run(pipe: Any, inputs: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, Report]:
    with ddit_rt.accelerated(pipe, **{"schedule": SCHEDULE, **settings}):
        found = latents_of(pipe, inputs)
        return found, ddit_rt.report(pipe)


def notes(report: Report) -> list[str]:
    return [step.note for step in report.steps if step.note]


def assert_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # sums in another order; eight steps hand that on
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": lambda: (flux(guidance=True), negative(flux_inputs())),
    "flux-two-prompts": lambda: (flux(), negative(flux_inputs(batch=2))),
    "flux-odd": lambda: (flux(), negative(flux_inputs(height=72, width=40))),
    "wan": lambda: (wan(), wan_inputs()),
}


CASES = [("flux", path) for path in ("delta", "band-split", "naive", "adapter", "adapter-delta")]
CASES += [("flux-two-prompts", "delta"), ("flux-odd", "delta"), ("wan", "delta"), ("wan", "adapter")]


@pytest.mark.parametrize(("model", "coarse"), CASES)
def test_every_path_predicts_what_it_predicts_apart(model: str, coarse: str) -> None:
    pipe, inputs = MODELS[model]()
    settings = {"coarse": coarse, "adapter": trained(pipe) if "adapter" in coarse else None}
    wanted, apart = run(pipe, inputs, **settings)
    for when in ("coarse", "always"):
        found, report = run(pipe, inputs, batch_guidance=when, **settings)
        assert_alike(found, wanted)
        assert not notes(report)
        for one, other in zip(report.steps, apart.steps, strict=True):
            assert (one.flops, one.full_flops, one.executed) == (other.flops, other.full_flops, other.executed)


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_a_step_runs_the_model_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, inputs = MODELS[model]()
    batches = Batches(pipe, monkeypatch)
    run(pipe, inputs, coarse="band-split")
    assert (batches.full, batches.coarse) == ([1] * 6, [1] * 2 * COARSE)
    batches.clear()
    run(pipe, inputs, coarse="band-split", batch_guidance="coarse")
    assert (batches.full, batches.coarse) == ([1] * 6, [2] * COARSE)
    batches.clear()
    # the first step's second call is not known before it comes
    run(pipe, inputs, coarse="band-split", batch_guidance="always")
    assert (batches.full, batches.coarse) == ([1, 1, 2, 2], [2] * COARSE)
    batches.clear()
    run(pipe, inputs)
    with_probes = len(batches.coarse)
    batches.clear()
    run(pipe, inputs, batch_guidance="coarse")
    assert batches.coarse == [2] * (with_probes // 2) and with_probes > 2 * COARSE


def test_full_steps_stay_the_plain_pipelines_bit_for_bit() -> None:
    pipe, inputs = MODELS["wan"]()
    plain = latents_of(pipe, inputs)
    for settings in ({"schedule": (1,) * 8}, {"schedule": None, "threshold": 0}):
        assert torch.equal(run(pipe, inputs, batch_guidance="coarse", **settings)[0], plain)
    found, _ = run(pipe, inputs, batch_guidance="always", schedule=(1,) * 8)
    assert_alike(found, plain)
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_calls_without_guidance_are_as_without_the_setting() -> None:
    pipe, inputs = flux(), flux_inputs()
    wanted, _ = run(pipe, inputs)
    found, report = run(pipe, inputs, batch_guidance="always")
    assert torch.equal(found, wanted) and not notes(report)


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_graphs_hold_both_calls(model: str) -> None:
    pipe, inputs = MODELS[model]()
    wanted, _ = run(pipe, inputs, batch_guidance="coarse")
    recording = recorded(pipe, schedule=SCHEDULE, batch_guidance="coarse")
    assert torch.equal(latents_of(pipe, inputs), wanted)
    captures = recording.captures
    assert torch.equal(latents_of(pipe, inputs), wanted) and recording.captures == captures
    assert {step.executed for step in ddit_rt.report(pipe).steps} == {"graph", "cached"}
    ddit_rt.restore(pipe)
    # one graph for both: at p, and at either size a step, with one anchor or two, and a probe
    apart = recorded(pipe, schedule=SCHEDULE)
    latents_of(pipe, inputs)
    assert captures <= apart.captures
    ddit_rt.restore(pipe)


def test_two_transformers_take_turns() -> None:
    pipe, inputs = wan(two=True), wan_inputs(steps=8)
    schedule = (1, 2, 2, 2, 1, 2, 2, 2)
    wanted, apart = run(pipe, inputs, schedule=schedule)
    found, report = run(pipe, inputs, schedule=schedule, batch_guidance="always")
    assert_alike(found, wanted)
    assert [s.note for s in report.steps] == [s.note for s in apart.steps]


def test_trimmed_text_goes_with_it() -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "a red apple", "negative_prompt": "blurry", "true_cfg_scale": 3.0, "output_type": "latent"}

    def call(**settings: Any) -> torch.Tensor:
        further = {**given, "generator": torch.Generator().manual_seed(0)}
        call = call_arguments("demo", steps=3, further=further)
        return run(pipe, call, schedule=(1, 1, 4), trim_text=True, **settings)[0]

    assert_alike(call(batch_guidance="coarse"), call())


def test_modulations_of_both_are_made_once() -> None:
    pipe, inputs = MODELS["flux"]()
    rows: list[int] = []
    pipe.transformer.time_text_embed.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    found, _ = run(pipe, inputs, batch_guidance="coarse", modulation="ahead")
    # of either call at p, of both at 2p and 4p
    assert sorted(rows) == [8, 8, 16, 16]
    assert_alike(found, run(pipe, inputs)[0])


def test_no_gradient_and_inference_mode_alike() -> None:
    pipe, inputs = MODELS["flux"]()
    wanted, _ = run(pipe, inputs, batch_guidance="always", modulation="ahead")
    with torch.inference_mode():
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            inputs[name] = inputs[name].clone()
        found, report = run(pipe, inputs, batch_guidance="always", modulation="ahead")
    assert_alike(found, wanted)
    assert not notes(report)


# -- calls that are not as expected -----------------------------------------------------------------------------------

TENSORS = ["latents", "prompt_embeds", "negative_prompt_embeds"]


def changing(**changes: Callable[[int, dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
    """Arguments of a Wan call whose callback returns other tensors."""

    def at_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        (change,) = changes.values()
        return change(index, tensors) or {}

    inputs = wan_inputs()
    inputs["prompt_embeds"], inputs["negative_prompt_embeds"] = (
        inputs[name].clone() for name in ("prompt_embeds", "negative_prompt_embeds")
    )
    return {
        **inputs,
        "callback_on_step_end": at_step_end,
        "callback_on_step_end_tensor_inputs": TENSORS,
    }


def other_negative(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] * 0.5} if index == 2 else None


def other_prompts(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    return {name: tensors[name] * 0.5 for name in TENSORS[1:]} if index == 2 else None


def other_prompt(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if index == 2 else None


def in_place(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    if index == 2:
        tensors["negative_prompt_embeds"].mul_(0.5)
    return None


def every_step(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] * 0.9}


def longer(index: int, tensors: dict[str, Any]) -> dict[str, Any] | None:
    embeds = tensors["negative_prompt_embeds"]
    return {"negative_prompt_embeds": torch.cat([embeds, 2 * embeds], dim=1)} if index == 2 else None


@pytest.mark.parametrize("when", ["coarse", "always"])
@pytest.mark.parametrize("change", [other_negative, other_prompts, other_prompt, in_place, every_step, longer])
def test_prompts_may_change_in_mid_run(change: Any, when: str) -> None:
    pipe = wan()
    wanted, apart = run(pipe, changing(change=change))
    found, report = run(pipe, changing(change=change), batch_guidance=when)
    assert_alike(found, wanted)
    unchanged, _ = run(pipe, wan_inputs())
    assert (unchanged - wanted).norm() > 1e-3 * wanted.norm()
    wasted = sum(s.flops for s in report.steps) / sum(s.flops for s in apart.steps)
    missed = {
        other_negative: 1,
        other_prompts: 1,
        other_prompt: 0,
        in_place: 0,
        every_step: 2,
        longer: 1,
    }[change]
    said = [note for note in notes(report) if "ran once more" in note]
    assert len(said) == missed and (wasted > 1) == bool(missed)
    if change is every_step:
        assert any("not as expected 2 times" in note for note in notes(report))
    if change is longer:
        assert any("has shape (1, 6, 16) for one prompt and (1, 12, 16)" in note for note in notes(report))


def guidance_where(on: Callable[[int], bool]) -> dict[str, Any]:
    def at_step_end(pipe: Any, index: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 3.0 if on(index + 1) else 1.0
        return {}

    return wan_inputs(callback_on_step_end=at_step_end)


def guidance_until(step: int) -> dict[str, Any]:
    return guidance_where(lambda index: index < step)


def guidance_from(step: int) -> dict[str, Any]:
    return guidance_where(lambda index: index >= step)


@pytest.mark.parametrize("when", ["coarse", "always"])
@pytest.mark.parametrize("step", [2, 4])
def test_guidance_may_end_in_mid_run(step: int, when: str) -> None:
    pipe = wan()
    wanted, _ = run(pipe, guidance_until(step))
    found, report = run(pipe, guidance_until(step), batch_guidance=when)
    assert_alike(found, wanted)
    assert report.complete


@pytest.mark.parametrize("when", ["coarse", "always"])
@pytest.mark.parametrize("step", [2, 4])
def test_guidance_may_begin_in_mid_run(step: int, when: str) -> None:
    pipe = wan()
    wanted, apart = run(pipe, guidance_from(step))
    found, report = run(pipe, guidance_from(step), batch_guidance=when)
    assert_alike(found, wanted)
    assert report.schedule == apart.schedule


def test_a_call_between_the_two_gets_its_own_result() -> None:
    """Somebody else's call in the middle of a step is not given what the second call will be."""
    pipe, inputs = MODELS["flux"]()
    calls: list[None] = []
    seen: list[torch.Tensor] = []

    def again(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(None)
        if len(calls) == 5:  # the first of a coarse step
            other = {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}
            seen.append(module.forward(**other)[0])

    hook = pipe.transformer.register_forward_hook(again, with_kwargs=True)
    wanted, _ = run(pipe, inputs)
    calls.clear()
    found, _ = run(pipe, inputs, batch_guidance="coarse")
    hook.remove()
    assert_alike(*seen)
    assert_alike(found, wanted)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_joined_run_reaches_no_other_call(error: type[BaseException]) -> None:
    pipe, inputs = MODELS["wan"]()
    wanted, _ = run(pipe, inputs, batch_guidance="coarse")
    ddit_rt.accelerate(pipe, schedule=SCHEDULE, batch_guidance="coarse")

    def fail(_: Any, given: Any) -> None:
        if len(given[0]) == 2:
            raise error

    hook = pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(error):
        latents_of(pipe, inputs)
    hook.remove()
    assert torch.equal(latents_of(pipe, inputs), wanted)
    ddit_rt.restore(pipe)


def test_too_little_memory_for_both_leaves_them_apart(caplog: pytest.LogCaptureFixture) -> None:
    pipe, inputs = MODELS["wan"]()
    wanted, _ = run(pipe, inputs)
    tries = []

    def fail(_: Any, given: Any) -> None:
        if len(given[0]) == 2:
            tries.append(None)
            raise torch.OutOfMemoryError

    hook = pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    found, report = run(pipe, inputs, batch_guidance="coarse")
    hook.remove()
    assert torch.equal(found, wanted) and len(tries) == 1
    assert notes(report) == ["guidance apart: both in one batch take more memory than there is"] * COARSE
    assert "more memory than there is" in caplog.text


# -- what cannot be one call ------------------------------------------------------------------------------------------


def test_texts_of_other_lengths_stay_apart() -> None:
    pipe, inputs = MODELS["wan"]()
    inputs["negative_prompt_embeds"] = inputs["negative_prompt_embeds"][:, :4]
    wanted, _ = run(pipe, inputs)
    found, report = run(pipe, inputs, batch_guidance="always")
    assert torch.equal(found, wanted)
    assert set(notes(report)) == {
        "guidance apart: encoder_hidden_states has shape (1, 6, 16) for one prompt and (1, 4, 16) for the other"
    }


class Hooking(ClassifierFreeGuidance):
    """A guider that changes the model in the negative prompt's call, as diffusers' AutoGuidance does."""

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._count_prepared == 2:
            block = denoiser.transformer_blocks[0]
            self.hook = block.register_forward_hook(lambda _, __, given: tuple(0.5 * part for part in given))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        super().cleanup_models(denoiser)
        if self._count_prepared == 2:
            self.hook.remove()


def test_calls_that_a_guider_hooks_into_stay_apart() -> None:
    pipe = hunyuan_video()
    size = {"height": 128, "width": 128}
    pipe.guider = Hooking(guidance_scale=3.0)
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE):
        wanted = pipe(**hunyuan_call(**size)).frames
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, batch_guidance="always"):
        found = pipe(**hunyuan_call(**size)).frames
        report = ddit_rt.report(pipe)
    assert torch.equal(found, wanted)
    assert set(notes(report)) == {"guidance apart: the model's layers were hooked otherwise in the last step's calls"}


def test_calls_that_are_given_the_same_differ_in_what_is_not_seen() -> None:
    family = family_of(flux())
    text, latent = torch.zeros(1, 5, 24), torch.zeros(1, 64, 16)
    given = {"hidden_states": latent, "timestep": torch.ones(1), "encoder_hidden_states": text}
    with pytest.raises(NotJoinedError, match="were given the same"):
        expected_second(family, (given, {**given, "timestep": torch.ones(1)}), given)
    other = {**given, "encoder_hidden_states": text + 1}
    now = {**given, "hidden_states": latent + 1}
    found = expected_second(family, (given, other), now)
    assert found["hidden_states"] is now["hidden_states"]
    assert found["encoder_hidden_states"] is other["encoder_hidden_states"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"guidance": torch.ones(1)}, {"guidance": None}, "guidance is of type Tensor for one prompt and missing"),
        ({"txt_ids": torch.zeros(4, 3)}, {"txt_ids": torch.ones(4, 3)}, "txt_ids is not the same for both prompts"),
        ({"txt_ids": torch.zeros(4, 3)}, {"txt_ids": torch.zeros(5, 3)}, r"txt_ids has shape \(4, 3\)"),
        ({"x": torch.zeros(3, 2)}, {"x": torch.zeros(3, 2)}, r"x of shape \(3, 2\) is not one per sample of 2"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2).double()}, "x has another dtype or device"),
        ({"x": {"scale": 1.0}}, {"x": {"scale": 0.5}}, r"x\['scale'\] is not the same for both prompts"),
        ({"x": [1, 2]}, {"x": [1, 3]}, r"x\[1\] is not the same"),
    ],
)
def test_what_cannot_be_joined_is_named(first: Any, second: Any, said: str) -> None:
    with pytest.raises(NotJoinedError, match=said):
        Joiner(family_of(flux())).joined(first, second, batch=2)


def test_masks_that_differ_are_each_samples_own() -> None:
    pipe = hunyuan_video()
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0)
    size = {"height": 128, "width": 128}
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE):
        wanted = pipe(**hunyuan_call(**size)).frames
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, batch_guidance="always"):
        found = pipe(**hunyuan_call(**size)).frames
        report = ddit_rt.report(pipe)
    assert_alike(found, wanted)
    assert not notes(report)


def test_a_cache_that_was_switched_on_later_decides_for_each_call() -> None:
    pipe, inputs = MODELS["flux"]()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    wanted, _ = run(pipe, inputs)
    found, report = run(pipe, inputs, batch_guidance="coarse")
    assert torch.equal(found, wanted)
    assert set(notes(report)) == {"guidance apart: a cache decides for each call by itself"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": TeaCacheConfig(1.0, (1.0, 0.0))}, r"batch_guidance='coarse': a cache decides for each call"),
        ({"multiples": (1,)}, r"batch_guidance='coarse' is for coarse steps, and multiples=\(1,\) has none"),
        ({"batch_guidance": "sometimes"}, "batch_guidance='sometimes': use one of 'never', 'coarse', 'always'"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_patched(settings: Any, said: str) -> None:
    pipe = flux()
    with pytest.raises(ConfigError, match=said):
        ddit_rt.accelerate(pipe, **{"batch_guidance": "coarse", **settings})
    assert not hasattr(pipe.transformer.forward, "_ddit_link")


def test_a_second_output_is_refused() -> None:
    pipe = LTX2[0].make()
    with pytest.raises(ConfigError, match="family ltx2 predict a second output"):
        ddit_rt.accelerate(pipe, batch_guidance="coarse")


def test_the_setting_leaves_the_choice_of_steps_alone() -> None:
    assert ddit_rt.DDiTConfig(batch_guidance="coarse").speedup == 2.0
