"""What ddit_rt has to know about a transformer class: the contract that each family file fulfils."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import nn

from ..errors import ConfigError
from ..granularity import (
    Geometry,
    ModelFacts,
    NotFusedError,
    OwnEnds,
    PatchEmbedding,
    PatchEnds,
    PatchProjections,
    Scalar,
    is_fused,
)
from ..multiples import SUPPORTED_MULTIPLES
from ..runtime import Trunk, adapter_state
from .weights import active_loras, own_weight


@dataclass(frozen=True)
class ModelInputs:
    """What one call gives to the transformer: its arguments by name, and the latent in them.

    Attributes:
        arguments: Everything but the latent stays as the pipeline passed it.
        latent: (B, C, F, H, W) view or copy of the noisy latent, the pipeline's dtype.
        condition: (B, C', F, H, W) channels that ride along un-noised (image-to-video), or None.
        geometry: The latent's grid.
        text_tokens: Tokens of the text condition, and of others beside it, that the blocks see.
        references: (B, N', C'') tokens of reference pictures, which stand behind the latent's and stay as they are.
        places: Positions of the coarse tokens of one multiple, made beforehand (:meth:`Family.places`).
    """

    arguments: Mapping[str, Any]
    latent: torch.Tensor
    condition: torch.Tensor | None
    geometry: Geometry
    text_tokens: int
    references: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def fresh_arguments(self) -> dict[str, Any]:
        """The arguments, with dictionaries of their own: a transformer may pop entries from one that it is given, and
        one step may call it more than once."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in self.arguments.items()}


class NotCoarseError(Exception):
    """This call cannot run on coarse tokens; the text says why. The step runs full instead."""


class Family(ABC):
    """Where a transformer class keeps its embedding, positions, output and latent layout. Stateless."""

    name: ClassVar[str]
    transformer_class: ClassVar[type[nn.Module]]
    pipelines: ClassVar[tuple[type, ...]]
    modular: ClassVar[tuple[str, ...]] = ()
    """Class names of Modular Diffusers' pipelines that run the same transformer. Importing the classes would make
    diffusers warn everybody that they are experimental."""
    components: ClassVar[tuple[str, ...]] = ("transformer",)
    projection_names: ClassVar[tuple[str, str]]
    """Names of the embedding and the de-embedding in the transformer."""
    time_scale: ClassVar[float]
    """What σ is multiplied with to give the transformer's ``timestep``, unless :meth:`time_of` says otherwise."""
    variance_preserving: ClassVar[bool] = False
    """Whether its models may predict noise or v of a variance-preserving process, and not a flow only. Wherever a
    family is told σ, such a model's timestep of training in thousandths is meant, and latents and predictions are the
    model's own."""
    multiples: ClassVar[tuple[int, ...]] = SUPPORTED_MULTIPLES
    """Patch sizes that its models can work with, as multiples of their own (see :mod:`ddit_rt.multiples`); holds 1.
    Settings that ask for no sizes of their own are cut to these, others are refused."""
    layer_groups: ClassVar[dict[str, str]]
    """Names for groups of the blocks' linear layers -> regular expression of their paths."""
    shared_arguments: ClassVar[frozenset[str]] = frozenset()
    """Tensor arguments without a batch dimension."""
    listed_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are lists with an entry per sample."""
    output_class: ClassVar[type[BaseOutput]] = Transformer2DModelOutput
    """What the transformer returns unless told to return a tuple."""
    latent_argument: ClassVar[str] = "hidden_states"
    """The argument that holds the latent."""
    time_argument: ClassVar[str] = "timestep"
    """The argument that holds the noise level."""
    companion_scheduler: ClassVar[str] = ""
    """Name, in the pipeline's ``__call__``, of the scheduler that steps the companion; empty where there is none.

    The companion is a second output that the transformer makes in the same run, as the sound of a video. It is never
    coarsened; see :meth:`companion`.
    """
    distill_optimizer: ClassVar[str] = "prodigy"
    """What trains an adapter for it unless told otherwise, ``"prodigy"`` or ``"adamw"``, as in the paper."""
    modulation_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments beside the noise level that :meth:`modulations` reads; empty where there are none to make ahead."""
    trims_text: ClassVar[bool] = False
    """Whether :meth:`text_in_prompt` and :meth:`trimmed` are there."""
    attends_unmasked: ClassVar[bool] = False
    """Whether no call of its pipelines gives the attention a mask, so that back-ends without masks can compute it."""
    graph_obstacle: ClassVar[str] = ""
    """Why CUDA graphs cannot capture the transformer's forward; empty where they can."""
    limits: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Checks of :mod:`ddit_rt.families.testing` that the family cannot pass -> why, in one line."""

    def knows(self, pipe: Any) -> bool:
        """Whether a pipeline's class is one of the family's, modular or not, or derived from one."""
        modular = (cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers.modular_pipelines."))
        return isinstance(pipe, self.pipelines) or any(cls.__name__ in self.modular for cls in modular)

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the forward's arguments, in order."""
        return tuple(inspect.signature(self.transformer_class.forward).parameters)[1:]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward call by name."""
        return {**dict(zip(self.argument_names, args)), **kwargs}

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        """Tokens of the text condition, and of others beside it, that the blocks see."""
        return int(arguments["encoder_hidden_states"].shape[1])

    def tokens_beside(self, call: ModelInputs, multiple: int, native: bool) -> int:
        """Tokens beside the latent's that the blocks see at ``multiple``; arguments as for :meth:`low_arguments`."""
        return call.text_tokens

    def packing(self, geometry: Geometry) -> tuple[int, ...] | None:
        """The token grid, if the scheduler steps packed tokens instead of latents.

        Returns:
            (rows, columns) of tokens (B, rows·columns, C·p·p); (F, rows, columns) of tokens (B, F·rows·columns, C) that
            are one latent pixel each.
        """
        return None

    def obstacle(self, call: ModelInputs, multiple: int) -> str:
        """Why a call that can run coarsely cannot span frames as this multiple does; empty if it can.

        The step then runs at the multiple's side alone.
        """
        return ""

    def time_of(self, sigma: Scalar) -> Scalar:
        """The transformer's ``timestep`` at noise level ``sigma``."""
        return sigma if self.time_scale == 1 else sigma * self.time_scale

    def told_time(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The ``timestep`` that a call tells the transformer for what is noisy in its first sample, a 0-dim tensor."""
        times: torch.Tensor = arguments[self.time_argument]
        return times.flatten()[0]

    def told_times(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the pipelines of :attr:`pipelines` tell the transformer at timesteps of the scheduler, to the last bit.

        Args:
            timesteps: (n,) float32.
            dtype: Of the transformer's argument.

        Returns:
            (n,) of that dtype.
        """
        raise NotImplementedError(f"{self.name} makes no modulations ahead")

    def modulations(
        self, module: nn.Module, arguments: Mapping[str, Any], times: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Results of the modules that read nothing but the noise level and :attr:`modulation_inputs`.

        Args:
            module: The transformer.
            arguments: Of a call, by name, for B samples.
            times: (n, B) values of :attr:`time_argument`.

        Returns:
            Path of the module -> (n·B, width), in the order of ``times``.
        """
        raise NotImplementedError(f"{self.name} makes no modulations ahead")

    def text_in_prompt(self, pipe: Any, call: Mapping[str, Any]) -> int | None:
        """Tokens of the longest prompt of a pipeline call, negative ones among them; None where it has none to count.

        Args:
            pipe: The pipeline.
            call: All arguments of its call, defaults included.
        """
        raise NotImplementedError(f"{self.name} keeps all text")

    def trimmed(self, call: ModelInputs, tokens: int) -> ModelInputs:
        """A transformer call with the first ``tokens`` of its text alone."""
        raise NotImplementedError(f"{self.name} keeps all text")

    def is_guided(self, pipe: Any, call: Mapping[str, Any]) -> bool:
        """Whether a pipeline call runs the transformer for the prompt and for the negative prompt in every step.

        Args:
            pipe: The pipeline.
            call: All arguments of its call, defaults included.
        """
        return bool(call["guidance_scale"] > 1)

    @abstractmethod
    def parse(self, module: nn.Module, arguments: Mapping[str, Any]) -> ModelInputs:
        """Reads a call.

        Raises:
            NotCoarseError: it holds something that coarse tokens cannot carry.
        """

    @abstractmethod
    def output(self, module: nn.Module, call: ModelInputs, raw: Any) -> torch.Tensor:
        """The prediction of a full call's raw result in canonical layout (B, C, F, H, W)."""

    @abstractmethod
    def wrap(self, module: nn.Module, call: ModelInputs, prediction: torch.Tensor) -> Any:
        """The raw result that the pipeline expects, from a prediction in canonical layout."""

    def returned(self, call: ModelInputs, sample: Any) -> Any:
        """A sample in the pipeline's layout as the call wants it returned, for :meth:`wrap`."""
        return self.output_class(sample=sample) if call.arguments.get("return_dict", True) else (sample,)

    def canonical(self, module: nn.Module, call: ModelInputs, output: torch.Tensor) -> torch.Tensor:
        """A prediction as the scheduler gets it, in canonical layout (B, C, F, H, W)."""
        return self.output(module, call, (output,))

    def companion(self, raw: Any) -> torch.Tensor | None:
        """The companion's prediction in the raw result of any run, at whatever multiple; None where there is none."""
        return None

    def accompanied(self, raw: Any, companion: torch.Tensor) -> Any:
        """What :meth:`wrap` made, with the companion's prediction."""
        raise NotImplementedError(f"{self.name} has no companion")

    @abstractmethod
    def low_arguments(
        self, call: ModelInputs, low: torch.Tensor, sigma: Scalar, multiple: int, native: bool
    ) -> dict[str, Any]:
        """Arguments that run the unchanged transformer on a k times smaller latent.

        Args:
            call: The full call.
            low: (B, C, F, H/k, W/k), H and W padded to the grid.
            sigma: Its noise level.
            multiple: k.
            native: Positions as in a picture that small; otherwise the centres of the coarse patches on the full grid.
        """

    @abstractmethod
    def low_output(self, module: nn.Module, call: ModelInputs, raw: Any, multiple: int) -> torch.Tensor:
        """The prediction (B, C, F, H/k, W/k) of a call made with :meth:`low_arguments`."""

    def places(self, call: ModelInputs, multiple: int, native: bool) -> torch.Tensor | None:
        """Positions of coarse tokens where they are an argument that stays the same from step to step; else None.

        What is made here need not be made anew in every step.
        """
        return None

    def placed(self, module: nn.Module, call: ModelInputs, multiple: int, native: bool) -> AbstractContextManager[None]:
        """Context in which a transformer that makes its positions inside places coarse tokens; as for `low_arguments`.

        A smaller latent gets the smaller picture's positions by itself.
        """
        return nullcontext()

    def capturable(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context in which the transformer computes the same and can be captured in a graph, where its own code cannot.

        What cannot be captured is values that come from the host, or go there.
        """
        return nullcontext()

    def run_low(
        self,
        module: nn.Module,
        forward: Any,
        call: ModelInputs,
        latent: torch.Tensor,
        sigma: Scalar,
        multiple: int,
        native: bool,
    ) -> torch.Tensor:
        """Runs the unchanged transformer on a k times smaller latent; arguments as for :meth:`low_arguments`.

        Args:
            forward: The transformer's own forward, or what wraps it.

        Returns:
            The prediction (B, C, F, H/k, W/k).
        """
        with self.placed(module, call, multiple, native):
            raw = forward(**self.low_arguments(call, latent, sigma, multiple, native))
        return self.low_output(module, call, raw, multiple)

    @abstractmethod
    def projections(self, module: nn.Module) -> PatchProjections:
        """The model's embedding and de-embedding in canonical layout."""

    def own_ends(self, module: nn.Module, call: ModelInputs) -> OwnEnds:
        """The same in the memory where the model has it, for kernels that stand in for the layers in this call.

        Raises:
            NotFusedError: they cannot; with the reason.
        """
        raise NotFusedError(f"family {self.name} keeps the ends of its models in PyTorch")

    def patch_embedding(self, module: nn.Module, multiple: int) -> PatchEmbedding:
        """PI-resized embedding and de-embedding of the model for patches of side k·p."""
        return PatchEmbedding.from_base(self.projections(module), multiple)

    def stamp(self, module: nn.Module) -> tuple[object, ...]:
        """Changes when the embedding's or de-embedding's weights are known to have changed."""
        ends = [module.get_submodule(name) for name in self.projection_names]
        weights = (weight for end in ends for weight in end.parameters())
        switches = (adapter_state(end) for end in ends if hasattr(end, "merged_adapters"))
        # weights made in inference mode count no versions
        versions = ((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights)
        return *versions, *switches

    def loras_on_ends(self, module: nn.Module) -> str:
        """Names of the ends that compute with a user's LoRA, beside their weights or fused into them; may be empty."""
        ends = {name: module.get_submodule(name) for name in self.projection_names}
        return ", ".join(name for name, end in ends.items() if active_loras(end) or getattr(end, "merged_adapters", []))

    def facts(self, module: nn.Module) -> ModelFacts:
        """What of the model an adapter depends on."""
        projections = self.projections(module)
        own = own_weight(module.get_submodule(self.projection_names[0]))
        shape = projections.embed_weight.shape
        if own is not None:
            own = self.embed_layout(own, shape) if own.numel() == shape.numel() else None
        return ModelFacts(self.name, projections, self.linear_layers(module), own, self.blocks(module))

    def blocks(self, module: nn.Module) -> int:
        """How many blocks the model has, of whatever kinds."""
        return sum(len(child) for child in module.children() if isinstance(child, nn.ModuleList))

    def embed_layout(self, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The embedding's weight as the model keeps it, in canonical layout (d, C_in, p, p), which is ``shape``."""
        return weight.reshape(shape)

    def linear_layers(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """All linear layers in use, quantised ones too, as without LoRAs: path -> (in_features, out_features)."""
        layers = dict(module.named_modules())
        # what peft wraps, and the factors beside it
        inside = tuple(f"{name}." for name, layer in layers.items() if hasattr(layer, "base_layer"))
        return {
            name: (layer.in_features, layer.out_features)  # type: ignore[misc]
            for name, layer in layers.items()
            if hasattr(layer, "in_features")
            and hasattr(layer, "out_features")
            and not name.startswith(inside)
            and not is_fused(module, name)
        }

    def target_layers(self, module: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The linear layers that ``targets`` name, in the model's order: path -> (in_features, out_features).

        Args:
            targets: Groups of :attr:`layer_groups`, or regular expressions that match whole paths (as peft's
                ``target_modules`` does with a string).

        Raises:
            ConfigError: one of them is no expression, or matches no linear layer.
        """
        layers = self.linear_layers(module)
        chosen: set[str] = set()
        for target in targets:
            try:
                found = {name for name in layers if re.fullmatch(self.layer_groups.get(target, target), name)}
            except re.error as error:
                raise ConfigError(f"targets: {target!r} is no regular expression ({error}).") from None
            if not found:
                raise ConfigError(
                    f"targets: {target!r} matches no linear layer. Groups are {', '.join(self.layer_groups)}; "
                    f"layers are named like {', '.join(list(layers)[-3:])}."
                )
            chosen |= found
        return {name: sizes for name, sizes in layers.items() if name in chosen}

    @abstractmethod
    def run_patches(
        self,
        module: nn.Module,
        forward: Any,
        call: ModelInputs,
        latent: torch.Tensor,
        sigma: Scalar | None,
        ends: PatchEnds,
        multiple: int,
        native: bool,
    ) -> torch.Tensor:
        """Runs the trunk between another embedding and de-embedding than the transformer's own.

        Args:
            forward: The transformer's own forward.
            latent: (B, C, F, H, W), padded to the grid unless the ends do without; an adapter's embedding may read more
                channels than it has. Those of a condition follow.
            sigma: One noise level, or one per sample as a tensor of B values; None with ``multiple`` 1 for the call's
                own time and positions.
            ends: Compute tokens from pixels, and the result from tokens. They may be asked more than once.

        Returns:
            What ``ends`` wrote: the prediction (B, C, F, H, W).
        """

    def trunk(self, module: nn.Module) -> Trunk:
        """The blocks and what surrounds them, for TeaCache.

        Raises:
            ConfigError: nothing is published of TeaCache for this model.
        """
        raise ConfigError(
            f"TeaCache has no published coefficients for {type(module).__name__}: leave cache=None, or take one of "
            "diffusers' caches that knows it."
        )

    @abstractmethod
    def flops(self, module: nn.Module, geometry: Geometry, multiple: int, text_tokens: int) -> float:
        """Floating-point operations of one forward per sample at ``multiple`` (2 per multiply-add)."""

    def frames_of(self, call: Mapping[str, Any]) -> int:
        """Frames that a pipeline call denoises together, from arguments as for :meth:`is_guided`; 1 for pictures."""
        video = call.get("video")
        return int(call.get("num_frames") or (len(video) if video is not None else 1))

    @abstractmethod
    def geometry(self, pipe: Any, height: int, width: int, frames: int = 1) -> Geometry:
        """The latent grid that a pipeline makes for a picture of ``height`` x ``width`` pixels."""

    def boundaries(self, pipe: Any) -> tuple[float, ...]:
        """Noise levels below which another of the pipeline's transformers takes over; none where there is one."""
        return ()

    def check_pipeline(self, pipe: Any) -> None:
        """Refuses variants of the pipeline that cannot run coarsely.

        Raises:
            UnsupportedPipelineError: with the reason.
        """
        return None


def present(*names: str) -> tuple[type, ...]:
    """The pipeline classes of these names that the installed diffusers has."""
    return tuple(getattr(diffusers, name) for name in names if hasattr(diffusers, name))


def no_result(tokens: torch.Tensor, values: int) -> torch.Tensor:
    """Something in the shape that a de-embedding gives, (B, N, ``values``), which costs nothing and is left aside."""
    return tokens.new_empty(()).expand(*tokens.shape[:2], values)


def raw_sample(raw: Any) -> Any:
    """The prediction in what a transformer's forward returns, a tuple or a diffusers output.

    Returns:
        A tensor; a list of one per sample of a transformer that takes latents so.
    """
    return raw[0] if isinstance(raw, tuple) else raw.sample
