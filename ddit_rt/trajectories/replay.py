"""Runs a pipeline again along a recorded trajectory: coarsely at its latents, or on from a step with an error in it.

A replay is a real run of the pipeline with the trajectory's arguments and seed. It differs in what transformer or
scheduler hand back, which is taken from the trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..granularity import Adapter, bands, crop_to_latent, line, pad_to_grid
from ..pipeline import accelerated, report, restore
from ..schedule import latent_of, with_latent
from .generation import denoise
from .interception import intercepted
from .trajectory import Trajectory

AdapterErrors = dict[tuple[int, int], tuple[float, float]]
"""(step, steps since the last full one) -> mean squared error of an adapter, and of a straight line."""


def coarse_predictions(
    pipe: Any, trajectory: Trajectory, multiple: int, keep: Callable[[torch.Tensor], Any]
) -> tuple[list[Any], float]:
    """What the model says on coarse tokens at each of the trajectory's latents: the low band, upsampled.

    Args:
        pipe: The pipeline that made the trajectory; left plain.
        trajectory: S steps.
        multiple: Of the patch size.
        keep: Called with each (B, C, F, H, W) float32 on the CPU; its results are returned.

    Returns:
        S results, and the FLOP of such a step over those of a full one.

    Raises:
        ConfigError: the pipeline cannot run at this multiple.
    """
    found: list[Any] = []
    geometry = trajectory.inputs.geometry

    def see(index: int, output: torch.Tensor) -> None:
        padded = pad_to_grid(trajectory.canonical(output), geometry, multiple)
        low = bands.up(bands.down(padded, multiple), multiple)
        found.append(keep(crop_to_latent(low, geometry)))

    return found, _along(pipe, trajectory, [multiple] * trajectory.steps, see, coarse="band-split")


def adapter_errors(
    pipe: Any, trajectory: Trajectory, adapter: Adapter, multiple: int, every: int
) -> tuple[AdapterErrors, float]:
    """How far off an adapter is at the trajectory's latents, and how far a straight line, one full step in ``every``.

    Args:
        pipe: The pipeline that made the trajectory; left plain.
        trajectory: S steps.
        adapter: Of the pipeline's transformer.
        multiple: Of the patch size.
        every: Steps from one full step to the next, >= 2.

    Returns:
        Errors of the coarse steps, and the FLOP of a coarse step over those of a full one.

    Raises:
        ConfigError: the pipeline cannot run at this multiple.
        AdapterMismatchError: the adapter was made for another model.
    """
    first = {trajectory.transformers.index(place) for place in trajectory.transformers}
    schedule = [1 if {i, i - 1} & first or i % every == 0 else multiple for i in range(trajectory.steps)]
    found: AdapterErrors = {}

    def see(index: int, output: torch.Tensor) -> None:
        if schedule[index] == 1:
            return
        older, newest = [i for i in range(index) if schedule[i] == 1][-2:]
        points = [(float(trajectory.sigmas[i]), trajectory.outputs[i]) for i in (older, newest)]
        truth = trajectory.outputs[index]
        forecast = line(points[0], points[1], float(trajectory.sigmas[index]))
        errors = [float((guess.float() - truth).square().mean()) for guess in (output, forecast)]
        found[index, index - newest] = errors[0], errors[1]

    settings = {"coarse": "adapter", "adapter": adapter, "multiples": (1, multiple)}
    return found, _along(pipe, trajectory, schedule, see, **settings)


def last_latent_with_error(pipe: Any, trajectory: Trajectory, index: int, error: torch.Tensor) -> torch.Tensor:
    """Where a plain run ends if the prediction of step ``index`` is off by ``error``.

    Steps up to that one take their predictions from the trajectory, those after it run the model.

    Args:
        pipe: The pipeline that made the trajectory; left plain.
        trajectory: S steps.
        index: Of the step, from 0.
        error: Added to what the scheduler gets there, in the pipeline's layout.

    Returns:
        The last latent, float32 on the CPU, in the pipeline's layout.
    """
    restore(pipe)
    family = trajectory.family
    step, stream, last = 0, 0, trajectory.latents[-1]

    def on_forward(place: int, arguments: dict[str, Any], proceed: Callable[[], Any]) -> Any:
        nonlocal stream
        if step > index:
            return proceed()
        device = pytree.tree_leaves(arguments[family.latent_argument])[0].device
        prediction = pytree.tree_map(lambda tensor: tensor.to(device), trajectory.predictions[step][stream])
        stream += 1
        return Transformer2DModelOutput(sample=prediction) if arguments.get("return_dict", True) else (prediction,)

    def on_step(output: torch.Tensor, timestep: Any, latent: torch.Tensor, proceed: Callable[..., Any]) -> Any:
        nonlocal step, stream, last
        if step == index:
            output = (output.float() + error.to(output.device)).to(output.dtype)
        result = proceed(output)
        step, stream, last = step + 1, 0, latent_of(result)
        return result

    with intercepted(pipe, family, on_forward, on_step):
        denoise(pipe, trajectory.seed, trajectory.arguments)
    return last.float().cpu()


def _along(
    pipe: Any,
    trajectory: Trajectory,
    schedule: Sequence[int],
    see: Callable[[int, torch.Tensor], None],
    **settings: Any,
) -> float:
    """Runs by ``schedule``, but on the trajectory's latents; FLOP of a coarse step over those of a full one.

    Args:
        see: Called after every step with its index and its prediction, on the CPU in the pipeline's layout.
        settings: Of :func:`ddit_rt.accelerate`.
    """
    index = 0

    def on_step(output: torch.Tensor, timestep: Any, latent: torch.Tensor, proceed: Callable[..., Any]) -> Any:
        nonlocal index
        result = proceed(output)
        see(index, output.cpu())
        index += 1
        return with_latent(result, trajectory.latents[index - 1].to(latent_of(result).device))

    with accelerated(pipe, schedule=list(schedule), cuda_graphs=False, **settings):
        with intercepted(pipe, trajectory.family, on_step=on_step):
            denoise(pipe, trajectory.seed, trajectory.arguments)
        steps = report(pipe).steps
    for record, multiple in zip(steps, schedule):
        if record.multiple != multiple:
            raise ConfigError(f"multiples: {multiple} cannot be run here: {record.note}. Leave it out.")
    coarse = [record for record in steps if record.multiple > 1]
    return sum(record.flops for record in coarse) / max(sum(record.full_flops for record in coarse), 1.0)
