"""Images through OpenAI's own client."""

from __future__ import annotations

import base64
import errno
import io
import os
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from helpers.served import LocalServer
from PIL import Image

from ddit_rt.demo import CALL_DEFAULTS, load_pipeline
from ddit_rt.pipeline import accelerated


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _picture(data: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def _drawn(prompt: str, seed: int, size: int = 64, steps: int = 8, **settings: Any) -> np.ndarray:
    """The picture that diffusers and ddit_rt make without a server."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL_DEFAULTS, "height": size, "width": size, "num_inference_steps": steps}
    with accelerated(pipe, **settings):
        made = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **call).images[0]
    return (made * 255).round().astype(np.uint8)


def test_a_picture_is_the_one_that_the_pipeline_makes(client: openai.OpenAI) -> None:
    prompt = "zebras behind a fence"
    made = client.images.generate(prompt=prompt, model="demo", extra_body={"seed": 5, "speedup": 2})
    assert made.data is not None
    difference = np.abs(np.asarray(_picture(made.data[0])).astype(int) - _drawn(prompt, 5, speedup=2))
    assert difference.max() <= 1
    assert made.size == "64x64" and made.output_format == "png" and made.quality == "high"
    own = made.model_extra["ddit"]  # type: ignore[index]
    assert own["seeds"] == [5] and len(own["steps"]) == 8 and own["sizes"]["skipped"] == 4
    assert own["speedup"] == pytest.approx(2, rel=0.1)
    assert set(own["seconds"]) == {"queued", "encoding", "denoising", "decoding"}
    assert own["seconds"]["denoising"] > 0
    assert made.usage is not None and made.usage.output_tokens == 64


def test_speedup_one_is_the_plain_pipeline(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="a red apple", extra_body={"seed": 1, "speedup": 1})
    assert made.data is not None and made.quality == "max"
    own = made.model_extra["ddit"]  # type: ignore[index]
    assert own["steps"] == [1] * 8
    assert np.abs(np.asarray(_picture(made.data[0])).astype(int) - _drawn("a red apple", 1, threshold=0)).max() <= 1


def test_several_pictures_have_seeds_in_a_row(client: openai.OpenAI) -> None:
    made = client.images.generate(prompt="a red apple", n=3, extra_body={"seed": 8})
    assert made.data is not None
    assert made.model_extra["ddit"]["seeds"] == [8, 9, 10]  # type: ignore[index]
    assert made.model_extra["ddit"]["batch"] == 3  # type: ignore[index]
    alone = client.images.generate(prompt="a red apple", extra_body={"seed": 10})
    assert alone.data is not None
    third, single = (np.asarray(_picture(d)).astype(int) for d in (made.data[2], alone.data[0]))
    assert np.abs(third - single).max() <= 1
    assert np.abs(np.asarray(_picture(made.data[0])).astype(int) - third).max() > 50


@pytest.mark.parametrize("format, kind", [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_formats(client: openai.OpenAI, format: Any, kind: str) -> None:
    made = client.images.generate(
        prompt="a red apple", output_format=format, output_compression=60, extra_body={"steps": 2, "speedup": 1}
    )
    assert made.data is not None and made.output_format == format
    assert _picture(made.data[0]).format == kind


def test_a_picture_by_url(client: openai.OpenAI) -> None:
    made = client.images.generate(
        prompt="a red apple", response_format="url", output_format="webp", extra_body={"steps": 2, "speedup": 1}
    )
    assert made.data is not None and made.data[0].url is not None
    got = httpx.get(made.data[0].url)
    assert got.status_code == 200 and got.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(got.content)).size == (64, 64)
    for name in ("img_" + "0" * 32 + ".png", "..%2f..%2fetc%2fpasswd", "img_x.png"):
        assert httpx.get(f"{made.data[0].url.rpartition('/v1/')[0]}/v1/images/{name}/content").status_code == 404


def test_a_full_disk_is_an_error_and_leaves_nothing(
    client: openai.OpenAI, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(server.config.folder) / "pictures"
    before = sorted(folder.iterdir())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    body = {"prompt": "a", "steps": 2, "speedup": 1, "response_format": "url"}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "insufficient_storage"
    assert sorted(folder.iterdir()) == before
    monkeypatch.undo()
    made = client.images.generate(prompt="a", response_format="url", extra_body={"steps": 2, "speedup": 1})
    assert made.data is not None and made.data[0].url


def test_previews_come_before_the_picture_and_look_like_it(client: openai.OpenAI) -> None:
    options = {"seed": 5, "steps": 20, "speedup": 1}
    events = list(
        client.images.generate(
            prompt="a red apple on a black background", stream=True, partial_images=3, extra_body=options
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    pictures = [np.asarray(_picture(event)).astype(float) for event in events]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    errors = [float(np.square(picture - pictures[-1]).mean()) for picture in pictures[:3]]
    spread = float(np.square(pictures[-1] - pictures[-1].mean((0, 1))).mean())
    assert errors[2] < errors[0] < spread  # nearer than an even colour, and nearer with every one
    assert events[-1].model_extra["ddit"]["seeds"] == [5]  # type: ignore[index]


def test_the_first_preview_is_there_before_a_third_of_the_time(client: openai.OpenAI) -> None:
    options = {"seed": 5, "steps": 40, "speedup": 1, "size": "128x128"}
    list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=options))  # the pace is learnt
    began = time.perf_counter()
    times = []
    for _ in client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=options):
        times.append(time.perf_counter() - began)
    assert len(times) == 2 and times[0] < times[1] / 2  # a third on a machine that does nothing else


def test_edits(client: openai.OpenAI) -> None:
    source = Image.fromarray(_drawn("a red apple on a black background", 3))
    image, masked = io.BytesIO(), io.BytesIO()
    source.save(image, "PNG")
    opened = source.convert("RGBA")
    opened.paste((0, 0, 0, 0), (16, 16, 48, 48))  # OpenAI's way to say where
    opened.save(masked, "PNG")
    whole = client.images.edit(
        image=("a.png", image.getvalue()), prompt="a yellow star", extra_body={"seed": 1, "strength": 0.5}
    )
    assert whole.data is not None
    part = client.images.edit(
        image=("a.png", image.getvalue()),
        mask=("m.png", masked.getvalue()),
        prompt="a yellow star",
        extra_body={"seed": 1},
    )
    assert part.data is not None
    before = np.asarray(source).astype(float)
    after = np.asarray(_picture(part.data[0])).astype(float)
    changed = np.abs(after - before).mean(-1)
    assert changed[16:48, 16:48].mean() > 4 * changed[:, :10].mean()
    assert np.abs(np.asarray(_picture(whole.data[0])).astype(float) - before).mean() > 1


def test_a_quality_that_did_not_decide_is_not_told(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"prompt": "a", "quality": "low", "extra_body": {"speedup": 1, "steps": 12}}
    assert client.images.generate(**options).quality == "max"
    preview, done = client.images.generate(**options, stream=True, partial_images=1)
    assert (preview.quality, done.quality) == ("auto", "max")


def test_an_edit_by_schedule(server: LocalServer) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")

    def edit(schedule: str, strength: float, **files: Any) -> httpx.Response:
        data = {"prompt": "a", "schedule": schedule, "strength": str(strength)}
        shown = {"image": ("a.png", image.getvalue()), **files}
        return httpx.post(f"{server.url}/v1/images/edits", data=data, files=shown, timeout=60)

    answer = edit("1,0,2,1", 0.5)
    assert answer.status_code == 200 and answer.json()["ddit"]["steps"] == [1, 0, 2, 1]
    assert edit("1,0,2,1", 0.5, mask=("m.png", image.getvalue())).status_code == 200
    refused = edit("1,0,2,1,1,1,1,1", 0.5)
    assert refused.status_code == 400 and "4 denoising steps" in refused.json()["error"]["message"]


def test_an_edit_may_be_streamed(client: openai.OpenAI) -> None:
    image = io.BytesIO()
    Image.fromarray(_drawn("a red apple", 3)).save(image, "PNG")
    events = list(
        client.images.edit(
            image=("a.png", image.getvalue()), prompt="a", stream=True, partial_images=1, extra_body={"seed": 1}
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_one_picture_is_taken_by_a_model_that_starts_from_it(server: LocalServer) -> None:
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "PNG")

    def refusal(*names: str) -> Any:
        files = [(name, ("a.png", image.getvalue())) for name in names]
        answer = httpx.post(f"{server.url}/v1/images/edits", data={"prompt": "x"}, files=files, timeout=60)
        assert answer.status_code == 400
        return answer.json()["error"]

    two = refusal("image[]", "image[]")
    assert two["param"] == "image" and two["message"] == "2 images: demo takes one picture."
    assert refusal("image", "mask", "mask")["param"] == "mask"


def test_models(client: openai.OpenAI) -> None:
    demo, film = client.models.list().data
    assert (demo.id, film.id) == ("demo", "film")
    assert demo.model_extra["ddit"]["default_size"] == "64x64"  # type: ignore[index]
    assert demo.model_extra["ddit"]["edits"] and demo.model_extra["ddit"]["masks"]  # type: ignore[index]
    assert demo.model_extra["ddit"]["images"] == 1  # type: ignore[index]
    assert film.model_extra["ddit"]["kind"] == "video" and not film.model_extra["ddit"]["edits"]  # type: ignore[index]
    assert client.models.retrieve("film").id == "film"
