"""Starts SGLang with the plug-in on the demo model, asks it as openai's client does, and checks what comes back.

python tests/engines/sglang_server.py LOG
"""

from __future__ import annotations

import base64
import io
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image

import ddit_rt

MODEL = Path(ddit_rt.__file__).parent / "demo" / "model"
STEPS = 24
SCHEDULE = [1] * 6 + [2, 0, 1, 2, 0, 1, 4, 0, 1, 0, 4, 1, 0, 0, 1, 0, 0, 1]
ASKED: dict[str, Any] = {
    "server's": None,
    "speedup 4": {"speedup": 4},
    "schedule": {"schedule": SCHEDULE},
    "threshold": {"threshold": 0.05},
}


@contextmanager
def server(log: Path, **variables: str) -> Iterator[openai.OpenAI]:
    """A client of a server that is up, and is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("sglang"), "serve", "--model-path", MODEL, "--backend", "diffusers"]
    command += ["--dit-precision", "fp32", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as said:
        # of a session of its own: its workers end with it
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            env={**os.environ, **variables},
            cwd=log.resolve().parent,  # the server keeps pictures where it is started
            start_new_session=True,
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=900)
        for _ in range(300):
            try:
                client.models.list()
                break
            except openai.OpenAIError:
                time.sleep(2)
                assert process.poll() is None, f"the server ended with {process.returncode}; see {log}"
        else:
            raise AssertionError(f"the server did not come up; see {log}")
        yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ask(client: openai.OpenAI, ddit: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture, (H, W, 3) in [0, 1], and what the response says of its steps."""
    own: dict[str, Any] = {"max_sequence_length": 24, "negative_prompt": ""}
    body = {"seed": 3, "generator_device": "cpu", "num_inference_steps": STEPS, "guidance_scale": 0.0}
    made = client.images.generate(
        prompt="zebras behind a fence",
        size="128x128",
        response_format="b64_json",
        output_format="png",
        extra_body={
            **body,
            "true_cfg_scale": 3.0,
            "diffusers_kwargs": own if ddit is None else {**own, "ddit": ddit},
        },
    )
    picture = Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))).convert("RGB")
    return np.asarray(picture, np.float64) / 255, made.model_extra["ddit"]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(((one - other) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def main(log: Path) -> None:
    with server(log, DDIT_SPEEDUP="2.5") as client:
        plain, facts = ask(client, {"speedup": 1})
        assert facts["applied"] and facts["sizes"] == {"p": STEPS, "2p": 0, "4p": 0, "skipped": 0}, facts
        alone = {name: ask(client, ddit) for name, ddit in ASKED.items()}
        for name, (picture, facts) in alone.items():
            print(f"{name}: {facts['sizes']}, {facts['speedup']}x, {psnr(plain, picture):.1f} dB to plain")
            assert facts["applied"] and 15 < psnr(plain, picture) < 60, (name, facts)
        assert 2.3 < alone["server's"][1]["speedup"] < 2.9 and 3.6 < alone["speedup 4"][1]["speedup"] < 4.4
        assert alone["schedule"][1]["steps"] == SCHEDULE
        assert alone["threshold"][1]["sizes"]["4p"] + alone["threshold"][1]["sizes"]["2p"] > 0

        at_once: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        threads = [
            threading.Thread(target=lambda name=name, ddit=ddit: at_once.update({name: ask(client, ddit)}))
            for name, ddit in ASKED.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, (picture, facts) in alone.items():
            assert np.array_equal(at_once[name][0], picture) and at_once[name][1] == facts, name

        for bad, told in (({"speedup": 0.5}, "speedup"), ({"speed": 2}, "speed"), ({"schedule": [1, 0]}, "schedule")):
            try:
                ask(client, bad)
            except openai.BadRequestError as error:
                assert told in error.response.text, error.response.text
            else:
                raise AssertionError(f"{bad} was not refused")
        assert np.array_equal(ask(client, None)[0], alone["server's"][0])
    assert "APPLIED to FluxPipeline of SGLang: speedup=2.5" in log.read_text(), f"see {log}"
    print("SGLang: settings of server and requests, requests at once, refusals: as they should be")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
