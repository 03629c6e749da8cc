"""``ddit-rt bench serve`` against a double: one worker, a queue, a known time per picture."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from typer.testing import CliRunner

from ddit_rt import ConfigError
from ddit_rt.cli import app
from ddit_rt.serve import Load, Percentiles, run_load, summarize, write_load
from ddit_rt.serve.bench import Block, _open, arrivals, draw_requests
from ddit_rt.serve.bench_client import Outcome

SERVICE = 0.03  # seconds per plain picture
MODEL = {
    "id": "demo",
    "object": "model",
    "ddit": {"kind": "image", "default_size": "128x128", "sizes": ["128x128", "96x96"], "prompts": ["a fox", "a boat"]},
}
VIDEO = {"id": "film", "object": "model", "ddit": {"kind": "video"}}


def picture() -> str:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@dataclass
class Double:
    """A server that makes one picture at a time, and remembers what it saw."""

    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    seconds: dict[float, list[float]] = field(default_factory=dict)  # in the server, by speed-up
    queued: dict[float, list[float]] = field(default_factory=dict)
    in_flight: int = 0
    most_in_flight: int = 0
    models: list[dict] = field(default_factory=lambda: [VIDEO, MODEL])
    answers: dict[int, str] = field(default_factory=dict)  # what is wrong with the n-th answer
    always: str | None = None
    worker: asyncio.Lock = field(default_factory=asyncio.Lock)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict:
            return {"object": "list", "data": self.models}

        @app.post("/v1/images/generations")
        async def generate(request: Request) -> Response:
            number = len(self.bodies)
            self.bodies.append(body := await request.json())
            self.keys.add(request.headers.get("authorization"))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                return await self.answer(request, body, self.always or self.answers.get(number, "picture"))
            finally:
                self.in_flight -= 1

        return app

    async def answer(self, request: Request, body: dict, kind: str) -> Response:
        if kind == "queue_full":
            error = {"message": "too many", "type": "rate_limit_error", "param": None, "code": "queue_full"}
            return JSONResponse({"error": error}, 429)
        if kind == "no object":
            return PlainTextResponse("Internal Server Error", 500)
        if kind == "no picture":
            return JSONResponse({"data": [{"b64_json": base64.b64encode(b"nothing").decode()}]})
        if kind == "no form":
            return JSONResponse({"images": []})
        if kind == "cut":
            return StreamingResponse(cut_off(), headers={"content-length": "1000"})
        while kind == "hang" and not await request.is_disconnected():
            await asyncio.sleep(0.05)
        ddit = await self.make(body["speedup"])
        if body.get("stream"):
            return StreamingResponse(self.events(kind, ddit), media_type="text/event-stream")
        return JSONResponse({"created": 1, "data": [{"b64_json": picture()}], "ddit": ddit})

    async def make(self, speedup: float) -> dict:
        begin = time.perf_counter()
        async with self.worker:
            queued = time.perf_counter() - begin
            await asyncio.sleep(SERVICE / speedup)
            seconds = time.perf_counter() - begin
        self.queued.setdefault(speedup, []).append(queued)
        self.seconds.setdefault(speedup, []).append(seconds)
        return {"speedup": speedup, "batch": 2, "seconds": {"queued": queued, "denoising": seconds - queued}}

    async def events(self, kind: str, ddit: dict) -> AsyncIterator[str]:
        def event(type: str, **values: Any) -> str:
            return f"event: {type}\ndata: {json.dumps({'type': type, **values})}\n\n"

        for index in range(3):
            yield event("image_generation.partial_image", b64_json=picture(), partial_image_index=index)
            await asyncio.sleep(0.005)
        if kind == "picture":
            yield event("image_generation.completed", b64_json=picture(), ddit=ddit)
        elif kind == "late error":
            yield event("error", error={"message": "no memory", "type": "server_error", "code": "out_of_memory"})


async def cut_off() -> AsyncIterator[bytes]:
    yield b"{"
    raise RuntimeError("the server breaks off here")


@contextmanager
def running(**settings: Any) -> Iterator[Double]:
    double = Double(**settings)
    server = uvicorn.Server(uvicorn.Config(double.app(), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        double.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield double
    finally:
        server.should_exit = True
        thread.join()


def load(**settings: Any) -> Load:
    return Load(**{"levels": (4.0,), "requests": 24, "rounds": 3, "warmup": 0, **settings})


# -- against the double ---------------------------------------------------------------------------------------------


def test_a_closed_loop_finds_what_the_queue_makes_of_it() -> None:
    with running() as double:
        _, blocks = run_load(double.url, load(levels=(1.0, 4.0)))
    alone_plain, alone_fast, plain, fast = summarize(blocks)
    assert [(one.level, one.speedup) for one in (alone_plain, alone_fast, plain, fast)] == [
        (1, 1), (1, 3), (4, 1), (4, 3),
    ]  # fmt: skip
    for one in (alone_plain, alone_fast, plain, fast):
        assert (one.sent, one.completed, one.failed, one.lost, one.batch) == (24, 24, {}, 0, 2.0)
        assert one.achieved == one.speedup and one.behind == 0
        assert one.latency.p50 <= one.latency.p90 <= one.latency.p99
        # one worker: no more pictures than it can make
        assert 0 < one.throughput.least <= one.throughput.middle <= one.throughput.most <= one.speedup / SERVICE
    assert double.most_in_flight == 4
    # clients side by side wait for each other; alone they do not
    assert plain.queued.p50 > SERVICE > 5 * alone_plain.queued.p50
    assert plain.latency.p50 > 1.5 * alone_plain.latency.p50
    assert fast.throughput.most > plain.throughput.middle and fast.against_plain.most > 1
    assert plain.against_plain is None
    # what is said of the server is what the server saw, and a client sees no less
    seen = [outcome for block in blocks if block.speedup == 1 for outcome in block.outcomes]
    assert sorted(outcome.ddit["seconds"]["queued"] for outcome in seen) == sorted(double.queued[1])
    assert sum(outcome.latency for outcome in seen) >= sum(double.seconds[1])


def test_plain_and_accelerated_take_turns_with_the_same_requests() -> None:
    with running() as double:
        _, blocks = run_load(double.url, load(levels=(1.0,), requests=7, sizes=("128x128", "96x96"), steps=8, seed=3))
    assert [(block.round, block.speedup) for block in blocks] == [(0, 1), (0, 3), (1, 3), (1, 1), (2, 1), (2, 3)]
    assert [len(block.outcomes) for block in blocks] == [2, 2, 2, 2, 3, 3]

    def asked(speedup: float) -> list[dict]:
        return [{**body, "speedup": None} for body in double.bodies if body["speedup"] == speedup]

    assert asked(1) == asked(3) and len({body["seed"] for body in asked(1)}) == 7
    assert {body["size"] for body in double.bodies} == {"128x128", "96x96"}
    assert {body["prompt"] for body in double.bodies} == {"a fox", "a boat"}
    assert {(body["model"], body["steps"], body["n"]) for body in double.bodies} == {("demo", 8, 1)}


def test_an_open_loop_does_not_wait_for_answers() -> None:
    settings = load(mode="open", levels=(60.0,), requests=20, rounds=1, speedups=(1.0,), seed=5)
    with running() as double:
        settings, (block,) = run_load(double.url, settings)
    bodies = draw_requests(settings, 20, Random("5 60.0 0"))
    assert sorted(body["seed"] for body in double.bodies) == sorted(body["seed"] for body in bodies)
    # 60 a second at one picture in 30 ms: they pile up
    assert double.most_in_flight > 4
    (summary,) = summarize([block])
    assert summary.throughput.middle < 1 / SERVICE and summary.completed == 20
    # latency counts from when a request was due, which is before the server saw it
    assert max(outcome.latency for outcome in block.outcomes) >= max(double.seconds[1])


def test_an_open_loop_sends_at_the_times_of_arrival() -> None:
    times = arrivals(100.0, 30, Random(0))

    async def drive() -> tuple[list[tuple[int, float, float]], float]:
        sent: list[tuple[int, float, float]] = []
        all_sent = asyncio.Event()

        async def send(body: dict, due: float) -> Outcome:
            sent.append((body["number"], due, time.perf_counter()))
            if len(sent) == len(times):
                all_sent.set()
            await all_sent.wait()  # no answer before the last request is there
            return Outcome(None, True, 0.0)

        outcomes, behind = await _open(send, [{"number": number} for number in range(len(times))], times)
        assert len(outcomes) == len(times)
        return sent, behind

    sent, behind = asyncio.run(drive())
    assert [number for number, _, _ in sent] == list(range(30))
    begin = sent[0][1] - times[0]
    assert [due - begin for _, due, _ in sent] == pytest.approx(times)
    late = [now - due for _, due, now in sent]
    assert min(late) >= 0 and 0 <= behind <= max(late)


def test_a_stream_is_timed_to_its_first_partial_image() -> None:
    with running() as double:
        _, blocks = run_load(double.url, load(levels=(2.0,), requests=6, stream=True))
    assert all(body["stream"] and body["partial_images"] == 3 for body in double.bodies)
    plain, fast = summarize(blocks)
    assert plain.completed == fast.completed == 6
    assert SERVICE <= plain.first_partial.p50 < plain.latency.p50
    assert fast.batch == 2


def test_failures_are_counted_by_code_and_lost_requests_apart() -> None:
    wrong = {1: "queue_full", 3: "queue_full", 4: "no object", 6: "no picture", 8: "no form", 9: "hang"}
    with running(answers=wrong) as double:
        _, blocks = run_load(double.url, load(levels=(1.0,), requests=12, rounds=2, speedups=(1.0,), timeout=2.5))
    (summary,) = summarize(blocks)
    assert (summary.sent, summary.completed, summary.lost) == (12, 6, 4)
    assert summary.failed == {
        "429 queue_full": 2,
        "500 without an error object": 1,
        "answer without a picture": 1,
        "answer of another form": 1,
        "no end in time": 1,
    }


def test_a_stream_ends_in_a_picture_or_an_error_or_is_lost() -> None:
    with running(answers={1: "late error", 2: "broken off", 4: "queue_full"}) as double:
        settings = load(levels=(1.0,), requests=6, rounds=1, speedups=(3.0,), stream=True)
        _, blocks = run_load(double.url, settings)
    (summary,) = summarize(blocks)
    assert (summary.completed, summary.lost) == (3, 1)
    assert summary.failed == {
        "stream out_of_memory": 1,
        "stream ended without a picture": 1,
        "429 queue_full": 1,
    }


def test_a_connection_that_is_cut_loses_its_request_alone() -> None:
    with running(answers={2: "cut"}) as double:
        _, blocks = run_load(double.url, load(levels=(1.0,), requests=6, rounds=1, speedups=(1.0,)))
    (summary,) = summarize(blocks)
    assert (summary.sent, summary.completed, summary.lost) == (6, 5, 1)
    assert summary.failed == {"connection: RemoteProtocolError": 1}


def test_the_warm_up_is_not_counted_and_has_to_make_a_picture() -> None:
    with running(answers={0: "queue_full"}) as double:
        _, blocks = run_load(double.url, load(requests=3, rounds=1, warmup=2))
        assert len(double.bodies) == 2 * (2 + 3)
        assert [one.sent for one in summarize(blocks)] == [3, 3] and all(not one.failed for one in summarize(blocks))
    with (
        running(always="queue_full") as double,
        pytest.raises(ConfigError, match=r"speedup=1: no picture .* \(429 queue_full\)"),
    ):
        run_load(double.url, load(warmup=2))


def test_the_model_has_to_be_served_and_make_images() -> None:
    with running() as double:
        for name in ("film", "flux"):
            with pytest.raises(ConfigError, match=rf"model='{name}': the server makes images with \['demo'\]"):
                run_load(double.url, load(model=name))
    with running(models=[{"id": "other", "object": "model"}]) as double:  # a server that says no more than OpenAI's
        found, _ = run_load(double.url, load(requests=3))
        assert found.model == "other" and all("size" not in body for body in double.bodies)


# -- numbers --------------------------------------------------------------------------------------------------------


def test_arrivals_follow_from_the_seed_and_have_the_rate() -> None:
    first, again, other = (arrivals(2.0, 2000, Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first == sorted(first) and first[0] > 0
    gaps = np.diff(first)
    assert gaps.mean() == pytest.approx(0.5, rel=0.1)
    assert gaps.std() == pytest.approx(0.5, rel=0.15)  # of a Poisson process, as large as the mean


def test_summaries_are_the_blocks_numbers() -> None:
    def block(speedup: float, round: int, seconds: float, latencies: list[float], failed: int = 0) -> Block:
        told = {"speedup": speedup, "batch": 4, "seconds": {"queued": 0.5, "denoising": 1.0}}
        good = tuple(Outcome(None, True, latency, None, told) for latency in latencies)
        return Block(8.0, speedup, round, seconds, round * 0.1, good + (Outcome("429 queue_full", True, 0.0),) * failed)

    plain, fast = summarize(
        [
            block(1.0, 0, 2.0, [1.0, 2.0]), block(3.0, 0, 1.0, [0.5, 1.0, 1.5, 2.0]),
            block(1.0, 1, 1.0, [3.0, 4.0, 5.0], 1), block(3.0, 1, 1.0, [2.5, 3.0, 3.5]),
        ]
    )  # fmt: skip
    assert plain.throughput.__dict__ == {"middle": 5 / 3, "least": 1.0, "most": 3.0}
    assert plain.latency == Percentiles(3.0, 4.6, 4.96)
    assert (plain.sent, plain.completed, plain.failed, plain.lost) == (6, 5, {"429 queue_full": 1}, 0)
    assert fast.against_plain.__dict__ == {"middle": 2.5, "least": 1.0, "most": 4.0}
    assert (fast.batch, fast.achieved, fast.behind) == (4.0, 3.0, 0.1)
    assert fast.queued == Percentiles(0.5, 0.5, 0.5) and fast.first_partial is None


def test_a_load_without_a_picture_has_no_times_and_is_written(tmp_path: Path) -> None:
    failed = Outcome("503 unavailable", True, 0.1)
    (summary,) = summarize([Block(1.0, 1.0, 0, 1.0, 0.0, (failed, failed))])
    assert summary.latency is None and summary.throughput.middle == 0 and summary.batch is None
    results, plot = write_load("http://a", load(model="demo"), [summary], tmp_path / "out")
    assert json.loads(results.read_text())["settings"][0]["failed"] == {"503 unavailable": 2}
    assert plot.is_file()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"levels": (1.5,)}, "levels=(1.5,): whole numbers of clients"),
        ({"levels": (0.0,), "mode": "open"}, "levels=(0.0,): rates"),
        ({"levels": (4.0, 4.0)}, "levels=(4.0, 4.0)"),
        ({"speedups": (0.5,)}, "speedups=(0.5,)"),
        ({"speedups": ()}, "speedups=()"),
        ({"rounds": 25}, "rounds=25: no more than the 24 requests"),
        ({"sizes": ("128",)}, "sizes=('128',)"),
        ({"requests": 0}, "requests=0"),
        ({"timeout": math.inf}, "timeout=inf"),
    ],
)
def test_loads_out_of_range_are_refused(settings: dict, names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**settings)
    assert names in str(caught.value)


# -- the command ----------------------------------------------------------------------------------------------------

RUNNER = CliRunner()


def test_the_command_writes_numbers_and_a_plot_and_prints_a_table(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\na star\n")
    out = tmp_path / "out"
    with running() as double:
        words = ["bench", "serve", f"{double.url}/v1/", "--requests", "6", "--rounds", "2", "--concurrency", "1,3"]
        more = ["--warmup", "1", "--prompts", str(prompts), "--sizes", "96x96", "--stream", "--output", str(out)]
        done = RUNNER.invoke(app, [*words, *more, "--api-key", "secret"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert double.keys == {"Bearer secret"}
    assert Counter(body["prompt"] for body in double.bodies).keys() == {"a red apple", "a star"}
    value = json.loads((out / "load.json").read_text())
    assert "secret" not in (out / "load.json").read_text()
    assert [(one["level"], one["speedup"]) for one in value["settings"]] == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert all(one["completed"] == 6 and one["latency"]["p99"] > 0 for one in value["settings"])
    assert value["load"]["model"] == "demo" and value["load"]["sizes"] == ["96x96"]
    with Image.open(out / "latency-throughput.png") as plot:
        assert plot.format == "PNG" and plot.width > 500
    assert done.stdout.count(" 6/6 ") == 4 and "pictures/s" in done.stdout and "denoising" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{out / 'load.json'} {out / 'latency-throughput.png'}"


def test_the_numbers_are_printed_where_they_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddit_rt.serve.write_load", full)
    with running() as double:
        words = ["bench", "serve", double.url, "--requests", "2", "--rounds", "1", "--warmup", "0", "--speedups", "1"]
        done = RUNNER.invoke(app, [*words, "--concurrency", "1", "--output", str(tmp_path)])
    assert isinstance(done.exception, OSError) and " 2/2 " in done.stdout


def test_the_command_ends_with_1_where_requests_are_lost(tmp_path: Path) -> None:
    with running(answers={1: "no object", 2: "queue_full"}) as double:
        words = ["bench", "serve", double.url, "--requests", "4", "--rounds", "1", "--warmup", "0", "--rate", "50"]
        done = RUNNER.invoke(app, [*words, "--speedups", "1", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 1
    assert "1 requests ended neither in a picture nor in an error object" in done.stderr
    assert (
        "1 of 4 failed, 429 queue_full" in done.stdout and "1 of 4 failed, 500 without an error object" in done.stdout
    )


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["127.0.0.1:8000"], "url='127.0.0.1:8000'"),
        (["http://127.0.0.1:9"], "no server answers"),
        (["http://a", "--concurrency", "4", "--rate", "2"], "concurrency='4' and rate='2'"),
        (["http://a", "--concurrency", "0"], "concurrency='0'"),
        (["http://a", "--rate", "x"], "rate='x'"),
        (["http://a", "--speedups", "0"], "speedups=(0.0,)"),
        (["http://a", "--prompts", "none.txt"], "none.txt"),
        (["http://a", "--api-key", "kéy"], "api-key holds 'é'"),
        (["http://a", "--api-key", "key\n"], r"api-key holds '\n'"),
    ],
)
def test_bad_words_are_refused_and_leave_nothing(
    words: list[str], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = RUNNER.invoke(app, ["bench", "serve", *words])
    assert isinstance(done.exception, ConfigError) and names in str(done.exception)
    assert not list(tmp_path.iterdir())
