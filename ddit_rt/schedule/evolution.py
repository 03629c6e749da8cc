"""The evolution of the latent: its increments, their history, and the decision that follows from them, under way.

Increments are taken inside the scheduler's step in float32. Rounding latents to bfloat16 gives their third difference a
standard deviation of several times the default τ, so Δz = z_out - z_in has to be known before the scheduler casts its
result to the model's dtype. The decision reaches the host without holding up the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from ddit_kernels.evolve import evolve
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ..multiples import frames_of, side_of
from .policy import coarsest_below


class EvolutionHistory:
    """Keeps as many increments as the finite difference needs.

    An n-th difference of latents takes n increments (n + 1 latents): Δⁿz = Σ (-1)^i C(n-1, i) d_i over increments
    d_0 (newest) to d_{n-1} (paper, equations 2 to 4). A change of shape empties the history.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._increments: deque[torch.Tensor] = deque(maxlen=order)

    def push(self, increment: torch.Tensor) -> None:
        """Adds the newest increment, float32, any shape."""
        if self._increments and self._increments[0].shape != increment.shape:
            self._increments.clear()
        self._increments.appendleft(increment)

    @property
    def full(self) -> bool:
        return len(self._increments) == self.order

    @property
    def increments(self) -> list[torch.Tensor]:
        """Newest first; ``order`` of them once :attr:`full`."""
        return list(self._increments)

    def clear(self) -> None:
        self._increments.clear()


