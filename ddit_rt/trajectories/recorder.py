"""What a pipeline's own runs tell about its steps: plain runs, coarse ones along the same latents, disturbed ones.

Everything is taken and changed where the pipeline meets transformer and scheduler, so guidance, conditions and the
scheduler's arithmetic are those of the real pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import unwrap_module

from ..errors import ConfigError, UnsupportedPipelineError
from ..families import ModelInputs, NotCoarseError, denoisers, family_of
from ..granularity import Adapter, bands, crop_to_latent, line, pad_to_grid
from ..pipeline import accelerated, report, restore
from ..runtime import MethodPatch, installed

# (step, steps since the last full one) -> mean squared error of an adapter and of a straight line
Errors = dict[tuple[int, int], tuple[float, float]]


@dataclass
class PlainRun:
    """One plain run of S steps.

    Attributes:
        sigmas: float32 (S + 1,): noise levels, the one after the last step included.
        outputs: S predictions as the scheduler got them, guidance applied, float32, the pipeline's layout.
        latents: S latents as the scheduler returned them.
        transformers: Which transformer made each step, as its place among the pipeline's.
        answers: Per step, what the transformer answered to each call.
        base, call: A transformer and its first call, which say how to read ``outputs``.
        noise: Seed of the run.
        prompt: Its prompt.
    """

    sigmas: torch.Tensor
    outputs: list[torch.Tensor]
    latents: list[torch.Tensor]
    transformers: list[int]
    answers: list[list[torch.Tensor]]
    base: Any
    call: ModelInputs
    noise: int
    prompt: str

    @property
    def steps(self) -> int:
        return len(self.outputs)


class PipelineRecorder:
    """Runs a pipeline and watches it.

    Args:
        pipe: A supported pipeline; made plain.
        call: Arguments of the pipeline but prompt, generator and output type.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        restore(pipe)
        self._pipe, self._call = pipe, call
        self._family = family_of(pipe)
        self._modules = list(denoisers(pipe, self._family).values())

    def plain(self, prompt: str, seed: int) -> PlainRun:
        """A plain run, remembered.

        Raises:
            UnsupportedPipelineError: the transformer is called in a way that coarse tokens cannot carry.
        """
        outputs: list[torch.Tensor] = []
        latents: list[torch.Tensor] = []
        answers: list[list[torch.Tensor]] = [[]]
        transformers: list[int] = []
        first: list[tuple[Any, ModelInputs]] = []

        def forward(place: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            base = unwrap_module(self._modules[place])
            if not first:
                try:
                    first.append((base, self._family.parse(base, self._family.bind(args, kwargs))))
                except NotCoarseError as error:
                    raise UnsupportedPipelineError(f"no schedule can be fitted to this call: {error}.") from error
            raw = inner(*args, **kwargs)
            answers[-1].append((raw[0] if isinstance(raw, tuple) else raw.sample).cpu())
            transformers[len(outputs) :] = [place]
            return raw

        def step(inner: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(output, timestep, sample, *args, **kwargs)
            outputs.append(output.float().cpu())
            latents.append(_sample(result).cpu())
            answers.append([])
            return result

        with self._watched(forward, step):
            self._run(prompt, seed)
        scheduler = self._pipe.scheduler
        begin = scheduler.begin_index or 0
        sigmas = scheduler.sigmas[begin : begin + len(outputs) + 1].float().cpu()
        return PlainRun(sigmas, outputs, latents, transformers, answers[:-1], *first[0], seed, prompt)

    def canonical(self, trace: PlainRun, output: torch.Tensor) -> torch.Tensor:
        """A prediction in the scheduler's layout as (B, C, F, H, W)."""
        return self._family.output(trace.base, trace.call, (output,)).float()

    def coarse(self, trace: PlainRun, multiple: int, keep: Callable[[torch.Tensor], Any]) -> tuple[list[Any], float]:
        """What the model says on coarse tokens at each of the trace's latents: the low band, upsampled.

        Args:
            trace: A plain run.
            multiple: Of the patch size.
            keep: Called with each (B, C, F, H, W) float32; its results are returned.

        Returns:
            S results, and the FLOP of such a step over those of a full one.

        Raises:
            ConfigError: the pipeline cannot run at this multiple.
        """
        found: list[Any] = []
        geometry = trace.call.geometry

        def see(index: int, output: torch.Tensor) -> None:
            padded = pad_to_grid(self.canonical(trace, output), geometry, multiple)
            low = bands.up(bands.down(padded, multiple), multiple)
            found.append(keep(crop_to_latent(low, geometry)))

        return found, self._along(trace, [multiple] * trace.steps, see, coarse="band-split")

    def learned(self, trace: PlainRun, adapter: Adapter, multiple: int, every: int) -> tuple[Errors, float]:
        """How far off an adapter is at the trace's latents, one full step in ``every``, and how far a straight line.

        Args:
            trace: A plain run.
            adapter: Of the pipeline's transformer.
            multiple: Of the patch size.
            every: Steps from one full step to the next, >= 2.

        Returns:
            (step, steps since the last full one) -> mean squares of both errors; and the FLOP of a coarse step over
            those of a full one.

        Raises:
            ConfigError: the pipeline cannot run at this multiple.
            AdapterMismatchError: the adapter was made for another model.
        """
        first = {trace.transformers.index(place) for place in trace.transformers}
        schedule = [1 if {i, i - 1} & first or i % every == 0 else multiple for i in range(trace.steps)]
        found: Errors = {}

        def see(index: int, output: torch.Tensor) -> None:
            if schedule[index] == 1:
                return
            older, newest = [i for i in range(index) if schedule[i] == 1][-2:]
            points = [(float(trace.sigmas[i]), trace.outputs[i]) for i in (older, newest)]
            truth = trace.outputs[index]
            ahead = line(points[0], points[1], float(trace.sigmas[index]))
            own, free = (float((guess.float() - truth).square().mean()) for guess in (output, ahead))
            found[index, index - newest] = own, free

        sizes = (1, multiple)
        share = self._along(trace, schedule, see, coarse="adapter", adapter=adapter, multiples=sizes)
        return found, share

    def _along(
        self, trace: PlainRun, schedule: Sequence[int], see: Callable[[int, torch.Tensor], None], **settings: Any
    ) -> float:
        """Runs by ``schedule``, but on the trace's latents; FLOP of a coarse step over those of a full one.

        Args:
            see: Called after every step with its index and prediction, on the CPU in the scheduler's layout.
            settings: Of :func:`ddit_rt.accelerate`.
        """
        index = 0

        def step(inner: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal index
            result = inner(output, timestep, sample, *args, **kwargs)
            see(index, output.cpu())
            index += 1
            return _with_sample(result, trace.latents[index - 1])

        with accelerated(self._pipe, schedule=list(schedule), cuda_graphs=False, **settings):
            with self._watched(None, step):
                self._run(trace.prompt, trace.noise)
            steps = report(self._pipe).steps
        for record, multiple in zip(steps, schedule):
            if record.multiple != multiple:
                raise ConfigError(f"multiples: {multiple} cannot be run here: {record.note}. Leave it out.")
        coarse = [record for record in steps if record.multiple > 1]
        return sum(record.flops for record in coarse) / max(sum(record.full_flops for record in coarse), 1.0)

    def disturbed(self, trace: PlainRun, index: int, error: torch.Tensor) -> torch.Tensor:
        """The last latent, float32, if the prediction of step ``index`` is off by ``error`` (the scheduler's layout).

        Steps up to that one take their answers from the trace, those after it run the model.
        """
        step_index, call_index, last = 0, 0, trace.latents[-1]

        def forward(place: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal call_index
            if step_index > index:
                return inner(*args, **kwargs)
            answer = trace.answers[step_index][call_index]
            call_index += 1
            arguments = self._family.bind(args, kwargs)
            answer = answer.to(arguments["hidden_states"].device)
            return Transformer2DModelOutput(sample=answer) if arguments.get("return_dict", True) else (answer,)

        def step(inner: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal step_index, call_index, last
            if step_index == index:
                output = (output.float() + error.to(output.device)).to(output.dtype)
            result = inner(output, timestep, sample, *args, **kwargs)
            step_index, call_index, last = step_index + 1, 0, _sample(result)
            return result

        with self._watched(forward, step):
            self._run(trace.prompt, trace.noise)
        return last.float().cpu()

    def _run(self, prompt: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pipe(**{**self._call, "prompt": prompt}, generator=generator, output_type="latent")

    @contextmanager
    def _watched(self, forward: Callable[..., Any] | None, step: Callable[..., Any]) -> Iterator[None]:
        patches = [MethodPatch(self._pipe.scheduler, "step", _named(step))]
        if forward is not None:
            patches += [MethodPatch(m, "forward", _placed(forward, i)) for i, m in enumerate(self._modules)]
        with installed(patches):
            yield


def _placed(forward: Callable[..., Any], place: int) -> Callable[..., Any]:
    return lambda inner, *args, **kwargs: forward(place, inner, *args, **kwargs)


def _named(step: Callable[..., Any]) -> Callable[..., Any]:
    def handle(
        inner: Callable[..., Any], model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return step(inner, model_output, timestep, sample, *args, **kwargs)

    return handle


def _sample(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result.prev_sample


def _with_sample(result: Any, sample: torch.Tensor) -> Any:
    """The scheduler's result with another latent in it."""
    sample = sample.to(_sample(result).device)
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result
