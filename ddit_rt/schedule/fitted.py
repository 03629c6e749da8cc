"""A schedule that was fitted to a model, as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True)
class FittedSchedule:
    """A schedule and what it gave.

    Attributes:
        schedule: One multiple per denoising step, 0 for no model call; for ``accelerate(pipe, schedule=...)``.
        speedup: Ratio of FLOP in real runs.
        psnr: Mean, in dB, of real runs to the plain ones, on the prompts of the fit.
        prompts: How many.
        sensitivity: One number per step, by how much the rest of the run multiplies an error made there; empty if the
            schedule was not fitted.
    """

    schedule: list[int]
    speedup: float
    psnr: float
    prompts: int
    sensitivity: list[float] = field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Writes the fields as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> FittedSchedule:
        """Reads what :meth:`save` wrote.

        Raises:
            ConfigError: there is no such file, or something else is in it.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"schedule={str(path)!r}: there is no such file.") from None
        except (TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"schedule={str(path)!r} is not what `ddit-rt fit` writes: {error}.") from None
