"""Pipelines by name: the table of shipped models, and the checks of a call."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from ddit_rt import ConfigError
from ddit_rt.pipeline import (
    DEMO,
    DEMO_VIDEO,
    SHIPPED,
    call_arguments,
    call_defaults,
    check_call,
    example_prompts,
    frame_rate,
    is_own,
    loading,
    makes_videos,
)


def test_a_shipped_model_says_how_it_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "demo.json").write_text(json.dumps({"call": {"height": 8}, "prompts": {"one": "a dot"}}))
    monkeypatch.setattr(loading, "SHIPPED", {"other": tmp_path})
    assert loading.source_of("other") == str(tmp_path)
    assert call_arguments("other", steps=3) == {"height": 8, "num_inference_steps": 3}
    assert example_prompts("other") == {"one": "a dot"}


def test_the_demo_is_shipped_and_other_models_have_no_defaults() -> None:
    assert (SHIPPED[DEMO] / "model_index.json").is_file()
    assert call_defaults(DEMO)["height"] == 128 and set(example_prompts(DEMO)) == {"plain", "detailed", "two", "many"}
    assert call_defaults("owner/model") == {} and example_prompts("owner/model") == {}
    assert loading.source_of("owner/model") == "owner/model"


def test_a_folder_with_a_demo_json_says_how_it_is_called(tmp_path: Path) -> None:
    assert call_defaults(str(tmp_path)) == {} and not is_own(str(tmp_path)) and frame_rate(str(tmp_path)) == 16
    settings = {"call": {"num_frames": 9}, "prompts": {"one": "a dot"}, "fps": 8}
    (tmp_path / "demo.json").write_text(json.dumps(settings))
    assert call_defaults(str(tmp_path)) == {"num_frames": 9} and is_own(str(tmp_path))
    assert example_prompts(str(tmp_path)) == {"one": "a dot"} and frame_rate(str(tmp_path)) == 8


def test_a_shipped_model_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "SHIPPED", {DEMO: SHIPPED[DEMO], DEMO_VIDEO: tmp_path})
    for ask in (loading.load_any, loading.source_of, call_defaults, example_prompts, frame_rate):
        with pytest.raises(
            ConfigError, match=r"'demo-video' is not in this installation: .* Give 'demo' or the folder"
        ):
            ask(DEMO_VIDEO)


def test_videos_are_told_from_pictures_by_what_a_pipeline_takes() -> None:
    assert makes_videos(tiny.wan()) and not makes_videos(tiny.flux())


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "flux").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("models/flux", str(tmp_path), "./none"):
        with pytest.raises(ConfigError, match="holds no pipeline"):
            loading.source_of(model)


@pytest.mark.parametrize("sizes", [{"height": 0}, {"width": -8}, {"frames": 0}, {"steps": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    (name, value), *_ = sizes.items()
    with pytest.raises(ConfigError, match=f"{name}={value}: at least 1"):
        call_arguments("owner/model", **sizes)


def test_a_size_or_steps_given_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_inference_steps='x': an option of its own says 50"):
        call_arguments("owner/model", steps=50, further={"num_inference_steps": "x"})
    assert call_arguments("owner/model", further={"height": 64, "guidance_scale": None}) == {"height": 64}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"height": 33}, r"height=33: this model takes multiples of \d+ pixels"),
        ({"num_frames": 5}, "frames=5: FluxPipeline makes pictures"),
        ({"true_cfg": 2, "lora": 1}, "FluxPipeline takes no argument 'true_cfg' or 'lora'"),
        ({"output_type": "latent"}, "output_type='latent': it is set for every call"),
        ({"generator": 3}, "generator=3: it is set for every call"),
        ({"num_inference_steps": "x"}, "num_inference_steps='x': a whole number from 1 on"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: a whole number from 1 on"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: a whole number from 1 on"),
        ({"height": "64"}, "height='64': a whole number from 1 on"),
        ({"true_cfg_scale": "x"}, "true_cfg_scale='x': a finite number"),
        ({"true_cfg_scale": None}, "true_cfg_scale=None: a finite number"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan: a finite number"),
        ({"guidance_scale": True}, "guidance_scale=True: a finite number"),
    ],
)
def test_calls_that_a_picture_pipeline_does_not_take(call: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_call(tiny.flux(), call)


def test_calls_that_a_picture_pipeline_takes() -> None:
    numbers = {"num_inference_steps": 4, "guidance_scale": 10**400, "true_cfg_scale": 1, "height": None}
    check_call(tiny.flux(), {**numbers, "sigmas": [1.0, 0.5], "prompt": "a", "joint_attention_kwargs": {}})
    check_call(tiny.wan(), {"guidance_scale_2": None, "num_frames": 5})


def test_frames_that_a_video_pipeline_would_change() -> None:
    pipe = tiny.wan()
    check_call(pipe, {"num_frames": 5, "height": 64, "width": 96})
    with pytest.raises(ConfigError, match=r"frames=6: .* as in 5 or 9"):
        check_call(pipe, {"num_frames": 6})
