"""How often one coarse step changes from file to file: what a reader who follows it has to do, too."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import flux, flux_inputs, latents_of

import ddit_rt

PACKAGE = str(Path(ddit_rt.__file__).parent)
ARITHMETIC = str(Path(ddit_rt.__file__).parent / "multiples.py")  # a side and a number of frames: nobody follows it
# a family, what it shares with its kin, and the contract are three of the files; whether kernels run takes two
MOST_FILES, MOST_CHANGES = 22, 72


def files_of_step(pipe, inputs, step):
    """The package's file of every function that is called during one step of an accelerated call, in order."""
    files = []

    def profile(frame, event, arg):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and name != ARITHMETIC:
            files.append(name)

    def watch(pipe, index, timestep, tensors):
        sys.setprofile(profile if index == step - 1 else None)
        return {}

    try:
        latents_of(pipe, {**inputs, "callback_on_step_end": watch})
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("schedule", [[1, 1, 1, 2, 2, 1, 2, 1]])
def test_a_coarse_step_stays_in_few_files(schedule, capsys):
    """The second coarse step in a row, from the first call of the transformer to the end of the scheduler's step."""
    pipe, inputs = flux(), flux_inputs()
    with ddit_rt.accelerated(pipe, schedule=schedule):
        latents_of(pipe, inputs)  # what is computed once, is not a step's
        files = files_of_step(pipe, inputs, 4)
    changes = sum(a != b for a, b in pairwise(files))
    with capsys.disabled():
        print(f"\na coarse step: {len(files)} calls in {len(set(files))} files, {changes} changes of file")
    assert files, "nothing was recorded"
    assert len(set(files)) <= MOST_FILES and changes <= MOST_CHANGES
