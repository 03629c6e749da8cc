"""ddit_rt.warmup: every size runs once, and nothing else changes."""

import pytest
import torch
from recorded import recorded
from tiny import flux, flux_inputs, latents_of, picture, wan, wan_image, wan_inputs

import ddit_rt


def embeds(inputs):
    return {name: value for name, value in inputs.items() if "embeds" in name}


def test_every_size_runs_and_no_request_captures_anything():
    pipe, inputs = flux(), flux_inputs()
    recording = recorded(pipe, threshold=1e9, max_consecutive_coarse=None)
    report = ddit_rt.warmup(pipe, 64, 64, progress=False, **embeds(inputs))
    assert report.schedule == [1, 1, 2, 4] and {s.executed for s in report.steps} == {"graph"}
    captures = recording.captures
    latents_of(pipe, inputs)
    assert ddit_rt.report(pipe).schedule == [1, 1, 1, 4, 4, 4, 4, 4]
    assert recording.captures == captures


@pytest.mark.parametrize("order", [1, 3])
def test_both_transformers_are_warm(order):
    pipe, inputs = wan(two=True), wan_inputs(steps=12)
    recording = recorded(pipe, threshold=1e9, order=order, max_graphs=32)
    report = ddit_rt.warmup(pipe, 64, 96, 5, progress=False, **embeds(inputs))
    assert {1, 2, 4} == set(report.schedule)
    captures = recording.captures
    latents_of(pipe, inputs)
    assert recording.captures == captures


def test_without_graphs_it_runs_eagerly_and_leaves_no_trace():
    pipe, inputs = flux(), flux_inputs()
    with ddit_rt.accelerated(pipe, threshold=0.3):
        first = latents_of(pipe, inputs)
        report, state = ddit_rt.report(pipe), torch.random.get_rng_state()
        bar = pipe._progress_bar_config
        warm = ddit_rt.warmup(pipe, 48, 80, progress=False, **embeds(inputs))
        assert [s.executed for s in warm.steps] == ["eager"] * 4 and warm.steps[0].tokens == 6 * 10
        assert ddit_rt.report(pipe) is report and pipe._progress_bar_config is bar
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(latents_of(pipe, inputs), first)


def test_pictures_are_made_for_pipelines_that_want_one():
    pipe = flux("inpaint")
    with ddit_rt.accelerated(pipe):
        assert ddit_rt.warmup(pipe, 64, 64, progress=False, **embeds(flux_inputs())).complete
    pipe = wan_image()
    with ddit_rt.accelerated(pipe):
        given = {**embeds(wan_inputs()), "image": picture(64, 96)}
        assert ddit_rt.warmup(pipe, 64, 96, 5, progress=False, **given).complete


def test_it_says_what_is_missing():
    pipe = flux()
    with pytest.raises(ddit_rt.DDiTError, match="not accelerated"):
        ddit_rt.warmup(pipe, 64, 64)
    with ddit_rt.accelerated(pipe):
        with pytest.raises(ddit_rt.ConfigError, match="prompt_embeds"):
            ddit_rt.warmup(pipe, 64, 64)
        with pytest.raises(ddit_rt.ConfigError, match="makes pictures"):
            ddit_rt.warmup(pipe, 64, 64, 5, **embeds(flux_inputs()))


def test_settings_come_back_also_after_a_failure():
    pipe, inputs = flux(), flux_inputs()
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2]):
        with pytest.raises(ValueError, match="Cannot forward both"):
            ddit_rt.warmup(pipe, 64, 64, progress=False, prompt="", prompt_embeds=inputs["prompt_embeds"])
        latents_of(pipe, {**inputs, "num_inference_steps": 3})
        assert ddit_rt.report(pipe).schedule == [1, 1, 2]
