"""What coarse runs tell beyond earlier steps: answers that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prompted import CALL, prompted

from ddit_rt import ConfigError
from ddit_rt.evaluate import CoarseNews, coarse_news, news

PROMPTS = ("a", "pear", "two", "quinces")
STEPS = 8


def found(monkeypatch: pytest.MonkeyPatch, runs: Callable[[torch.Tensor], torch.Tensor]) -> CoarseNews:
    """With coarse runs that say what ``runs`` makes of the full prediction's low band."""

    def predictions(pipe: Any, trajectory: Any, multiple: int, keep: Callable[..., Any]) -> tuple[list[Any], float]:
        return [runs(keep(trajectory.canonical(output))) for output in trajectory.outputs], 0.25

    monkeypatch.setattr(news, "coarse_predictions", predictions)
    (line,) = coarse_news(prompted(), PROMPTS, [2], [2], {**CALL, "num_inference_steps": STEPS})
    assert (line.multiple, line.distance, line.runs, line.steps, line.cost) == (2, 2, 4, STEPS - 6, 0.25)
    return line


def test_a_coarse_run_that_knows_all_but_an_offset_tells_all(monkeypatch: pytest.MonkeyPatch) -> None:
    line = found(monkeypatch, lambda low: low + 3)
    assert line.news > 0.999 and line.delta < 1e-5 and line.earlier > 0.1
    # of half the size, it tells as much to who may weigh it
    line = found(monkeypatch, lambda low: low / 2)
    assert line.news > 0.999 and line.delta > 0.1


def test_a_coarse_run_of_noise_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    line = found(monkeypatch, lambda low: torch.randn(low.shape, generator=generator))
    # weights found on other prompts: what they fit by chance counts against them
    assert abs(line.news) < 0.1 and line.delta > line.earlier


def test_the_best_of_earlier_predictions_beats_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    line = found(monkeypatch, lambda low: low)
    assert line.earlier < 1.5 and line.unchanged > line.earlier


def test_too_little_to_go_by_is_refused() -> None:
    call = {**CALL, "num_inference_steps": STEPS}
    for prompts, distances, message in (
        (["a"], [1], "1 prompt: give two at least"),
        (PROMPTS, [0], r"distances=\[0\]: 0 is below 1"),
        (PROMPTS, [3], "distance 3: too far apart in 8 steps, which take 2 at most"),
    ):
        with pytest.raises(ConfigError, match=message):
            coarse_news(prompted(), prompts, [2], distances, call)
