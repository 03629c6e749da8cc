"""What is computed for full-size runs, and how host gaps are measured."""

import host_gap
import on_paper
import paper_count
import pytest
import torch
from paper_count import KERNEL, Gpu, Operation, rows
from pipe_models import build, flops

from ddit_rt.runtime import GraphRunner

PLAIN = Gpu("made up", processors=4, flops=1e12, bandwidth=1e12)


def product(tiles, flops=1e9):
    """A matrix product of so many tiles of the largest kind."""
    r, c, _ = paper_count.TILES[0]
    return Operation(flops, (r, c * tiles, 1), False, 0.0)


def test_products_take_whole_waves():
    full, one_more = product(4).seconds(PLAIN), product(5).seconds(PLAIN)
    assert full == pytest.approx(1e9 / (1e12 * paper_count.MATMUL))
    assert full * 1.05 < one_more < full * 8 / 5  # as many FLOP on 5 of 8 places, but for smaller tiles
    assert product(5).seconds(PLAIN, waves=False) == pytest.approx(full)


def test_memory_and_launches_bound_the_rest():
    assert Operation(0.0, (0, 0, 0), False, 8e6).seconds(PLAIN) == pytest.approx(8e6 / (1e12 * paper_count.MEMORY))
    assert Operation(0.0, (0, 0, 0), False, 8.0).seconds(PLAIN) == KERNEL
    assert Operation(1.0, (1, 1, 1), True, 8e6).seconds(PLAIN) == pytest.approx(8e6 / (1e12 * paper_count.MEMORY))


@pytest.mark.parametrize("model", ["flux", "wan"])
def test_counts_agree_with_the_packages_own(model):
    found = rows(model)
    own = flops(*build(model, torch.device("meta"), tiny=False))
    for k, row in found.items():
        assert sum(operation.flops for operation in row.operations) == pytest.approx(own[k], rel=0.02)
        assert sum(operation.flops for operation in row.fused) == sum(operation.flops for operation in row.operations)
        assert len(row.fused) < len(row.operations) / 2
        assert sum(o.bytes for o in row.fused) < sum(o.bytes for o in row.operations)
    assert found[1].peak_bytes > found[2].peak_bytes > found[4].peak_bytes > 0
    layers = {"flux": 57, "wan": 60}[model]  # Wan attends to the text, too
    assert all(sum(operation.attention for operation in row.operations) == layers for row in found.values())


def test_two_samples_are_twice_the_work_of_as_many_kernels():
    one, two = rows("wan"), rows("wan", 512, 2)
    for k in (1, 2, 4):
        assert len(two[k].operations) == len(one[k].operations)
        assert sum(o.flops for o in two[k].operations) == 2 * sum(o.flops for o in one[k].operations)
        assert sum(o.bytes for o in two[k].fused) < 2 * sum(o.bytes for o in one[k].fused)  # weights are read once


def test_runs_count_probes():
    gpu = on_paper.GPUS[-1]
    p, coarse = (rows("flux")[k].seconds(gpu, True, True) for k in (1, 2))
    assert on_paper.run_seconds("flux", gpu, (1, 1, 1), True, True) == pytest.approx(3 * p)
    assert on_paper.run_seconds("flux", gpu, (1, 1, 2, 2), True, True) == pytest.approx(2 * p + 4 * coarse)


def test_the_text_goes_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- paper-table -->\nold\n<!-- /paper-table -->\nafter\n")
    assert on_paper.main(["--into", str(page)]) == 0
    found = page.read_text()
    assert found.startswith("before\n") and found.endswith("after\n") and "old" not in found
    assert "not measured" in found and all(found.count(f"| {gpu.name} |") == 2 for gpu in on_paper.GPUS)


def test_host_gaps_are_those_of_steps_that_decided():
    refresh = GraphRunner.refresh
    found, looks = host_gap.gaps("flux", 8)
    assert len(found) == 8 - 3 and len(looks) == 8  # the first decision takes three increments
    assert all(0 < seconds < 1 for seconds in (*found, *looks))
    assert GraphRunner.refresh is refresh
