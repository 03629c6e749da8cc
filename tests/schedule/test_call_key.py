"""The key of a call: the same in every process and version, different where a schedule would not hold."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ddit_rt import ConfigError
from ddit_rt.schedule import CallKey, describe_machine, describe_scheduler

KEY = CallKey("0123456789abcdef0123456789abcdef", "Euler(shift=3)", 50, "cfg", 4096, 1, "converged")


def of(**changes):
    values = {"model": "0" * 32, "scheduler": FlowMatchEulerDiscreteScheduler(), "steps": 50, "guided": False}
    return CallKey.of(**{**values, "tokens": 256, **changes})


def test_a_known_key_has_a_known_folder():
    # schedules in users' stores are found by it: it stays what it is
    assert str(KEY.directory) == "0123456789abcdef0123456789abcdef/50-cfg-4096x1-converged-a73737c03c41f85f"


def test_folders_are_safe_and_differ():
    keys = [KEY, of(), of(guided=True), of(frames=21), of(adapter="a" * 32), of(tokens=100), of(steps=28)]
    names = {str(key.directory) for key in keys}
    assert len(names) == len(keys)
    assert all(re.fullmatch(r"[0-9a-f]+/[0-9a-z-]+", name) and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("count", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 4), (181, 128), (182, 256), (256, 256), (362, 256), (363, 512)]
)
def test_sizes_go_to_the_nearest_power_of_two(count, bucket):
    assert of(tokens=count).tokens == bucket and of(frames=count).frames == bucket


def test_sizes_are_shown_for_people():
    assert of(tokens=4000).size == "4096" and of(tokens=1560, frames=21).size == "2048x16"


def test_a_scheduler_is_its_class_and_what_places_the_noise_levels():
    text = describe_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert text == (
        "FlowMatchEulerDiscreteScheduler(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, "
        "max_shift=1.15, num_train_timesteps=1000, shift=3, time_shift_type='exponential')"
    )
    assert text == describe_scheduler(FlowMatchEulerDiscreteScheduler(shift=3))
    different = [
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1),
        UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
        UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0),
    ]
    assert len({text, *map(describe_scheduler, different)}) == 5


def test_a_shift_set_later_counts_and_a_setting_that_is_off_does_not():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(3.0)
    scheduler.register_to_config(use_lu_lambdas=False, sigma_max=None, _name_or_path="somewhere", unrelated=1)
    assert describe_scheduler(scheduler) == describe_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(model="../../etc"), r"model='\.\./\.\./etc': 8 to 64 hexadecimal"),
        (lambda: of(adapter="x"), "adapter='x'"),
        (lambda: of(steps=0), "steps=0: a number of denoising steps"),
        (lambda: of(steps=True), "steps=True"),
        (lambda: of(tokens=0), "tokens=0: a number of tokens, at least 1"),
        (lambda: of(frames=1.5), "frames=1.5"),
        (lambda: of(reference="exact"), "reference='exact': use one of 'plain', 'converged'"),
        (lambda: CallKey("0" * 8, "E()", 4, "both", 4, 1), "guidance='both': use one of 'none', 'cfg'"),
        (lambda: CallKey("0" * 8, "E()", 4, "cfg", 3, 1), r"tokens=3: a power of two; CallKey\.of"),
        (lambda: CallKey("0" * 8, "", 4, "cfg", 4, 1), "scheduler='': a text"),
        (
            lambda: CallKey("0" * 8, "E()", 4, "cfg", 4, 1, costs="euros"),
            "costs='euros': use one of 'flops', 'seconds'",
        ),
        (lambda: CallKey("0" * 8, "E()", 4, "cfg", 4, 1, costs="seconds"), "machine='': a text"),
        (lambda: CallKey("0" * 8, "E()", 4, "cfg", 4, 1, machine="a GPU"), "machine='a GPU': a text"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_seconds_are_those_of_a_machine():
    here = describe_machine(torch.device("cpu"))
    assert here.startswith("cpu ") and here.endswith(f"{torch.get_num_threads()} threads")
    by_clock = of(machine=here)
    assert by_clock.costs == "seconds" and of().costs == "flops"
    assert len({of().directory, by_clock.directory, of(machine="another").directory}) == 3