def step_with_increment(
    step: Callable[..., Any],
    scheduler: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """Runs ``scheduler.step`` and returns its result with the float32 increment of the latent.

    In float32 the result is the scheduler's own, bit for bit. In lower precision the Euler increment is computed from
    the sigmas and the result is again the scheduler's own. DDIM remembers nothing, so its step is made twice, once for
    either. Other schedulers run their arithmetic in float32, and only the new sample is cast back.

    Args:
        step: The scheduler's own (unpatched) bound ``step``.
        scheduler: The scheduler that owns it.
        model_output: Prediction, any float dtype, the shape of ``sample``.
        timestep: As the pipeline passes it.
        sample: Latent before the step.

    Returns:
        The scheduler's result and Δz, float32, the shape of ``sample``.
    """
    if _is_plain_euler(scheduler, args, kwargs) and model_output.dtype != torch.float32:
        result = step(model_output, timestep, sample, *args, **kwargs)
        index = scheduler.step_index - 1
        return result, (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * model_output.float()

    half = {torch.float16, torch.bfloat16}
    dtype = model_output.dtype if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else sample.dtype
    if dtype in half:
        own, own_sample = model_output, sample
        model_output, sample = model_output.float(), sample.float()
    result = step(model_output, timestep, sample, *args, **kwargs)
    new = latent_of(result)
    increment = new.float() - sample.float()
    if dtype in half and isinstance(scheduler, DDIMScheduler) and not kwargs.get("eta"):
        result = step(own, timestep, own_sample, *args, **kwargs)
    elif dtype in half:
        result = with_latent(result, new.to(dtype))
    return result, increment


def latent_of(result: Any) -> torch.Tensor:
    """The latent in what a scheduler's step returned."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_latent(result: Any, latent: torch.Tensor) -> Any:
    """The result of a scheduler's step with another latent in it."""
    if isinstance(result, tuple):
        return (latent, *result[1:])
    result.prev_sample = latent
    return result


def _is_plain_euler(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the step is z + (σ_next - σ)·v with one σ for all tokens and no added noise."""
    return (
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        and not scheduler.config.stochastic_sampling
        and kwargs.get("per_token_timesteps") is None
        and len(args) < 6  # fewer arguments than would reach per_token_timesteps by position
    )


class HostMemory:
    """Page-locked memory that the device writes its results to, a row per decision; no row is used twice.

    A decision and its σ_k share an allocation. It is given back when the last of them is forgotten, and PyTorch hands
    it out again only behind the copy of the σ_k, so that no kernel still under way writes to somebody else's memory.

    Args:
        batch: Samples.
        sizes: Patch sizes.
    """

    rows = 64  # allocating page-locked memory may wait for the device: seldom

    def __init__(self, batch: int, sizes: int) -> None:
        self._batch, self._sizes = batch, sizes
        self._left: list[torch.Tensor] = []

    def row(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a decision, int32 (B,), and its σ_k, float32 (B, S), go."""
        if not self._left:
            width = self._batch * (1 + self._sizes)
            self._left = list(torch.empty(self.rows, width, dtype=torch.float32, pin_memory=True))
        row = self._left.pop()
        return row[: self._batch].view(torch.int32), row[self._batch :].view(self._batch, self._sizes)


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: every stream that allocates keeps memory of its own."""
    return torch.cuda.Stream(device)


class PendingEvolution:
    """The decision for one step and the σ_k it rests on, under way.

    The kernel is launched right after the scheduler's step and writes its decision straight to page-locked memory. The
    host waits for it only when the next step begins, and for the σ_k, which take longer and go beside the next model
    run on a stream of their own, only when somebody reads them.

    Args:
        increments: Newest first; see :func:`ddit_rt.ops.latent_evolution`.
        multiples: The sizes, as multiples of ``patch``, ascending.
        patch: The model's patch size in latent pixels.
        quantile: ρ.
        packed: Token grid of FLUX's packed layout, or None.
        backend: "auto", "triton" or "torch".
        threshold: τ.
        host: Where results on CUDA go; None makes its own.
    """

    def __init__(
        self,
        increments: Sequence[torch.Tensor],
        multiples: Sequence[int],
        patch: int,
        quantile: float,
        packed: tuple[int, int] | None,
        backend: str,
        threshold: float = 0.0,
        host: HostMemory | None = None,
    ) -> None:
        self._multiples = tuple(multiples)
        self._patch_std: dict[int, float] | None = None
        sizes = [k * patch for k in self._multiples]
        self._decided = self._measured = None
        if not increments[0].is_cuda:
            self._decision, quantiles = evolve(increments, sizes, quantile, threshold, packed, None, backend)
            self._quantiles = quantiles()
            return
        device = increments[0].device
        # kernels, streams and events are those of the current device
        with torch.cuda.device(device):
            out, values = (host or HostMemory(increments[0].shape[0], len(sizes))).row()
            self._decided, self._measured = torch.cuda.Event(), torch.cuda.Event()
            self._decision, quantiles = evolve(increments, sizes, quantile, threshold, packed, out, backend)
            self._decided.record()
            # the next model run does not wait for the σ_k
            aside = _side_stream(device)
            aside.wait_event(self._decided)
            with torch.cuda.stream(aside):
                self._quantiles = values.copy_(quantiles(aside), non_blocking=True)
                self._measured.record()

    def decision(self) -> int:
        """The coarsest multiple whose σ_k is below τ, else 1: the finest that any sample of the batch asks for.

        A sample whose latent is not finite asks for 1.
        """
        if self._decided is not None:
            self._decided.synchronize()
        return min((1, *self._multiples)[index] for index in self._decision.tolist())

    def wait(self) -> dict[int, float]:
        """Multiple -> σ_k, the largest over the batch; NaN where any sample's latent is not finite."""
        if self._patch_std is None:
            if self._measured is not None:
                self._measured.synchronize()
            self._patch_std = dict(zip(self._multiples, self._quantiles.amax(dim=0).tolist()))
        return self._patch_std


class SpanningEvolution:
    """The evolution at sizes in space, and at such that span frames; both under way.

    A patch over two frames is one of a latent that has two frames side by side in its channels.

    Args:
        spatial: Over the sizes in space.
        increments: Newest first, (B, C, F, H, W).
        multiples: The sizes that span frames.
        patch, quantile, backend, threshold: As for :class:`PendingEvolution`.
    """

    def __init__(
        self,
        spatial: PendingEvolution,
        increments: Sequence[torch.Tensor],
        multiples: Sequence[int],
        patch: int,
        quantile: float,
        backend: str,
        threshold: float,
    ) -> None:
        self._spatial, self._threshold = spatial, threshold
        self._spanning = {
            k: PendingEvolution(
                [_side_by_side(increment, frames_of(k)) for increment in increments],
                [side_of(k)],
                patch,
                quantile,
                None,
                backend,
                threshold,
            )
            for k in multiples
        }

    def decision(self) -> int:
        """As :meth:`PendingEvolution.decision`, from the σ_k: the two kinds are measured by kernels of their own."""
        return coarsest_below(self.wait(), self._threshold)

    def wait(self) -> dict[int, float]:
        """Multiple -> σ_k, as :meth:`PendingEvolution.wait`."""
        spanning = {k: evolution.wait()[side_of(k)] for k, evolution in self._spanning.items()}
        return {**self._spatial.wait(), **spanning}


def _side_by_side(increment: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, C, F, H, W) -> (B, C·frames, F/frames, H, W), the last frame repeated where they do not divide."""
    behind = -increment.shape[2] % frames
    if behind:
        increment = torch.cat([increment, increment[:, :, -1:].expand(-1, -1, behind, -1, -1)], dim=2)
    return increment.unflatten(2, (-1, frames)).transpose(2, 3).flatten(1, 2)


class LatentEvolution:
    """The evolution of one call's latent, from increment to increment.

    Args:
        order: n of the n-th difference.
        multiples, quantile, backend, threshold: As for :class:`PendingEvolution`.

    Attributes:
        current: What is known of the evolution up to the current step; None while the history fills.
    """

    def __init__(
        self, order: int, multiples: Sequence[int], quantile: float, backend: str, threshold: float = 0.0
    ) -> None:
        self.current: PendingEvolution | SpanningEvolution | None = None
        self._multiples = [k for k in multiples if frames_of(k) == 1]
        self._spanning = [k for k in multiples if frames_of(k) > 1]
        self._quantile, self._backend, self._threshold = quantile, backend, threshold
        self._history = EvolutionHistory(order)
        self._pending: PendingEvolution | SpanningEvolution | None = None
        self._host: HostMemory | None = None

    def clear(self) -> None:
        """Forgets everything: the latent has another shape than before."""
        self.current = self._pending = self._host = None
        self._history.clear()

    def begin_step(self) -> None:
        """Makes what was launched after the last step the current evolution."""
        self.current, self._pending = self._pending, None

    def end_step(
        self, increment: torch.Tensor | None, patch: int | None, packed: tuple[int, ...] | None
    ) -> PendingEvolution | SpanningEvolution | None:
        """Closes a step and launches the decision for the next one; waits for nothing.

        Args:
            increment: Of the latent, float32; None if the evolution is not watched.
            patch: The model's patch size in latent pixels; None if no step follows.
            packed: Token grid of packed increments (B, N, values): (rows, columns), or with frames (F, rows, columns),
                where a token is one latent pixel.

        Returns:
            The evolution up to the step that ends; None while the history filled.
        """
        ended, self.current = self.current, None
        if increment is None:
            return ended
        grid: tuple[int, int] | None = None
        if increment.ndim == 3 and packed is not None:
            if len(packed) == 3:
                increment = increment.unflatten(1, packed).movedim(-1, 1)
            else:
                grid = (packed[0], packed[1])
        self._history.push(increment)
        if self._history.full and patch is not None:
            increments = self._history.increments
            if increments[0].is_cuda and self._host is None:
                self._host = HostMemory(increments[0].shape[0], len(self._multiples))
            self._pending = spatial = PendingEvolution(
                increments,
                self._multiples,
                patch,
                self._quantile,
                grid,
                self._backend,
                self._threshold,
                self._host,
            )
            if self._spanning and increment.ndim == 5 and increment.shape[2] > 1:
                self._pending = SpanningEvolution(
                    spatial, increments, self._spanning, patch, self._quantile, self._backend, self._threshold
                )
        return ended
