import json
import math
import warnings

import pytest
from PIL import Image

from ddit_rt import DDiTConfig, Report, StepRecord


def report(*multiples, complete=True, **fields):
    steps = [
        StepRecord(i, 1e3 - i, 1 - i / 10, k, 64 // (k * k or 1), flops=1e9 / (k * k or 1), full_flops=1e9, **fields)
        for i, k in enumerate(multiples)
    ]
    return Report(steps, DDiTConfig().to_dict(), complete)


def test_speedup_is_fine_flops_over_flops():
    assert report(1, 2, 4).speedup_estimate == pytest.approx(3 / (1 + 1 / 4 + 1 / 16))
    assert Report([], {}).speedup_estimate == 1.0


def test_schedule_lists_the_multiples():
    assert report(1, 2, 4, 1).schedule == [1, 2, 4, 1]


def test_json_is_valid_with_nan_and_infinity():
    text = report(1, 2, patch_std={1: math.nan, 2: math.inf, 4: 0.5}).to_json()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["steps"][0]["patch_std"] == {"1": None, "2": None, "4": 0.5}
    assert values["complete"] is True and values["config"]["multiples"] == [1, 2, 4]


def test_json_goes_to_a_file_too(tmp_path):
    path = tmp_path / "report.json"
    assert report(1).to_json(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("schedule", [None, [1, 2, 4], lambda index, patch_std: 1], ids=["policy", "fixed", "callable"])
def test_every_config_can_be_written(schedule):
    config = DDiTConfig(schedule=schedule, cache="teacache").to_dict()
    assert json.loads(Report([], config).to_json())["config"]["cache"].startswith("TeaCacheConfig")


def test_to_dict_has_every_field_of_a_step():
    (step,) = report(2, note="why").to_dict()["steps"]
    assert set(step) == {
        "index", "timestep", "sigma", "multiple", "tokens", "patch_std", "flops", "full_flops", "executed", "note",
        "kernels", "missed", "seconds",
    }  # fmt: skip


def test_str_is_a_table_of_all_steps():
    lines = str(report(1, 2, 4, patch_std={1: 0.1, 2: 0.2, 4: 0.3}, note="why")).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert "σ_2p" in lines[0] and "2p" in lines[2] and "2.00e-01" in lines[2] and "why" in lines[2]
    assert lines[-1].startswith("3 steps (1 at p, 1 at 2p, 1 at 4p)") and "did not finish" not in lines[-1]
    assert "did not finish" in str(report(1, complete=False))
    assert str(Report([], {}))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_writes_an_image(tmp_path, suffix):
    path = report(1, 2, 4, 1, patch_std={1: 1e-3, 2: 2e-3, 4: math.nan}).plot(tmp_path / f"plot.{suffix}")
    if suffix == "png":
        assert Image.open(path).size[0] > 100
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("multiples", [(1, 1), (), (0, 1, 4)])
def test_plot_draws_every_report_without_a_warning(tmp_path, multiples):
    drawn = report(*multiples)
    drawn.config["threshold"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn.plot(str(tmp_path / "plot.png"))
