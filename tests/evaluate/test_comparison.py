"""Paired comparisons: by hand, against both references, and between methods that cost the same."""

import csv
import statistics

import pytest

from ddit_rt import ConfigError
from ddit_rt.evaluate import Method, Plan, compare, compare_all, summarise, write_comparisons

METHODS = [
    Method("base", "base", 6, 6),
    Method("a", "a", 6, 6, {"threshold": 0.1}),
    Method("b", "b", 6, 6, {"threshold": 0.2}),
    Method("cheap", "c", 6, 6, {"threshold": 0.3}),
]


def rows(count=8, converged=True):
    flops = {"base": 100.0, "a": 50.0, "b": 48.0, "cheap": 30.0}
    found = [{"method": name, "flops": value} for name, value in flops.items()]
    for prompt in range(count):
        for name, gain in {"base": 70.0, "a": 2.0, "b": 0.0, "cheap": -9.0}.items():
            row = {"method": name, "prompt": prompt, "seed": 0, "seconds": 1.0, "reference_seconds": 2.0}
            row["psnr"] = 30.0 + gain + prompt + (0.1 * prompt if name == "a" else 0)
            if converged:
                row["psnr_converged"] = 30.0 - prompt + (1 if name == "base" else 0)
            found.append(row)
    return found


def test_a_comparison_by_hand():
    found = compare(rows(), "a", "b", "psnr")
    assert (found.runs, found.better) == (8, 8)
    assert found.difference == pytest.approx(2.35)
    assert (found.low + found.high) / 2 == pytest.approx(2.35) and found.low > 2
    # 2.365: the 0.975 quantile of Student's t with 7 degrees of freedom
    spread = statistics.stdev(2 + 0.1 * prompt for prompt in range(8))
    assert found.high - found.difference == pytest.approx(2.365 * spread / 8**0.5, rel=1e-3)
    assert found.p == pytest.approx(2 / 2**8), "all eight signs agree"
    back = compare(rows(), "b", "a", "psnr")
    assert (back.difference, back.better, back.p) == (-found.difference, 0, found.p)
    even = compare(rows(), "a", "b", "psnr_converged")
    assert (even.difference, even.p, even.better) == (0.0, 1.0, 0)


def test_what_cannot_be_compared():
    assert compare(rows(1), "a", "b", "psnr") is None and compare(rows(converged=False), "a", "b", "x") is None
    with pytest.raises(ConfigError, match=r"'nope' cannot be compared.* a, b, base, cheap"):
        compare(rows(), "a", "nope", "psnr")


def test_methods_of_equal_flop_meet_by_both_references_and_all_meet_the_plain_one_by_the_converged(tmp_path):
    found = compare_all(summarise(Plan("x", METHODS, ["p"] * 8), rows()), rows())
    assert [(one.first, one.second, one.metric) for one in found] == [
        ("a", "base", "psnr_converged"),
        ("b", "base", "psnr_converged"),
        ("cheap", "base", "psnr_converged"),
        ("a", "b", "psnr"),
        ("a", "b", "psnr_converged"),
    ]
    assert [one.difference for one in found[:3]] == [-1.0] * 3
    lines = list(csv.DictReader(write_comparisons(found, tmp_path).open()))
    assert len(lines) == 5 and float(lines[3]["p"]) == pytest.approx(found[3].p, rel=1e-4)
    old = compare_all(summarise(Plan("x", METHODS, ["p"] * 8), rows(converged=False)), rows(converged=False))
    assert [(one.first, one.second, one.metric) for one in old] == [("a", "b", "psnr")]
