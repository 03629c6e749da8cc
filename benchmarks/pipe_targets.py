"""What the pipelines' figures are held against: the best that others have published, and the project's own targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A published time of the usual run (FLUX.1-dev 28 steps, Wan 2.1 1.3B 50 steps) on one GPU.

    Attributes:
        gpu: As it is part of the device's name.
        seconds: Of a request.
        to_beat: The best on that GPU.
        whole: Encoders and decoder included.
    """

    gpu: str
    seconds: float
    what: str
    to_beat: bool = False
    whole: bool = True


RECORDS = {
    "flux": (
        Record("H200", 5.58, "stock diffusers"),
        Record("H200", 4.32, "compiled"),
        Record("H200", 3.50, "native FA3, compiled"),
        Record("H200", 2.38, "SGLang with a step cache", to_beat=True),
        Record("H100", 4.30, "xDiT, compiled"),
        Record("H100", 3.55, "FP8 (lora-fast)"),
        Record("H100", 2.43, "FP8, denoising only", to_beat=True, whole=False),
    ),
    "wan": (
        Record("H200", 58.0, "plain"),
        Record("H200", 17.9, "TeaCache"),
        Record("H200", 16.6, "LightX2V with its own cache", to_beat=True),
    ),
}
RATIOS = {"flux": {"2": 3.2, "4": 6.0}, "wan": {"2": 7.0, "4": 20.0}}  # ms of a step at p over that at the size
SWITCH, GRAPHS_GIB, GAP_US = 1.01, 2.0, 50.0


@dataclass(frozen=True)
class Verdict:
    """One target: ``met`` is None where it was not measured."""

    text: str
    value: float | None
    met: bool | None

    def __str__(self) -> str:
        state = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"{state}: {self.text}" + ("" if self.value is None else f": {self.value:.3g}")


def find(rows: list[Row], provider: str, schedule: str, steps: int | None = None) -> Row | None:
    """The measured row; without ``steps`` the one with fewest."""
    found = [row for row in rows if (row["provider"], row["schedule"]) == (provider, schedule) and "wall_s" in row]
    found = [row for row in found if steps in (None, row["steps"])]
    return min(found, key=lambda row: row["steps"], default=None)


def repeating_ms(rows: list[Row], provider: str, size: str) -> float | None:
    """Median milliseconds of a step, in a run of nothing else."""
    row = find(rows, provider, "p" if size == "1" else f"{size}p")
    return None if row is None else row["step_ms"]["repeating"][size]["median"]


def quickest(rows: list[Row], steps: int) -> Row | None:
    """The mixed run of the quickest provider that makes one picture."""
    found = [row for row in rows if (row["schedule"], row["steps"]) == ("mixed", steps) and "wall_s" in row]
    single = [row for row in found if "batch" not in row["provider"]]
    return min(single, key=lambda row: row["wall_s"]["median"], default=None)


def ends_s(rows: list[Row]) -> float | None:
    """Seconds of text encoders and decoder; None where not both were measured."""
    found = {row["schedule"]: row["wall_s"]["median"] for row in rows if row["provider"] == "ends" and "wall_s" in row}
    return sum(found.values()) if len(found) == 2 else None


def _verdict(text: str, value: float | None, meets: Callable[[float], bool]) -> Verdict:
    return Verdict(text, value, None if value is None else meets(value))


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _field(row: Row | None, *names: str) -> Any:
    value: Any = row
    for name in names:
        value = None if value is None else value.get(name)
    return value


def verdicts(model: str, gpu: str, steps: int, rows: list[Row]) -> list[Verdict]:
    """All targets of a model.

    Args:
        model: Key of :data:`RECORDS`.
        gpu: Name of the device; a record counts on its own kind only.
        steps: Of the model's usual run.
        rows: What was measured.
    """
    ours = "ours+graphs"
    found = []
    for size, limit in RATIOS[model].items():
        ratio = _over(repeating_ms(rows, ours, "1"), repeating_ms(rows, ours, size))
        found.append(_verdict(f"a step at {size}p at least {limit:g} times as fast as at p", ratio, limit.__le__))
    switching = find(rows, ours, "switching")
    for size in ("1", "2", "4"):
        times = [_field(switching, "step_ms", kind, size, "median") for kind in ("switching", "repeating")]
        text = (
            f"a step that switches to {'p' if size == '1' else f'{size}p'} over one that repeats it, at most {SWITCH}"
        )
        found.append(_verdict(text, _over(*times), SWITCH.__ge__))
    memory = [_field(find(rows, provider, "mixed", steps), "peak_gib") for provider in (ours, "ours")]
    found.append(_verdict(f"graphs add at most {GRAPHS_GIB:g} GiB", _minus(*memory), GRAPHS_GIB.__ge__))
    gaps = [
        _field(find(rows, provider, schedule), "gap_us", "median")
        for provider, schedule in ((ours, "decided"), ("stock", "p"))
    ]
    text = f"between model runs of two steps at most {GAP_US:g} us more than the plain pipeline, decision included"
    found.append(_verdict(text, _minus(*gaps), GAP_US.__ge__))
    denoising = _field(quickest(rows, steps), "wall_s", "median")
    request = _plus(denoising, ends_s(rows))
    for record in RECORDS[model]:
        if record.to_beat and record.gpu in gpu:
            text = f"{steps} steps in less than {record.seconds:g} s ({record.what}, {record.gpu})"
            found.append(_verdict(text, request if record.whole else denoising, record.seconds.__gt__))
    return found
