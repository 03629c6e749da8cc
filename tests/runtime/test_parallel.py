"""Context parallelism on two processes: one decision, the result of one process."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

WORKER = """
import json, sys, torch
from diffusers import ContextParallelConfig
from specimens import SPECIMENS
from tiny import latents_of
import ddit_rt

rank, wanted = int(sys.argv[1]), torch.load(sys.argv[2])
torch.accelerator.device_count = lambda: 2  # diffusers counts accelerators, and a CPU is none
torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
found = {}
for name, (specimen, settings, inputs, more, latents) in wanted.items():
    pipe = SPECIMENS[specimen].make()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    # left to itself, the second rank would keep every step full
    ddit_rt.accelerate(pipe, **{**settings, **({"threshold": 1e-12} if rank else {})})
    result = latents_of(pipe, {**SPECIMENS[specimen].arguments(**inputs), **more})
    steps = ddit_rt.report(pipe).steps
    found[name] = ([s.multiple for s in steps], steps[-1].note, float((result - latents).abs().max()))
if rank == 1:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def single(specimen, settings, inputs, more, monkeypatch):
    """On one process, with coarse grids as two ranks have them."""
    from specimens import SPECIMENS
    from tiny import latents_of

    import ddit_rt
    from ddit_rt.pipeline import accelerated_pipeline

    def for_two(module, inputs):
        return replace(inputs, geometry=replace(inputs.geometry, ranks=2))

    monkeypatch.setattr(accelerated_pipeline, "divided", for_two)
    pipe = ddit_rt.accelerate(SPECIMENS[specimen].make(), **settings)
    result = latents_of(pipe, {**SPECIMENS[specimen].arguments(**inputs), **more})
    return ddit_rt.report(pipe).schedule, result


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_follow_the_first_and_give_what_one_process_gives(tmp_path, monkeypatch):
    always = {"threshold": 1e9, "order": 1, "max_consecutive_coarse": None}
    # texts are split too, and have an even number of tokens
    flux, qwen = {"prompt_embeds": torch.ones(1, 6, 24)}, {"prompt_embeds": torch.ones(1, 6, 12)}
    qwen["prompt_embeds_mask"] = torch.ones(1, 6, dtype=torch.long)
    centred = {**always, "positions": "interpolated"}
    runs = {
        "delta": ("flux", always, {"steps": 4}, flux),
        # 36 full tokens, 9 at 2p, which are padded to 12
        "odd": ("flux", {**always, "multiples": (1, 2)}, {"steps": 3, "height": 48, "width": 48}, flux),
        "naive": ("flux", {**always, "coarse": "naive"}, {"steps": 3}, flux),
        "flux, centred": ("flux", centred, {"steps": 4}, flux),
        # these make positions inside
        "wan": ("wan", always, {"steps": 4}, {}),
        "wan, centred": ("wan", centred, {"steps": 4}, {}),
        "qwen": ("qwen-image", always, {"steps": 4}, qwen),
        "qwen, centred": ("qwen-image", centred, {"steps": 4}, qwen),
    }
    full = {"naive"}
    alone = {
        name: single(specimen, {"threshold": 0} if name in full else settings, inputs, more, monkeypatch)
        for name, (specimen, settings, inputs, more) in runs.items()
    }
    torch.save({name: (*runs[name], alone[name][1]) for name in runs}, tmp_path / "wanted.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", WORKER]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "wanted.pt")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], results[1][1][-3000:] + results[0][1][-3000:]
    found = json.loads(results[1][0].splitlines()[-1])
    for name in ("delta", "flux, centred", "wan", "wan, centred", "qwen", "qwen, centred"):
        assert found[name][0] == alone[name][0] == [1, 4, 4, 4] and found[name][1] == ""
    assert found["odd"][0] == alone["odd"][0] == [1, 2, 2] and found["odd"][1] == ""
    assert found["naive"][0] == [1, 1, 1] and "context parallelism" in found["naive"][1]
    assert max(difference for *_, difference in found.values()) < 1e-5
