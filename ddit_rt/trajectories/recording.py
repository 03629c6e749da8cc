"""What distillation keeps of the base model's trajectories: what its transformer was shown, and what that answered.

In memory it is a :class:`Recording`, on disk a safetensors file that :class:`Shard` reads piece by piece.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

from ..errors import UnsupportedPipelineError
from ..families import Family, NotCoarseError, denoisers
from .recorder import Recorder, Step, StreamCall

_KEY = "ddit_recording"


@dataclass
class Recording:
    """B trajectories (or pieces of them) of S steps, on the CPU.

    Attributes:
        sigmas: float32 (S + 1,): noise levels, the one after the last step included.
        latents: float32 (S, B, C, F, H, W), as the transformer got them.
        predictions: Per stream, the transformer's own (before guidance), shape and dtype of ``latents``.
        arguments: Per stream, the transformer's other tensor arguments by name; a list holds one tensor per sample.
        plain: Per stream, the transformer's arguments that hold no tensors but numbers, truth values and texts, nested
            or not; a list of B holds one value per sample.
        condition: (B, C', F, H, W) un-noised channels, or None.
        references: Per stream, (B, N', C'') tokens of reference pictures, or None.
        captions: Texts of the call; B of them, unless guidance doubles the batch.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    predictions: list[torch.Tensor]
    arguments: list[dict[str, torch.Tensor | list[torch.Tensor]]]
    plain: list[dict[str, Any]]
    condition: torch.Tensor | None
    references: list[torch.Tensor | None]
    captions: list[str]

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Writes the recording, through a temporary file; latents and predictions as ``dtype``."""
        state = {"sigmas": self.sigmas, "latents": self.latents.to(dtype)}
        for stream, (prediction, arguments) in enumerate(zip(self.predictions, self.arguments)):
            state[f"predictions.{stream}"] = prediction.to(dtype)
            for name, value in arguments.items():
                key = f"arguments.{stream}.{name}"
                one_each = isinstance(value, list)
                state |= {f"{key}.{i}": one for i, one in enumerate(value)} if one_each else {key: value}
        if self.condition is not None:
            state["condition"] = self.condition.to(dtype)
        for stream, tokens in enumerate(self.references):
            if tokens is not None:
                state[f"references.{stream}"] = tokens.to(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        clones = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        # JSON would make lists of tuples
        told = {"captions": self.captions, "plain": repr(self.plain)}
        save_file(clones, temporary, metadata={_KEY: json.dumps(told)})
        os.replace(temporary, path)


class Shard:
    """A recording on disk, read piece by piece.

    Attributes:
        sigmas, steps, batch, streams: Noise levels, and how many steps, samples and streams there are.
        lists: Names of arguments that are lists of one tensor per sample.
    """

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt").__enter__()
        names = list(self._file.keys())
        self.sigmas: torch.Tensor = self._file.get_tensor("sigmas")
        self.steps, self.batch = self._file.get_slice("latents").get_shape()[:2]
        self.streams = sum(name.startswith("predictions.") for name in names)
        keys = [name.split(".") for name in names if name.startswith("arguments.")]
        self._arguments = [
            list(dict.fromkeys(key[2] for key in keys if key[1] == str(stream))) for stream in range(self.streams)
        ]
        self.lists = frozenset(key[2] for key in keys if len(key) > 3)
        self._conditioned = "condition" in names
        self._referring = frozenset(name for name in names if name.startswith("references."))
        told = json.loads(self._file.metadata()[_KEY])
        # older recordings hold none
        self._plain: list[dict[str, Any]] = ast.literal_eval(told["plain"]) if "plain" in told else [{}] * self.streams

    def latent(self, step: int, index: int) -> torch.Tensor:
        """(C, F, H, W) float32."""
        return self._piece("latents", step, index)

    def prediction(self, stream: int, step: int, index: int) -> torch.Tensor:
        """(C, F, H, W) float32."""
        return self._piece(f"predictions.{stream}", step, index)

    def condition(self, index: int) -> torch.Tensor | None:
        """(C', F, H, W) or None."""
        return self._file.get_slice("condition")[index : index + 1][0] if self._conditioned else None

    def arguments(self, stream: int, index: int, shared: frozenset[str]) -> dict[str, torch.Tensor]:
        """The transformer's other arguments: a sample's own, those named in ``shared`` whole."""

        def read(name: str) -> torch.Tensor:
            key = f"arguments.{stream}.{name}"
            if name in self.lists:
                return self._file.get_tensor(f"{key}.{index}")
            return self._file.get_tensor(key) if name in shared else self._file.get_slice(key)[index : index + 1][0]

        return {name: read(name) for name in self._arguments[stream]}

    def plain(self, stream: int) -> dict[str, Any]:
        """Arguments that hold no tensors, of all samples."""
        return self._plain[stream]

    def references(self, stream: int, index: int) -> torch.Tensor | None:
        """(N', C'') tokens of a sample's reference pictures, or None."""
        name = f"references.{stream}"
        return self._file.get_slice(name)[index : index + 1][0] if name in self._referring else None

    def _piece(self, name: str, step: int, index: int) -> torch.Tensor:
        return self._file.get_slice(name)[step : step + 1, index : index + 1][0, 0].float()


def record(
    pipe: Any,
    family: Family,
    run: Callable[[], Any],
    captions: Sequence[str],
    max_steps: int | None = None,
) -> Recording:
    """Records what ``run()``, a call of ``pipe`` or of a pipeline that shares its components, does.

    Args:
        pipe: Owner of transformer and scheduler; left plain.
        family: Of the transformer.
        run: Makes the call; its result is not used.
        captions: One per sample.
        max_steps: Stop the call after so many denoising steps.

    Raises:
        UnsupportedPipelineError: the pipeline has two transformers, calls its transformer in a way that coarse tokens
            cannot carry, calls it more often in some steps than in others, or tells it something else in every step
            beside latent and noise level.
    """
    sole_transformer(pipe, family)
    arguments: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    conditions: list[torch.Tensor | None] = []
    references: list[torch.Tensor | None] = []
    batches: list[int] = []

    def keep_call(call: StreamCall) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The step's latent, once, and the prediction."""
        inputs = call.inputs
        assert inputs is not None  # the recorder parses
        if call.step == 0:
            kept = {name: value for name, value in call.arguments.items() if _holds_tensors(value)}
            del kept[family.latent_argument]
            arguments.append(pytree.tree_map(lambda tensor: tensor.detach().cpu(), kept))
            plain.append({name: value for name, value in call.arguments.items() if _is_plain(value)})
            conditions.append(None if inputs.condition is None else inputs.condition.cpu())
            references.append(None if inputs.references is None else inputs.references.cpu())
            left = call.arguments.keys() - kept.keys() - {family.latent_argument}
            for name in sorted(left):
                if _has_tensors(call.arguments[name]):
                    kind = type(call.arguments[name]).__name__
                    raise UnsupportedPipelineError(
                        f"this call cannot be distilled: {name} holds tensors in a {kind}; recorded are tensors, and "
                        "lists of one per sample. Leave out what makes it."
                    )
        elif call.stream < len(arguments) and len(inputs.latent) == batches[0]:  # else the step says so
            _check_same(call, arguments[call.stream], {family.time_argument, "timestep"})
        latent = inputs.latent.float().cpu() if call.stream == 0 else None
        return latent, family.output(call.module, inputs, (call.prediction,)).float().cpu()

    def keep_step(step: Step[tuple[torch.Tensor | None, torch.Tensor]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if len(step.calls) != len(arguments):
            raise UnsupportedPipelineError(
                f"this call cannot be distilled: step {step.index} calls the transformer {len(step.calls)} times, step "
                f"0 did {len(arguments)} times. Keep guidance on, or off, for the whole run."
            )
        latent = step.calls[0][0]
        assert latent is not None  # it is there for stream 0
        batches.append(len(latent))
        if len(latent) != batches[0]:
            raise UnsupportedPipelineError(
                f"this call cannot be distilled: step {step.index} gives the transformer {len(latent)} samples, step 0 "
                f"did {batches[0]}. Keep guidance on, or off, for the whole run."
            )
        return latent, [prediction for _, prediction in step.calls]

    try:
        sigmas, steps = Recorder(pipe, family).record(run, keep_call, keep_step, max_steps)
    except NotCoarseError as error:
        raise UnsupportedPipelineError(f"this call cannot be distilled: {error}.") from error
    latents, predictions = zip(*steps)
    return Recording(
        sigmas,
        torch.stack(latents),
        [torch.stack(stream) for stream in zip(*predictions)],
        arguments,
        plain,
        conditions[0],
        references,
        list(captions),
    )


def _holds_tensors(value: Any) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, torch.Tensor) for one in values)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _is_plain(value: Any) -> bool:
    """Whether ``repr`` tells a value completely; an empty one tells nothing."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_plain, value))
    return type(value) in (bool, int, float, str)


def _check_same(call: StreamCall, first: Mapping[str, Any], moving: Set[str]) -> None:
    """Refuses a call whose arguments are not those of the first step, which stand for all steps.

    Raises:
        UnsupportedPipelineError: naming the argument.
    """
    for name in sorted(first.keys() - moving):
        now, then = pytree.tree_leaves(call.arguments.get(name)), pytree.tree_leaves(first[name])
        same = len(now) == len(then) and all(
            isinstance(a, torch.Tensor) and a.shape == b.shape and bool((a == b.to(a.device)).all())
            for a, b in zip(now, then)
        )
        if not same:
            raise UnsupportedPipelineError(
                f"this call cannot be distilled: {name} is another in step {call.step} than in step 0, and is recorded "
                "once. Leave out what makes it (a ControlNet, say)."
            )


def sole_transformer(pipe: Any, family: Family) -> Any:
    """The pipeline's transformer, with whatever wraps it.

    Raises:
        UnsupportedPipelineError: the pipeline has two.
    """
    modules = denoisers(pipe, family)
    if len(modules) != 1:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has {' and '.join(modules)} with weights of their own: an adapter serves one. "
            "Distill a pipeline with a single transformer."
        )
    return next(iter(modules.values()))
