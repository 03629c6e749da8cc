"""The plugin that runs diffusers' tests against accelerated pipelines: what it lets pass and what it finds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, UniPCMultistepScheduler
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer
from upstream_calls import SETTINGS, CallMismatch, Judge, judged
from upstream_components import LocalHub
from upstream_summary import failing, summary

import ddit_rt


def test_calls_of_a_pipeline_are_compared_and_leave_it_plain():
    pipe, inputs = flux(), flux_inputs(steps=2)
    plain = latents_of(pipe, inputs)
    with judged(Judge("exact")) as judge:
        result = latents_of(pipe, inputs)
        assert torch.equal(result, plain) and judge.calls == 1
        (decoded,) = pipe(**flux_inputs(steps=2, output_type="np", return_dict=False))
        assert decoded.shape == (1, 64, 64, 3) and judge.calls == 2
    assert not judge.mismatches and not judge.refused
    assert "forward" not in pipe.transformer.__dict__ and "_ddit_pipeline" not in pipe.__dict__
    latents_of(pipe, inputs)
    assert judge.calls == 2


@pytest.mark.parametrize("mode", ["coarse", "coarser"])
@pytest.mark.parametrize("make", [lambda: (flux(), flux_inputs(steps=3)), lambda: (wan(), wan_inputs(steps=3))])
def test_coarse_calls_are_really_coarse(make, mode):
    pipe, inputs = make()
    plain = latents_of(pipe, inputs)
    with judged(Judge(mode)) as judge:
        result = latents_of(pipe, inputs)
        assert torch.equal(latents_of(pipe, inputs), result)
    assert judge.calls == 2 and not torch.equal(result, plain)


def test_plain_and_accelerated_call_draw_the_same_random_numbers():
    pipe = flux()
    inputs = {**flux_inputs(steps=2), "generator": None}
    torch.manual_seed(3)
    plain, after = pipe(**inputs).images, torch.rand(1)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = {**flux_inputs(batch=2, steps=2), "generator": generators}
    with judged(Judge("exact")):
        torch.manual_seed(3)
        assert torch.equal(pipe(**inputs).images, plain)
        assert torch.equal(torch.rand(1), after)
        pipe(**both)
    drawn = [generator.get_state() for generator in generators]
    again = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pipe(**{**both, "generator": again})
    assert all(torch.equal(one.get_state(), other) for one, other in zip(again, drawn))


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_errors_of_the_plain_call_pass_through(error):
    def fail(*_: Any) -> dict[str, Any]:
        raise error("as upstream tests expect")

    pipe = flux()
    with judged(Judge("exact")) as judge:
        with pytest.raises(error, match="as upstream tests expect"):
            pipe(**flux_inputs(steps=2, callback_on_step_end=fail))
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            pipe(**flux_inputs(steps=2, callback_on_step_end_tensor_inputs=["height"]))
    assert (judge.calls, judge.raised, judge.mismatches) == (2, 2, [])


def break_output(pipe: Any, value: Any) -> None:
    """Spoils what an accelerated pipeline computes, and nothing of a plain one."""
    own = pipe.transformer.proj_out.forward

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        return value(own(hidden)) if ddit_rt.pipeline.find_accelerated(pipe) else own(hidden)

    pipe.transformer.proj_out.forward = broken


def test_a_last_bit_is_found():
    pipe = flux()
    break_output(pipe, lambda output: output * (1 + 2e-7))
    with judged(Judge("exact")) as judge, pytest.raises(CallMismatch, match="values differ"):
        latents_of(pipe, flux_inputs(steps=2))
    assert len(judge.mismatches) == 1 and "FluxPipeline" in judge.mismatches[0]
    with judged(Judge("coarse")):
        latents_of(pipe, flux_inputs(steps=2))


def raises(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("only accelerated")


@pytest.mark.parametrize(
    "value, message",
    [(lambda output: output * float("nan"), "not finite"), (raises, "raised nothing, accelerated raised RuntimeError")],
)
def test_coarse_calls_that_raise_or_are_not_finite_are_found(value, message):
    pipe = flux()
    break_output(pipe, value)
    with judged(Judge("coarse")) as judge, pytest.raises(CallMismatch, match=message):
        latents_of(pipe, flux_inputs(steps=2))
    assert len(judge.mismatches) == 1
    assert "forward" not in pipe.transformer.__dict__


def test_a_pipeline_that_accelerate_refuses_runs_plain_and_is_counted():
    pipe, inputs = wan(), wan_inputs(steps=2)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction")
    plain = latents_of(pipe, inputs)
    with judged(Judge("exact")) as judge:
        assert torch.equal(latents_of(pipe, inputs), plain)
    assert judge.calls == 0 and "use_flow_sigmas" in judge.refused[0]


def test_tokenizers_and_configurations_are_made_locally():
    text = "A painting of a squirrel eating a burger"
    with LocalHub() as hub:
        clip = CLIPTokenizer.from_pretrained("hf-internal-testing/tiny-random-clip")
        t5 = AutoTokenizer.from_pretrained("hf-internal-testing/tiny-random-t5")
        config = AutoConfig.from_pretrained("hf-internal-testing/tiny-random-t5")
        folder = Path(hub.folder("hf-internal-testing/tiny-random-t5"))
        assert hub.folder("another/model") == "another/model"
        again = AutoTokenizer.from_pretrained(folder)
    assert not folder.exists()
    assert clip.model_max_length == 77 and max(clip(text).input_ids) == clip.eos_token_id < 1000
    assert t5(text).input_ids == again(text).input_ids
    assert t5.unk_token_id not in t5(text).input_ids and max(t5(text).input_ids) < config.vocab_size
    assert len({tuple(t5(prompt).input_ids) for prompt in (text, "dance monkey", "bad quality")}) == 3


def test_pipelines_are_wrapped_for_the_length_of_the_context():
    before = FluxPipeline.__call__
    with judged(Judge("exact")):
        assert FluxPipeline.__call__ is not before and FluxPipeline.__call__.__wrapped__ is before
    assert FluxPipeline.__call__ is before


def log(mode: str, **outcomes: tuple[str, list[str]]) -> dict[str, Any]:
    tests = {
        name: {"outcome": outcome, "reason": "why", "mismatches": mismatches, "refused": []}
        for name, (outcome, mismatches) in outcomes.items()
    }
    return {"mode": mode, "tests": tests, "calls": 3, "raised": 0}


def test_the_summary_names_what_fails_accelerated_only():
    plain = log("plain", a=("passed", []), b=("failed", []), c=("skipped", []), d=("passed", []))
    exact = log("exact", a=("passed", []), b=("failed", []), c=("skipped", []), d=("failed", ["values differ"]))
    assert failing(plain, exact) == {"d": "values differ"}
    text, clean = summary(plain, [exact])
    assert not clean and "4 tests" in text and "3 calls compared" in text and "FAILED d: values differ" in text
    assert summary(plain, [{**exact, "tests": plain["tests"]}])[1]
    assert not summary(plain, [{**exact, "tests": plain["tests"], "calls": 0}])[1], "nothing was compared"
    assert failing(plain, log("coarse", d=("failed", []))) == {"d": "why"}


def test_every_mode_is_a_setting_that_accelerate_takes():
    pipe = flux()
    for settings in SETTINGS.values():
        with ddit_rt.accelerated(pipe, **settings):
            pass


def test_without_a_checkout_the_runner_says_so_and_skips(tmp_path):
    script = Path(__file__).parent / "run.sh"
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_TESTS"}
    skipped = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, check=True)
    assert "skipped: no checkout of diffusers" in skipped.stdout
    wrong = subprocess.run(["bash", script, tmp_path], capture_output=True, text=True, env=environment, check=False)
    assert wrong.returncode == 2 and "holds no tests/pipelines/flux" in wrong.stderr
