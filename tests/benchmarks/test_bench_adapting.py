"""How evaluations are shared out among prompts, on made-up scores."""

import adapting
import numpy as np
import pytest


def test_evaluations_go_where_they_are_needed():
    """Of two prompts one is good enough with few evaluations, the other with many only."""
    score = np.array([[30.0, 10.0], [31.0, 20.0], [32.0, 30.0], [33.0, 40.0]])
    assert adapting.allocated(score, 1.0).tolist() == [0, 2]
    assert adapting.allocated(score, 3.0).tolist() == [3, 3]
    alike = np.repeat(score[:, :1], 2, 1)
    assert adapting.allocated(alike, 2.0).tolist() == [2, 2]


def test_a_prompt_is_foretold_from_the_others():
    seen = np.array([1.0, 2.0, 3.0, 4.0])
    curves = np.stack([10 + 2 * seen, 20 + seen])
    assert adapting.learned(curves, seen) == pytest.approx(curves)
    curves[:, 3] = 0.0  # its own values are not looked at
    assert adapting.learned(curves, seen)[:, 3] == pytest.approx([18.0, 24.0])


def test_a_sketch_keeps_the_mean_square_and_is_linear():
    random = np.random.default_rng(1)
    values, others = (random.standard_normal(8 * adapting.NUMBERS).astype(np.float32) for _ in range(2))
    found = adapting.sketch(values)
    assert len(found) == adapting.NUMBERS and np.square(found).mean() == pytest.approx(1.0, rel=0.2)
    assert adapting.sketch(values + others) == pytest.approx(found + adapting.sketch(others), abs=1e-4)


def test_the_worst_tenth_of_24_is_three():
    assert adapting.worst_tenth(np.arange(24.0)) == 1.0
