"""Videos through OpenAI's own client."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import httpx
import imageio.v3 as imageio
import openai
import pytest
from helpers.served import LocalServer
from PIL import Image

from ddit_rt.serve import ModelConfig, ServeConfig
from ddit_rt.serve.state import Server

CALL = {"num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _ended(client: openai.OpenAI, id: str, seconds: float = 60) -> openai.types.Video:
    end = time.monotonic() + seconds
    while True:
        video = client.videos.retrieve(id)
        if video.status in ("completed", "failed"):
            return video
        assert time.monotonic() < end, video
        time.sleep(0.05)


def test_a_video_from_its_request_to_its_removal(client: openai.OpenAI, tmp_path: Path) -> None:
    made = client.videos.create(prompt="a red apple rolls", extra_body={"seed": 4, "frames": 9, "fps": 8, "speedup": 2})
    assert made.status == "queued" and made.progress == 0 and made.size == "64x48" and made.seconds == "1.125"
    assert made.model == "film" and made.id.startswith("video_")
    done = _ended(client, made.id)
    assert done.status == "completed" and done.progress == 100 and done.error is None
    assert done.expires_at is not None and done.completed_at is not None and done.expires_at > done.completed_at
    own = done.model_extra["ddit"]  # type: ignore[index]
    assert own["seeds"] == [4] and len(own["steps"]) == 4
    path = tmp_path / "video.mp4"
    client.videos.download_content(made.id).write_to_file(path)
    frames = imageio.imread(path)
    assert frames.shape == (9, 48, 64, 3)
    assert imageio.immeta(path)["fps"] == 8
    thumbnail = client.videos.download_content(made.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (64, 48)
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(made.id)


def test_progress_is_told_step_by_step(client: openai.OpenAI) -> None:
    made = client.videos.create(prompt="slow", extra_body={"steps": 60, "frames": 17, "speedup": 1})
    seen = set()
    end = time.monotonic() + 90
    while (video := client.videos.retrieve(made.id)).status in ("queued", "in_progress"):
        seen.add(video.progress)
        assert time.monotonic() < end
        time.sleep(0.01)
    assert video.status == "completed" and len(seen) > 3 and max(seen) < 100


def test_one_that_is_made_can_be_stopped(client: openai.OpenAI, server: LocalServer) -> None:
    made = client.videos.create(prompt="long", extra_body={"steps": 100, "frames": 41, "speedup": 1})
    end = time.monotonic() + 60
    while client.videos.retrieve(made.id).progress < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    with pytest.raises(openai.ConflictError):
        client.videos.download_content(made.id)
    client.videos.delete(made.id)
    while server.engines["film"].busy():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert all(video.id != made.id for video in client.videos.list())


def test_lists_have_pages(client: openai.OpenAI) -> None:
    ids = [client.videos.create(prompt=str(i), extra_body={"steps": 2, "speedup": 1}).id for i in range(5)]
    first = client.videos.list(limit=2)
    assert [video.id for video in first.data] == ids[:2:-1] and first.has_more
    assert [video.id for video in client.videos.list(limit=2)][:5] == ids[::-1]  # the client follows the pages
    for id in ids:
        assert _ended(client, id).status == "completed"
        client.videos.delete(id)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"frames": 6}, "frames"),
        ({"frames": 100_001}, "frames"),
        ({"seconds": "1000"}, "seconds"),
        ({"seconds": "0"}, "seconds"),
        ({"seconds": "1", "frames": 5}, None),
        ({"model": "demo"}, "model"),
        ({"size": "60x48"}, "size"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_values_are_refused_by_name(server: LocalServer, body: dict[str, object], param: str | None) -> None:
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "path, param", [("?limit=0", "limit"), ("?order=up", "order"), ("/video_1/content?variant=x", "variant")]
)
def test_bad_values_of_a_query_are_refused_by_name(server: LocalServer, path: str, param: str) -> None:
    answer = httpx.get(f"{server.url}/v1/videos{path}")
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["message"].startswith(f"{param}: ")


def test_a_picture_to_start_from_needs_a_model_that_takes_one(server: LocalServer) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "PNG")
    files = {"input_reference": ("a.png", picture.getvalue())}
    answer = httpx.post(f"{server.url}/v1/videos", data={"prompt": "x", "seconds": "1"}, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input_reference"


def test_a_model_that_starts_from_a_picture_queues_nothing_without_one(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Server.model
    monkeypatch.setattr(Server, "model", lambda *asked: replace(own(*asked), needs_image=True))
    answer = httpx.post(f"{server.url}/v1/videos", json={"prompt": "x"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == ("input_reference", "missing_image")


def test_ids_from_outside_reach_no_file(server: LocalServer) -> None:
    for id in ("..%2f..%2fetc", "video_", "video_" + "0" * 38, "x" * 5000):
        assert httpx.get(f"{server.url}/v1/videos/{id}").status_code == 404
        assert httpx.get(f"{server.url}/v1/videos/{id}/content").status_code == 404
        assert httpx.delete(f"{server.url}/v1/videos/{id}").status_code == 404


def test_a_restart_loses_no_job(video_folder: Path, tmp_path: Path) -> None:
    config = ServeConfig(
        models=(ModelConfig(name="film", model=str(video_folder), sizes=("64x48",), call=CALL),), folder=str(tmp_path)
    )
    body = {"prompt": "x", "steps": 100, "frames": 17, "speedup": 1}
    with LocalServer(config) as first:
        ids = [httpx.post(f"{first.url}/v1/videos", json=body).json()["id"] for _ in range(2)]
        body = {"prompt": "x", "steps": 2, "speedup": 1}
        ids += [httpx.post(f"{first.url}/v1/videos", json=body).json()["id"] for _ in range(2)]
        end = time.monotonic() + 60
        while httpx.get(f"{first.url}/v1/videos/{ids[0]}").json()["progress"] < 1:
            assert time.monotonic() < end
            time.sleep(0.02)
    with LocalServer(config) as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="none")
        assert [_ended(client, id, 120).status for id in ids] == ["completed"] * 4


def test_a_run_that_takes_longer_than_asked_fails(client: openai.OpenAI) -> None:
    body = {"steps": 100, "frames": 41, "speedup": 1, "timeout": 0.5}
    failed = _ended(client, client.videos.create(prompt="long", extra_body=body).id)
    assert failed.status == "failed" and failed.error is not None and failed.error.code == "deadline_exceeded"


def test_the_other_errors_of_a_job_are_told(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    monkeypatch.setattr(server.engines["film"].variants, "arguments", lambda works: 1 / 0)
    failed = _ended(client, client.videos.create(prompt="x").id)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "internal_error" and "ZeroDivisionError" in failed.error.message
    monkeypatch.undo()

    import os

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    made = client.videos.create(prompt="x", extra_body={"steps": 2, "speedup": 1})
    monkeypatch.setattr(os, "write", full)
    failed = _ended(client, made.id)
    monkeypatch.undo()
    assert failed.error is not None and failed.error.code == "insufficient_storage"
    assert _ended(client, client.videos.create(prompt="x").id).status == "completed"
