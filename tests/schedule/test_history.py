import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt.schedule import EvolutionHistory


@given(order=st.integers(1, 3), count=st.integers(0, 7))
def test_keeps_the_newest_increments_newest_first(order, count):
    history = EvolutionHistory(order)
    for value in range(count):
        history.push(torch.tensor([float(value)]))
    assert history.full == (count >= order)
    assert [increment.item() for increment in history.increments] == list(range(count))[::-1][:order]


def test_a_change_of_shape_empties_it():
    history = EvolutionHistory(2)
    history.push(torch.zeros(1, 4))
    history.push(torch.zeros(1, 4))
    history.push(torch.ones(1, 8))
    assert not history.full and len(history.increments) == 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_order_n_history_needs_n_plus_one_latents(order):
    latents = torch.randn(order + 2, 3)
    history = EvolutionHistory(order)
    for step in range(order):
        assert not history.full
        history.push(latents[step + 1] - latents[step])
    assert history.full
    history.clear()
    assert not history.full
