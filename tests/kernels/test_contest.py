"""Which of kernel and PyTorch is taken for a problem, with a stopwatch that says what it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_oracle import DEVICE, needs_kernels

from ddit_rt.ops import contest, operations
from ddit_rt.ops.contest import Contest, signature


class Stopwatch:
    """Tells each candidate, in order, the next of the given times."""

    def __init__(self, *times: float) -> None:
        self.left = list(times)

    def __call__(self, candidate: Callable[[], object]) -> float:
        candidate()
        return self.left.pop(0)


def candidates(called: list[str]) -> dict[str, Callable[[], object]]:
    return {name: lambda name=name: called.append(name) for name in ("triton", "torch")}


def test_the_faster_one_wins_and_is_remembered() -> None:
    called: list[str] = []
    judged = Contest(Stopwatch(0.3, 0.2, 0.1, 0.2))
    assert judged.winner("one", candidates(called)) == "torch" and called == ["triton", "torch"]
    assert judged.winner("one", candidates(called)) == "torch" and len(called) == 2
    assert judged.winner("other", candidates(called)) == "triton" and len(called) == 4
    assert judged.results() == {"one": "torch", "other": "triton"}


def test_equals_leave_it_to_the_first() -> None:
    assert Contest(Stopwatch(0.2, 0.2)).winner("one", candidates([])) == "triton"


def test_without_a_measurement_the_first_is_taken_and_nothing_remembered() -> None:
    called: list[str] = []
    judged = Contest(Stopwatch(0.3, 0.2))
    assert judged.winner("one", candidates(called), measurable=False) == "triton" and not called
    assert judged.winner("one", candidates(called)) == "torch"
    assert judged.winner("one", candidates(called), measurable=False) == "torch"


def test_a_problem_is_told_from_another() -> None:
    plain = torch.zeros(2, 4)
    others = [torch.zeros(2, 5), torch.zeros(4, 2).mT, torch.zeros(2, 4, dtype=torch.bfloat16), None]
    assert len({signature(one) for one in (plain, *others)}) == 5
    assert signature(plain, 0.5) == signature(torch.ones(2, 4), 0.7)  # values take no longer


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not contest.measurable(torch.device("cuda")) and contest.measurable(torch.device("cpu"))


@needs_kernels
@pytest.mark.parametrize("times, winner", [((0.1, 0.2), "kernel"), ((0.2, 0.1), "reference")])
def test_operations_ask_for_a_problem_once(monkeypatch: Any, times: tuple[float, float], winner: str) -> None:
    judged = Contest(Stopwatch(*times, *times))
    monkeypatch.setattr(operations, "CONTEST", judged)
    # as on a CUDA device, where "auto" may be either
    monkeypatch.setattr(operations, "resolved", lambda backend, *_: "torch" if backend == "torch" else "triton")
    monkeypatch.delenv("DDIT_BACKEND", raising=False)
    taken: list[str] = []
    for name in ("patch_embed", "patch_deembed"):
        for kind in ("triton", "reference"):
            original = getattr(operations, f"{name}_{kind}")

            def spy(*args: Any, original: Any = original, kind: str = kind) -> Any:
                taken.append("kernel" if kind == "triton" else "reference")
                return original(*args)

            monkeypatch.setattr(operations, f"{name}_{kind}", spy)
    latent, weight = torch.randn(1, 4, 8, 8, device=DEVICE), torch.randn(6, 4, 2, 2, device=DEVICE)
    rows = torch.randn(16, 6, device=DEVICE)

    def both(**options: Any) -> list[str]:
        taken.clear()
        tokens = operations.patch_embed(latent, weight, None, 2, **options)
        operations.patch_deembed(tokens, rows, None, 2, (4, 4), **options)
        return list(taken)

    assert both() == 2 * ["kernel", "reference", winner]  # measured, then the winner
    assert both() == [winner, winner]
    assert both(backend="triton") == ["kernel", "kernel"]  # by name, there is no choice
    monkeypatch.setenv("DDIT_BACKEND", "triton")
    assert both() == ["kernel", "kernel"] and len(judged.results()) == 2
