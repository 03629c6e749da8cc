"""A schedule that was fitted to a model, as a file and on the Hugging Face hub."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import ConfigError, DDiTError, ScheduleError
from ..hub import find_file, push_file
from ..multiples import ALL_MULTIPLES, SKIP
from ..settings import read_text, shown
from .policy import FixedSchedule, StepView

FILE_NAME = "schedule.json"


@dataclass(frozen=True)
class FittedSchedule:
    """A schedule and what it gave; ``accelerate(pipe, schedule=...)`` takes the object, and the path of its file.

    Attributes:
        schedule: One multiple per denoising step, 0 for no model call.
        speedup: Ratio of FLOP in real runs.
        psnr: Mean, in dB, of real runs to the plain ones, on the prompts of the fit; 100 for an equal picture.
            In files of earlier versions it may be infinite.
        prompts: How many.
        sensitivity: One number per step, by how much the rest of the run multiplies an error made there; empty if the
            schedule was not fitted.
        sigmas: Noise levels of the steps and the one after them, where the fit moved them; empty to keep the
            scheduler's.
        reference: What the schedule aims at, ``"plain"`` or ``"converged"``.
        psnr_converged: Mean, in dB, of the same runs to the converged pictures; None where that was not measured.
        seconds_speedup: Ratio of the steps' seconds, where the fit counted those and not FLOP, on the machine that it
            was made on; else None.

    Raises:
        ScheduleError: ``schedule`` is empty, or holds something that is no multiple.
        ConfigError: another value is out of range.
    """

    # of the check in load(): a file holds these fields and no others, each of its own type
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    schedule: list[int]
    speedup: float
    psnr: float
    prompts: int
    sensitivity: list[float] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    reference: str = "plain"
    psnr_converged: float | None = None
    seconds_speedup: float | None = None

    def __post_init__(self) -> None:
        if not self.schedule:
            raise ScheduleError("schedule=[]: give one multiple per denoising step.")
        for index, multiple in enumerate(self.schedule):
            if multiple not in (SKIP, *ALL_MULTIPLES):
                raise ScheduleError(
                    f"schedule[{index}]={shown(multiple)} is none of {ALL_MULTIPLES}, nor {SKIP} for no model call."
                )
        if not 0 < self.speedup < math.inf:
            raise ConfigError(f"speedup={shown(self.speedup)}: a ratio of FLOP, above 0.")
        if self.seconds_speedup is not None and not 0 < self.seconds_speedup < math.inf:
            raise ConfigError(f"seconds_speedup={shown(self.seconds_speedup)}: a ratio of seconds, above 0, or null.")
        if math.isnan(self.psnr) or self.psnr == -math.inf:
            raise ConfigError(f"psnr={self.psnr}: a number of dB, or inf for an equal picture.")
        if not 0 <= self.prompts < 2**31:
            raise ConfigError(f"prompts={shown(self.prompts)}: a number of prompts, at least 0.")
        if self.sensitivity and len(self.sensitivity) != len(self.schedule):
            raise ConfigError(
                f"sensitivity has {len(self.sensitivity)} entries, schedule has {len(self.schedule)}: one per step, or "
                "none."
            )
        for index, gain in enumerate(self.sensitivity):
            if not 0 <= gain < math.inf:
                raise ConfigError(f"sensitivity[{index}]={shown(gain)}: a factor, at least 0.")
        self._check_levels()

    def _check_levels(self) -> None:
        if self.reference not in ("plain", "converged"):
            raise ConfigError(f"reference={shown(self.reference)}: use 'plain' or 'converged'.")
        if self.psnr_converged is not None and math.isnan(self.psnr_converged):
            raise ConfigError("psnr_converged=nan: a number of dB, or null.")
        if not self.sigmas:
            return
        if len(self.sigmas) != len(self.schedule) + 1:
            raise ConfigError(
                f"sigmas has {len(self.sigmas)} entries, schedule has {len(self.schedule)}: one per step and the one "
                "after the last, or none."
            )
        if self.reference == "plain":
            raise ConfigError("sigmas with reference='plain': the plain pipeline's noise levels are not moved.")
        for index, level in enumerate(self.sigmas):
            if not 0 <= level <= (self.sigmas[index - 1] if index else 1.0):
                raise ConfigError(f"sigmas[{index}]={shown(level)}: noise levels fall, from 1 at most to 0.")
        if self.sigmas[0] == self.sigmas[-1]:
            raise ConfigError(f"sigmas: all of them are {shown(self.sigmas[0])}, and nothing would be denoised.")

    # -- as a policy ----------------------------------------------------------------------------------------------

    def start(self, steps: int) -> None:
        """Raises:
        ScheduleError: the schedule has another length, or begins with a skipped step.
        """
        FixedSchedule(self.schedule).start(steps)

    def choose(self, step: StepView) -> int:
        """The multiple of a step."""
        return self.schedule[step.index]

    def place(self, sigmas: Sequence[float]) -> Sequence[float]:
        """The schedule's own noise levels, or those given."""
        return self.sigmas if len(self.sigmas) == len(sigmas) else sigmas

    # -- as a file ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes the fields as JSON.

        Args:
            path: The file, or an existing directory for ``schedule.json`` inside it.

        Returns:
            The file's path.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> FittedSchedule:
        """Reads what :meth:`save` or :meth:`push_to_hub` wrote, checking every value.

        Args:
            source: Path of a file, of a directory that holds ``schedule.json``, or a Hugging Face hub id
                ``owner/name``.
            revision: Of the hub repository.

        Raises:
            ConfigError: there is no such file, it is too large, or something else is in it.
            ScheduleError: its schedule holds something that is no multiple.
        """
        path = find_file(source, FILE_NAME, revision, "schedule", ConfigError)
        text = read_text(path, "schedule")
        try:
            return _FILE.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            own = first.get("ctx", {}).get("error")
            if isinstance(own, DDiTError):
                raise type(own)(f"schedule={str(path)!r}: {own}") from None
            place = "".join(f"{part}: " for part in first["loc"])
            raise ConfigError(
                f"schedule={str(path)!r} is not what `ddit-rt fit` writes: {place}{first['msg']}."
            ) from None

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the schedule with a card to the Hugging Face hub, creating the repository if need be.

        Args:
            repo_id: ``owner/name``; :meth:`load` takes it.
            private: For a new repository.
            token: Of the hub; None takes the one logged in with.

        Returns:
            The commit's address.
        """
        return push_file(repo_id, self.save, self._card(repo_id), "ddit_rt schedule", private, token)

    def _card(self, repo_id: str) -> str:
        return f"""---
library_name: ddit_rt
tags: [ddit, diffusion, acceleration]
---

# DDiT schedule of {len(self.schedule)} steps

Says at which patch size each denoising step runs (DDiT, arXiv 2602.16968): {self.speedup:.2f}x fewer FLOP than the
plain pipeline at {self.psnr:.1f} dB PSNR to it, mean of {self.prompts} prompts.

```python
schedule = ddit_rt.FittedSchedule.load("{repo_id}")
ddit_rt.accelerate(pipe, schedule=schedule)
```
"""


_FILE = TypeAdapter(FittedSchedule)
