"""What a fitted schedule holds for: a model, a scheduler, and a kind of call."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict

from ..errors import ConfigError
from ..settings import is_whole, shown

Guidance = Literal["none", "cfg"]
Reference = Literal["plain", "converged"]
Costs = Literal["flops", "seconds"]

# what places the noise levels, and how a step goes from one to the next; a flow has no betas
_SCHEDULER_SETTINGS = frozenset(
    {
        *("num_train_timesteps", "timestep_spacing", "steps_offset", "shift", "flow_shift", "shift_terminal"),
        *("use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"),
        *("base_image_seq_len", "max_image_seq_len", "invert_sigmas", "sigma_min", "sigma_max", "final_sigmas_type"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas"),
        *("prediction_type", "algorithm_type", "solver_order", "solver_type", "predict_x0"),
        *("lower_order_final", "euler_at_final", "stochastic_sampling", "disable_corrector"),
    }
)
_HEX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class CallKey:
    """What has to be the same for a schedule to be used again; made by :meth:`of`.

    Prompts, seeds, the guidance scale and small changes of size are not in it: a schedule serves them all.

    Attributes:
        model: Fingerprint of the transformers, hexadecimal (``ddit_rt.families.fingerprint``).
        scheduler: As :func:`describe_scheduler` writes it.
        steps: Denoising steps that the call makes.
        guidance: "cfg" where the transformer runs twice a step, else "none".
        tokens: Of one latent frame, to the nearest power of two.
        frames: Of the latent, to the nearest power of two; 1 for pictures.
        reference: What the schedule was fitted to stay near to, the "plain" or the "converged" pictures.
        adapter: Fingerprint of the adapter that coarse steps run, empty without one.
        costs: What a speed-up is a ratio of: "flops", or "seconds" of the steps.
        machine: With "seconds", what they were measured on, as :func:`describe_machine` writes it; else empty.

    Raises:
        ConfigError: a value is out of range.
    """

    # of files: these fields and no others, each of its own type
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    model: str
    scheduler: str
    steps: int
    guidance: Guidance
    tokens: int
    frames: int
    reference: Reference = "plain"
    adapter: str = ""
    costs: Costs = "flops"
    machine: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "adapter"):
            text = getattr(self, name)
            # it becomes the name of a folder
            if not (name == "adapter" and text == "") and not (isinstance(text, str) and _HEX.fullmatch(text)):
                raise ConfigError(f"{name}={shown(text)}: 8 to 64 hexadecimal digits, as fingerprint() gives them.")
        if not isinstance(self.scheduler, str) or not self.scheduler:
            raise ConfigError(f"scheduler={shown(self.scheduler)}: a text, as describe_scheduler() gives it.")
        if not is_whole(self.steps) or not 0 < self.steps < 2**31:
            raise ConfigError(f"steps={shown(self.steps)}: a number of denoising steps, at least 1.")
        listed = {"guidance": get_args(Guidance), "reference": get_args(Reference), "costs": get_args(Costs)}
        for name, choices in listed.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: use one of {', '.join(map(repr, choices))}.")
        if not isinstance(self.machine, str) or (self.costs == "seconds") is not bool(self.machine):
            raise ConfigError(
                f"machine={shown(self.machine)}: a text, as describe_machine() gives it, with costs='seconds' alone."
            )
        for name in ("tokens", "frames"):
            count = getattr(self, name)
            if not is_whole(count) or not 0 < count < 2**31 or count & (count - 1):
                raise ConfigError(f"{name}={shown(count)}: a power of two; CallKey.of() rounds to one.")

    @classmethod
    def of(
        cls,
        model: str,
        scheduler: Any,
        steps: int,
        *,
        guided: bool,
        tokens: int,
        frames: int = 1,
        reference: Reference = "plain",
        adapter: str = "",
        machine: str = "",
    ) -> CallKey:
        """The key of a call.

        Args:
            model, steps, reference, adapter, machine: As the attributes; with a machine its seconds count, else FLOP.
            scheduler: The pipeline's.
            guided: Whether the transformer runs twice a step.
            tokens: Of one latent frame, any number.
            frames: Of the latent, any number.

        Raises:
            ConfigError: a value is out of range.
        """
        return cls(
            model=model,
            scheduler=describe_scheduler(scheduler),
            steps=steps,
            guidance="cfg" if guided else "none",
            tokens=_power_of_two(tokens, "tokens"),
            frames=_power_of_two(frames, "frames"),
            reference=reference,
            adapter=adapter,
            costs="seconds" if machine else "flops",
            machine=machine,
        )

    @property
    def size(self) -> str:
        """The size class, for people: "256" tokens, or "1024x16" for a video."""
        return f"{self.tokens}" if self.frames == 1 else f"{self.tokens}x{self.frames}"

    @property
    def directory(self) -> PurePosixPath:
        """Where schedules with this key are kept below a store's root: letters, digits and hyphens, two levels.

        Readable in part; a hash of all fields ends it, the same in every process and version of Python.
        """
        values = asdict(self)
        if self.costs == "flops":  # keys had no costs at first, and folders keep their names
            del values["costs"], values["machine"]
        text = json.dumps(values, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        kind = f"{self.steps}-{self.guidance}-{self.tokens}x{self.frames}-{self.reference}-{digest}"
        return PurePosixPath(self.model, kind)


def describe_scheduler(scheduler: Any) -> str:
    """A scheduler's class and those of its settings that decide the noise levels and how it steps between them.

    Settings that are off or unset are left out, so that one which a newer diffusers adds and leaves off changes
    nothing. A shift that was set after construction counts.

    Args:
        scheduler: Of diffusers.
    """
    settings = dict(scheduler.config)
    if "shift" in settings:
        settings["shift"] = vars(scheduler).get("_shift", settings["shift"])  # set_shift() leaves the config alone
    chosen = {name: value for name, value in settings.items() if name in _SCHEDULER_SETTINGS}
    texts = [
        f"{name}={_plain(value)!r}"
        for name, value in sorted(chosen.items())
        if value is not None and value is not False and value != []
    ]
    return f"{type(scheduler).__name__}({', '.join(texts)})"


def describe_machine(device: torch.device) -> str:
    """What seconds depend on, as far as it has a name: the GPU's, or the processor's and how many threads run on it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    return f"{device.type} {name}, {torch.get_num_threads()} threads"


def _plain(value: Any) -> Any:
    """3.0 and 3 are one value: configurations that went through a file have either."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _power_of_two(count: int, name: str) -> int:
    """The nearest power of two by ratio, computed without rounding."""
    if not is_whole(count) or count < 1:
        raise ConfigError(f"{name}={shown(count)}: a number of {name}, at least 1.")
    count = int(count)
    below = 1 << (count.bit_length() - 1)
    return below if count * count < 2 * below * below else 2 * below
