"""What requests may not do: every refusal is OpenAI's error object, and nothing is a 500."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers.served import LocalServer

from ddit_rt.serve import Limits, ModelConfig, ServeConfig
from ddit_rt.serve.metrics import names


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with a key and tight limits."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    digests = {name: hashlib.sha256(f"sk-{name}".encode()).hexdigest() for name in ("ada", "slow")}
    keys.write_text(f"ada {digests['ada']} 100000\nslow {digests['slow']} 2\n")
    config = ServeConfig(
        models=(
            ModelConfig(name="demo", model="demo", sizes=("64x64",), call={"num_inference_steps": 2}, max_batch=1),
        ),
        folder=str(folder),
        keys_file=str(keys),
        limits=Limits(
            prompt=100, pictures=2, pixels=128 * 128, steps=50, upload_bytes=100_000, upload_pixels=10_000, waiting=2
        ),
    )
    with LocalServer(config) as running:
        yield running


def _post(
    server: LocalServer, body: Any = None, key: str = "sk-ada", path: str = "images/generations", **more: Any
) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    content = {"json": body} if body is not None else {}
    return httpx.post(f"{server.url}/v1/{path}", headers=headers, timeout=60, **content, **more)


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x" * 101}, 400, "prompt"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": "x", "negative_prompt": "y" * 101}, 400, "negative_prompt"),
        ({"prompt": "x", "model": "../../etc/passwd"}, 404, "model"),
        ({"prompt": "x", "model": "black-forest-labs/FLUX.1-dev"}, 404, "model"),
        ({"prompt": "x", "lora": "https://example.org/x.safetensors"}, 400, "lora"),
        ({"prompt": "x", "n": 3}, 400, "n"),
        ({"prompt": "x", "n": 0}, 400, "n"),
        ({"prompt": "x", "size": "256x256"}, 400, "size"),
        ({"prompt": "x", "size": "65x64"}, 400, "size"),
        ({"prompt": "x", "size": "-64x64"}, 400, "size"),
        ({"prompt": "x", "size": "64"}, 400, "size"),
        ({"prompt": "x", "steps": 51}, 400, "steps"),
        ({"prompt": "x", "steps": 0}, 400, "steps"),
        ({"prompt": "x", "seed": -1}, 400, "seed"),
        ({"prompt": "x", "seed": 2**63}, 400, "seed"),
        ({"prompt": "x", "guidance": 1e9}, 400, "guidance"),
        ({"prompt": "x", "speedup": 0.5}, 400, "speedup"),
        ({"prompt": "x", "speedup": 2, "threshold": 1}, 400, None),
        ({"prompt": "x", "schedule": [1, 3]}, 400, "schedule"),
        ({"prompt": "x", "schedule": [1, 1, 1]}, 400, "schedule"),
        ({"prompt": "x", "schedule": "/etc/passwd"}, 400, "schedule"),
        ({"prompt": "x", "partial_images": 4}, 400, "partial_images"),
        ({"prompt": "x", "stream": True, "n": 2}, 400, None),
        ({"prompt": "x", "background": "transparent"}, 400, "background"),
        ({"prompt": "x", "output_format": "svg"}, 400, "output_format"),
        ({"prompt": "x", "unheard_of": 1}, 400, "unheard_of"),
        ({"prompt": "x", "query": 1}, 400, "query"),
        ({"prompt": "x", "body": 1}, 400, "body"),
        ({"prompt": "x", "timeout": 0}, 400, "timeout"),
        ([], 400, None),
        ("x", 400, None),
    ],
)
def test_bad_values_are_refused_by_name(guarded: LocalServer, body: Any, status: int, param: str | None) -> None:
    answer = _post(guarded, body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["param"] == param and error["message"] and error["code"]
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 50_000, b'{"prompt": "\\ud800"}', b'{"seed": NaN}'])
def test_what_is_no_json_is_refused(guarded: LocalServer, content: bytes) -> None:
    answer = _post(guarded, content=content)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_keys(guarded: LocalServer) -> None:
    assert _post(guarded, {"prompt": "x"}).status_code == 200
    for key in ("", "sk-eve"):
        answer = _post(guarded, {"prompt": "x"}, key)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    # an unknown key is told so before the body is looked at
    assert _post(guarded, None, "sk-eve", content=b"{").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-eve").images.generate(prompt="x")
    for path in ("/health/live", "/health/ready", "/metrics", "/openapi.json"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_a_key_has_its_own_rate(guarded: LocalServer) -> None:
    answers = [_post(guarded, {"prompt": "x"}, "sk-slow") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


def test_bodies_are_cut_off(guarded: LocalServer) -> None:
    answer = _post(guarded, {"prompt": "x" * 200_000})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:  # of a length that nobody tells
        for _ in range(30):
            yield b" " * 10_000

    assert _post(guarded, content=pieces(), path="images/generations").status_code == 413


def test_uploads_are_looked_at_before_any_work(guarded: LocalServer) -> None:
    def edit(data: bytes, fields: dict[str, str] | None = None, **more: Any) -> Any:
        files = {"image": ("a.png", data)}
        return _post(guarded, path="images/edits", files=files, data={"prompt": "x", **(fields or {})}, **more)

    assert edit(b"not a picture").json()["error"]["code"] == "invalid_image"
    assert edit(b"x", {"model": "none"}).status_code == 404
    import io

    from PIL import Image

    large = io.BytesIO()
    Image.new("L", (200, 200)).save(large, "PNG")
    assert edit(large.getvalue()).status_code == 413
    assert _post(guarded, path="images/edits", data={"prompt": "x"}).status_code == 400
    assert _post(guarded, {"prompt": "x"}, path="images/edits").json()["error"]["code"] == "invalid_content_type"
    text = _post(guarded, path="images/edits", files={"prompt": ("a", b"x"), "image": ("a.png", b"x")})
    assert text.status_code == 400


def test_a_full_queue_answers_at_once(guarded: LocalServer) -> None:
    body = {"prompt": "x", "steps": 50, "speedup": 1, "size": "128x128"}
    headers = {"authorization": "Bearer sk-ada", "content-type": "application/json"}
    held = []
    host, port = guarded.url.removeprefix("http://").split(":")
    for _ in range(6):
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
        held.append(connection)
        time.sleep(0.1)
    began = time.monotonic()
    answer = _post(guarded, body)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1 and time.monotonic() - began < 3
    for connection in held:
        connection.close()  # their work ends with them
    end = time.monotonic() + 30
    while guarded.engines["demo"].busy():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert _post(guarded, {"prompt": "x"}).status_code == 200


def test_time_runs_out(guarded: LocalServer) -> None:
    body = {"prompt": "x", "steps": 50, "speedup": 1, "size": "128x128", "timeout": 0.3}
    answer = _post(guarded, body)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    with httpx.stream(
        "POST",
        f"{guarded.url}/v1/images/generations",
        json={**body, "stream": True},
        headers={"authorization": "Bearer sk-ada"},
    ) as streamed:
        lines = list(streamed.iter_lines())
    assert streamed.status_code == 200 and "event: error" in lines
    assert "deadline_exceeded" in lines[lines.index("event: error") + 1]


def test_a_server_that_stops_takes_nothing_new(guarded: LocalServer) -> None:
    state = guarded.application.server
    state.draining = True
    try:
        assert httpx.get(f"{guarded.url}/health/ready").status_code == 503
        answer = _post(guarded, {"prompt": "x"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{guarded.url}/health/live").status_code == 200
    finally:
        state.draining = False
    assert _post(guarded, {"prompt": "x"}).status_code == 200


def test_connections_that_say_nothing_hold_nobody_up(guarded: LocalServer) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        assert _post(guarded, {"prompt": "x"}).status_code == 200
    finally:
        for connection in silent:
            connection.close()


def test_unknown_paths_and_methods(guarded: LocalServer) -> None:
    headers = {"authorization": "Bearer sk-ada"}
    answer = httpx.get(f"{guarded.url}/v1/nothing", headers=headers)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{guarded.url}/v1/images/generations", headers=headers).status_code == 405


def test_metrics_count_what_was_done(guarded: LocalServer) -> None:
    def value(text: str, name: str) -> float:
        found = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    before = httpx.get(f"{guarded.url}/metrics").text
    _post(guarded, {"prompt": "x", "schedule": [1, 1, 0, 1], "steps": 4, "speedup": None})
    _post(guarded, {"prompt": "x", "n": 9})
    after = httpx.get(f"{guarded.url}/metrics").text

    def grew(name: str) -> float:
        return value(after, name) - value(before, name)

    done = 'ddit_requests_total{code="200",endpoint="/v1/images/generations",model="demo"}'
    assert grew(done) == 1
    assert grew('ddit_steps_total{model="demo",size="p"}') == 3
    assert grew('ddit_steps_total{model="demo",size="skipped"}') == 1
    assert grew('ddit_denoising_seconds_count{model="demo"}') == 1
    assert value(after, 'ddit_in_flight{model="demo"}') == 0
    assert all(f"# TYPE {name.removesuffix('_total')} " in after for name in names())


def test_an_id_that_is_given_comes_back(guarded: LocalServer, tmp_path: Path) -> None:
    headers = {"authorization": "Bearer sk-ada", "x-request-id": "trace-7"}
    answer = httpx.post(f"{guarded.url}/v1/images/generations", json={"prompt": "x"}, headers=headers, timeout=60)
    assert answer.headers["x-request-id"] == "trace-7" and answer.json()["ddit"]["request_id"] == "trace-7"
    headers["x-request-id"] = "a b\tc"
    answer = httpx.post(f"{guarded.url}/v1/images/generations", json={"prompt": "x"}, headers=headers, timeout=60)
    assert answer.headers["x-request-id"].startswith("req_")
