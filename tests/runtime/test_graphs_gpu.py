"""Captured CUDA graphs against eager execution, on a device."""

import random

import pytest
import torch
from adapters import trained
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs

import ddit_rt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPE = torch.bfloat16


def on_device(name):
    made = {"flux": (flux, flux_inputs), "wan": (wan, wan_inputs)}[name]
    pipe, inputs = made[0](dtype=DTYPE), made[1](dtype=DTYPE)
    pipe.to("cuda")
    return pipe, {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def run(pipe, inputs, **settings):
    with ddit_rt.accelerated(pipe, **settings):
        result = latents_of(pipe, inputs)
        return result, {step.executed for step in ddit_rt.report(pipe).steps}


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive"])
@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_replay_is_eager_execution_bit_for_bit(name, multiple, coarse):
    pipe, inputs = on_device(name)
    settings = {"coarse": coarse, "schedule": [1, 1, *[multiple] * 6]}
    eager, executed = run(pipe, inputs, cuda_graphs=False, **settings)
    assert executed == {"eager"}
    replayed, executed = run(pipe, inputs, cuda_graphs=True, **settings)
    assert executed == {"graph"} and torch.equal(replayed, eager)


@pytest.mark.parametrize("coarse", ["delta", "naive"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_teacache_decides_between_replays(name, coarse):
    pipe, inputs = on_device(name)
    inputs["num_inference_steps"] = 12
    cache = ddit_rt.TeaCacheConfig(0.5, (1.0, 0.0))
    settings = {"coarse": coarse, "schedule": [1, 1, 1, 2, 2, 2, 1, 4, 4, 4, 1, 1], "cache": cache}
    eager, executed = run(pipe, inputs, cuda_graphs=False, **settings)
    replayed, replays = run(pipe, inputs, cuda_graphs=True, **settings)
    assert replays == {"graph" if one == "eager" else one for one in executed}
    assert torch.equal(replayed, eager)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_replay_with_an_adapter_is_eager_execution_bit_for_bit(name, merge):
    pipe, inputs = on_device(name)
    settings = {"adapter": trained(pipe), "merge_adapter": merge, "schedule": [1, 1, 2, 4, 1, 2, 4, 2]}
    eager, _ = run(pipe, inputs, cuda_graphs=False, **settings)
    replayed, executed = run(pipe, inputs, cuda_graphs=True, **settings)
    assert executed == {"graph"} and torch.equal(replayed, eager)


def test_fine_replays_are_the_plain_pipeline_bit_for_bit():
    for name in ("flux", "wan"):
        pipe, inputs = on_device(name)
        plain = latents_of(pipe, inputs)
        assert torch.equal(run(pipe, inputs, threshold=0, cuda_graphs=True)[0], plain)


def test_two_hundred_random_switches():
    pipe, inputs = on_device("flux")
    choice = random.Random(0)
    schedule = [1, 1, *(choice.choice((1, 2, 4)) for _ in range(200))]
    inputs["num_inference_steps"] = len(schedule)
    eager, _ = run(pipe, inputs, schedule=schedule, cuda_graphs=False)
    replayed, executed = run(pipe, inputs, schedule=schedule, cuda_graphs=True)
    assert executed == {"graph"} and torch.equal(replayed, eager)


def test_memory_is_flat_over_fifty_generations():
    pipe, inputs = on_device("flux")
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 4, 1, 2, 4, 2]):
        for _ in range(2):
            latents_of(pipe, inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(50):
            latents_of(pipe, inputs)
        torch.cuda.synchronize()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_restore_gives_the_graphs_memory_back_and_graphs_can_be_captured_anew():
    pipe, inputs = on_device("flux")
    latents_of(pipe, inputs)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        run(pipe, inputs, schedule=[1, 1, 2, 4, 1, 2, 4, 2])
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_change_after_the_capture_shows_in_the_picture():
    pipe, inputs = on_device("flux")
    settings = {"schedule": [1, 1, 2, 4, 1, 2, 4, 2]}
    with ddit_rt.accelerated(pipe, cuda_graphs=True, **settings):
        latents_of(pipe, inputs)
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data * 1.25
        changed = latents_of(pipe, inputs)
    assert torch.equal(changed, run(pipe, inputs, cuda_graphs=False, **settings)[0])


def test_compiled_blocks_inside_graphs():
    pipe, inputs = on_device("flux")
    settings = {"schedule": [1, 1, 2, 4, 1, 2, 4, 2]}
    pipe.transformer.compile_repeated_blocks()
    eager, _ = run(pipe, inputs, cuda_graphs=False, **settings)
    replayed, executed = run(pipe, inputs, cuda_graphs=True, **settings)
    assert executed == {"graph"} and torch.equal(replayed, eager)


def test_the_decision_on_the_device_is_that_of_the_host():
    pipe, inputs = on_device("flux")
    for threshold in (0.05, 0.2, 0.5):
        with ddit_rt.accelerated(pipe, threshold=threshold, order=1):
            latents_of(pipe, inputs)
            for step in ddit_rt.report(pipe).steps:
                coarse = [k for k, sigma in step.patch_std.items() if sigma < threshold]
                assert step.multiple == max(coarse, default=1)


def test_offloading_runs_eagerly():
    pipe, inputs = on_device("wan")
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    assert run(pipe, inputs, schedule=[1, 1, 2, 4, 1, 2, 4, 2])[1] == {"eager"}
