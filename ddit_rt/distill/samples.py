"""Draws training samples from recordings: a step of a trajectory, and the full steps that a coarse one remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..families import Family, ModelInputs
from ..granularity import Geometry, line
from ..trajectories import Shard
from .config import DistillConfig
from .recordings import Library


@dataclass
class Moment:
    """One step of B trajectories.

    Attributes:
        sigma: (B, 1, 1, 1, 1).
        latent, prediction: (B, C, F, H, W); the prediction is the frozen base model's.
    """

    sigma: torch.Tensor
    latent: torch.Tensor
    prediction: torch.Tensor


@dataclass
class Batch:
    """What one micro-step trains on, float32.

    Attributes:
        call: The transformer's arguments, without the latent.
        multiple: Coarse size.
        target: The step to predict.
        memory: Earlier steps, oldest first, at most two.
        delta: Whether the loss is on the change since the last of them.
        exact: Names of arguments that keep the precision they have.
    """

    call: ModelInputs
    multiple: int
    target: Moment
    memory: list[Moment]
    delta: bool
    exact: frozenset[str] = frozenset()

    def forecast(self) -> torch.Tensor:
        """The straight line through the two remembered predictions at the target, float32 (B, C, F, H, W)."""
        older, newest = self.memory
        return line((older.sigma, older.prediction), (newest.sigma, newest.prediction), self.target.sigma)

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On ``device``; what the transformer reads of the call as ``dtype``."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        def moved(moment: Moment) -> Moment:
            return Moment(moment.sigma.to(device), moment.latent.to(device), moment.prediction.to(device))

        call = self.call
        arguments = {
            name: pytree.tree_map_only(
                torch.Tensor, (lambda tensor: tensor.to(device)) if name in self.exact else cast, value
            )
            for name, value in call.arguments.items()
        }
        condition = None if call.condition is None else cast(call.condition)
        references = None if call.references is None else cast(call.references)
        fresh = ModelInputs(arguments, cast(call.latent), condition, call.geometry, call.text_tokens, references)
        memory = [moved(moment) for moment in self.memory]
        return Batch(fresh, self.multiple, moved(self.target), memory, self.delta, self.exact)


_POSITIONS = frozenset({"img_ids", "txt_ids"})
_START = 0.9  # σ above which a recording holds the beginning of a run


def draw(
    library: Library,
    shards: Sequence[int],
    family: Family,
    patch: int,
    config: DistillConfig,
    generator: torch.Generator,
) -> Batch:
    """A random batch.

    Args:
        library: Of recordings.
        shards: Those to draw from.
        family: Of the transformer.
        patch: Its patch size p.
        config: Settings.
        generator: Decides everything.
    """

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    multiple = config.multiples[below(len(config.multiples))]
    delta = config.objective == "delta" or (config.objective == "both" and below(2) == 1)
    blank = float(torch.rand((), generator=generator)) < config.blank
    opened = [library.shard(shards[below(len(shards))]) for _ in range(config.batch)]
    # only a run's first steps have nothing to remember; pictures are recorded from the middle on
    blank = blank and all(float(shard.sigmas[0]) > _START for shard in opened)
    kept = 2 if not blank else int(delta)  # a change needs a step to be counted from
    picks: list[tuple[Shard, int, int, list[int]]] = []
    for shard in opened:
        steps = [_step(shard, kept, config, generator)]
        for _ in range(kept):
            room = len(range(kept - len(steps), steps[-1]))  # leaves a step for each that is still to come
            steps.append(steps[-1] - 1 - below(min(config.max_gap, room)))
        picks.append((shard, below(shard.batch), below(shard.streams), steps))

    def moment(place: int) -> Moment:
        sigma = torch.stack([shard.sigmas[steps[place]] for shard, _, _, steps in picks])
        return Moment(
            sigma.reshape(-1, 1, 1, 1, 1),
            torch.stack([shard.latent(steps[place], index) for shard, index, _, steps in picks]),
            torch.stack([shard.prediction(stream, steps[place], index) for shard, index, stream, steps in picks]),
        )

    target, *memory = (moment(place) for place in range(kept + 1))
    exact = _POSITIONS | {family.time_argument}
    return Batch(_call(picks, target.latent, family, patch), multiple, target, memory[::-1], delta, exact)


def _step(shard: Shard, kept: int, config: DistillConfig, generator: torch.Generator) -> int:
    """A step with ``kept`` others before it."""
    weights = torch.ones(shard.steps)
    if config.timesteps == "sigma":
        weights = (shard.sigmas[:-1] - shard.sigmas[1:]).clamp(min=0)
    if kept:
        weights[: min(kept, shard.steps - 1)] = 0
    else:
        # later, band-split without a remembered picture divides what it cannot know by a small σ
        weights[config.max_gap :] = 0
    return int(torch.multinomial(weights, 1, generator=generator))


def _call(
    picks: Sequence[tuple[Shard, int, int, list[int]]], latent: torch.Tensor, family: Family, patch: int
) -> ModelInputs:
    own = [shard.arguments(stream, index, family.shared_arguments) for shard, index, stream, _ in picks]

    def gathered(name: str) -> torch.Tensor | list[torch.Tensor]:
        values = [one[name] for one in own]
        if name in family.shared_arguments:
            _check_alike(name, values, torch.equal)
            return values[0]
        if name in picks[0][0].lists:
            return values
        _check_alike(name, values, lambda a, b: a.shape == b.shape)
        return torch.stack(values)

    arguments = {name: gathered(name) for name in own[0]} | _plain(picks)
    referring = [shard.references(stream, index) for shard, index, stream, _ in picks]
    _check_alike("reference pictures", referring, lambda a, b: getattr(a, "shape", None) == getattr(b, "shape", None))
    references = None if referring[0] is None else torch.stack([tokens for tokens in referring if tokens is not None])
    conditions = [condition for shard, index, _, _ in picks if (condition := shard.condition(index)) is not None]
    geometry = Geometry(latent.shape[1], latent.shape[2], latent.shape[3], latent.shape[4], patch)
    condition = torch.stack(conditions) if conditions else None
    beside = 0 if references is None else references.shape[1]
    return ModelInputs(arguments, latent, condition, geometry, family.text_tokens(arguments) + beside, references)


def _plain(picks: Sequence[tuple[Shard, int, int, list[int]]]) -> dict[str, Any]:
    """The arguments without tensors."""
    found: dict[str, Any] = {}
    for name in picks[0][0].plain(picks[0][2]):
        values = []
        for shard, index, stream, _ in picks:
            value: Any = shard.plain(stream).get(name)
            one_each = isinstance(value, list) and len(value) == shard.batch
            values.append((value[index], True) if one_each else (value, False))
        _check_alike(name, values, lambda a, b: a == b)
        first, one_each = values[0]
        found[name] = [first] * len(picks) if one_each else first
    return found


def _check_alike(name: str, values: Sequence[Any], alike: Callable[[Any, Any], bool]) -> None:
    """Refuses samples that cannot share a batch.

    Raises:
        ConfigError: naming what differs, and the way out.
    """
    if not all(alike(values[0], value) for value in values[1:]):
        raise ConfigError(
            f"{name}: recordings differ in it, and samples of a batch cannot. Record pictures, references and texts of "
            "one size each, or train with batch=1."
        )
