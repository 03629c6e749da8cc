"""Draws training samples from recordings: a step of a trajectory, and the full steps that a coarse one remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """

    call: ModelInputs
    multiple: int
    target: Moment
    memory: list[Moment]
    delta: bool

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
            # positions and timesteps keep the precision they have
            name: value.to(device) if name in _EXACT or not isinstance(value, torch.Tensor) else cast(value)
            for name, value in call.arguments.items()
        }
        condition = None if call.condition is None else cast(call.condition)
        fresh = ModelInputs(arguments, cast(call.latent), condition, call.geometry, call.text_tokens)
        return Batch(fresh, self.multiple, moved(self.target), [moved(moment) for moment in self.memory], self.delta)


_EXACT = frozenset({"timestep", "img_ids", "txt_ids"})
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
    return Batch(_call(picks, target.latent, family, patch), multiple, target, memory[::-1], delta)


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
    arguments = {
        name: value if name in family.shared_arguments else torch.stack([one[name] for one in own])
        for name, value in own[0].items()
    }
    conditions = [condition for shard, index, _, _ in picks if (condition := shard.condition(index)) is not None]
    geometry = Geometry(latent.shape[1], latent.shape[2], latent.shape[3], latent.shape[4], patch)
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    return ModelInputs(arguments, latent, torch.stack(conditions) if conditions else None, geometry, text_tokens)
