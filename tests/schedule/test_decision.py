import math

import pytest
import torch

from ddit_rt import ops
from ddit_rt.schedule import PendingEvolution


def increments(count=2, shape=(2, 3, 2, 8, 12)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_the_largest_std_of_the_batch_counts():
    given = increments()
    pending = PendingEvolution(given, (1, 2, 4), 2, 0.4, None, "auto")
    each = ops.latent_evolution(given, [2, 4, 8], 0.4)
    assert pending.wait() == pytest.approx({k: each[:, i].max().item() for i, k in enumerate((1, 2, 4))})
    assert pending.wait() == pending.wait()


def test_one_sample_that_is_not_finite_makes_it_nan():
    given = increments()
    given[0][1, 0, 0, 0, 0] = math.inf
    assert all(math.isnan(std) for std in PendingEvolution(given, (1, 2), 2, 0.4, None, "auto").wait().values())


def test_packed_tokens_count_as_the_latent_they_hold():
    packed = increments(shape=(2, 4 * 6, 12))
    latents = [t.reshape(2, 4, 6, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 12) for t in packed]
    a = PendingEvolution(packed, (1, 2, 4), 2, 0.4, (4, 6), "auto").wait()
    assert a == pytest.approx(PendingEvolution(latents, (1, 2, 4), 2, 0.4, None, "auto").wait())
