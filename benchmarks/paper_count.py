"""What a step of the real transformers consists of: every kernel with its arithmetic and bytes, counted without data.

The transformers and ddit_rt's own coarse path run on PyTorch's meta device, as shapes; see ``on_paper.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from live_memory import Peak
from pipe_ends import make
from pipe_models import build
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ddit_rt.families import family_of
from ddit_rt.granularity import Anchor, Models, PredictionHistory
from ddit_rt.granularity.paths.band_split import BandSplitPath

MATMUL, ATTENTION, MEMORY = 0.75, 0.55, 0.8  # of the peak, reached by large kernels
MATMUL_EIGHT = 0.6  # likewise, of products in 8 bits scaled per row, which scale their results besides
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.6))  # rows, columns, share of MATMUL
QUERIES = 128  # rows of an attention's tile
KERNEL, HOST = 2e-6, 6e-6  # seconds that the smallest kernel takes replayed, and that the host takes to issue one


@dataclass(frozen=True)
class Gpu:
    """Figures of NVIDIA's data sheets, without sparsity.

    Attributes:
        flops: bf16, accumulating in float32.
        bandwidth: Bytes a second.
        eight: Operations a second in the 8 bits that the GPU is quantised to, accumulating in 32.
        attention: Share of ``flops`` that attention reaches.
        memory: Bytes.
    """

    name: str
    processors: int
    flops: float
    bandwidth: float
    eight: float = 0.0
    attention: float = ATTENTION
    memory: float = 0.0


@dataclass(frozen=True)
class Operation:
    """What one kernel has to do.

    Attributes:
        flops: 2 per multiply-add; 0 where memory decides.
        tiles: Shape of the result in rows and columns and how many of them; (0, 0, 0) without arithmetic.
        attention: Whether it is one.
        bytes: Read and written.
        eight: Whether its operands are in 8 bits.
    """

    flops: float
    tiles: tuple[int, int, int]
    attention: bool
    bytes: float
    eight: bool = False

    def seconds(self, gpu: Gpu, waves: bool = True) -> float:
        """On a GPU, replayed; without ``waves`` as if no processor ever waited for the last tiles."""
        busy = 0.0
        rows, columns, count = self.tiles
        if self.attention:
            busy = self.flops / (gpu.flops * gpu.attention * _filled(math.ceil(rows / QUERIES) * count, gpu, waves))
        elif self.flops:
            shares = (
                share * _filled(math.ceil(rows / r) * math.ceil(columns / c) * count, gpu, waves)
                for r, c, share in TILES
            )
            peak = gpu.eight * MATMUL_EIGHT if self.eight else gpu.flops * MATMUL
            busy = self.flops / (peak * max(shares))
        return max(busy, self.bytes / (gpu.bandwidth * MEMORY), KERNEL)


def _filled(tiles: int, gpu: Gpu, waves: bool) -> float:
    """Share of the processors that work, on average over the waves."""
    return 1.0 if not waves else tiles / (math.ceil(tiles / gpu.processors) * gpu.processors)


@dataclass
class Row:
    """A step at one size.

    Attributes:
        operations: As PyTorch issues them.
        fused: As a compiler would: all between two matrix products is one kernel, which reads what comes from outside
            and writes what lives on.
        peak_bytes: The most that activations hold at once.
    """

    operations: list[Operation] = field(default_factory=list)
    fused: list[Operation] = field(default_factory=list)
    peak_bytes: int = 0

    def seconds(self, gpu: Gpu, graphs: bool, compiled: bool, waves: bool = True) -> float:
        operations = self.fused if compiled else self.operations
        busy = sum(operation.seconds(gpu, waves) for operation in operations)
        return busy if graphs else max(busy, HOST * len(operations))


class _Noting(TorchDispatchMode):
    """Notes every operation that launches a kernel, and the storages that live."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self._row = row
        self._made = Peak()
        self._read: dict[StorageWeakRef, int] = {}  # by the chain since the last matrix product, from outside it
        self._written: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if _is_free(function):
            return result
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        flops, tiles = 0.0, (0, 0, 0)
        if function.overloadpacket in flop_registry:
            flops = float(flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result))
            *lead, rows, columns = outputs[0].shape
            tiles = (rows, columns, math.prod(lead))
        self.note(flops, tiles, inputs, outputs)
        return result

    def note(
        self,
        flops: float,
        tiles: tuple[int, int, int],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        attention: bool = False,
    ) -> None:
        operation = Operation(flops, tiles, attention, sum(map(_size, inputs)) + sum(map(_size, outputs)))
        row, new = self._row, {StorageWeakRef(t.untyped_storage()): _size(t) for t in outputs}
        row.operations.append(operation)
        if flops:
            self.flush()
            row.fused.append(operation)
        else:
            known = {StorageWeakRef(t.untyped_storage()): _size(t) for t in inputs}
            self._read |= {storage: size for storage, size in known.items() if storage not in self._written}
            self._written |= new
        self._made.add(new)
        row.peak_bytes = self._made.bytes

    def flush(self) -> None:
        """Ends a chain of operations that a compiler would fuse."""
        if self._read or self._written:
            lives_on = sum(size for storage, size in self._written.items() if not storage.expired())
            self._row.fused.append(Operation(0.0, (0, 0, 0), False, sum(self._read.values()) + lives_on))
        self._read, self._written = {}, {}


class _Fused(TorchFunctionMode):
    """Attention and RMS norms are one kernel each on a GPU; the meta device would take them apart."""

    def __init__(self, noting: _Noting) -> None:
        super().__init__()
        self._noting = noting

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) > 2 else (kwargs["query"], kwargs["key"], kwargs["value"])
            result = query.new_empty(*query.shape[:-1], value.shape[-1])
            batch, heads, rows, width = query.shape
            flops = 4.0 * batch * heads * rows * key.shape[2] * width
            self._noting.note(flops, (rows, width, batch * heads), [query, key, value], [result], attention=True)
            return result
        if function is torch.nn.functional.rms_norm:
            result = torch.empty_like(args[0])
            self._noting.note(0.0, (0, 0, 0), [args[0]], [result])
            return result
        return function(*args, **kwargs)


def _is_free(function: Any) -> bool:
    """Views, and what only allocates."""
    name = function.overloadpacket.__name__
    returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    return returns_view or name in ("_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes that are read: those of an expanded tensor once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def _noted() -> Iterator[Row]:
    row = Row()
    noting = _Noting(row)
    with torch.no_grad(), noting, _Fused(noting):
        yield row
        noting.flush()


@cache
def rows(model: str, text: int = 512, batch: int = 1) -> dict[int, Row]:
    """Multiple -> a step of one transformer call: the plain forward at 1, delta with two known anchors beyond.

    Args:
        model: ``"flux"`` or ``"wan"``.
        text: Tokens of the text condition.
        batch: Samples of the call; 2 where both calls of guidance are one.
    """
    return rows_of(model, *build(model, torch.device("meta"), tiny=False), text, batch)


def rows_of(model: str, pipe: Any, inputs: Mapping[str, Any], text: int, batch: int = 1) -> dict[int, Row]:
    """:func:`rows` for a pipeline of the model's kind on the meta device, and a call's arguments."""
    family, base = family_of(pipe), pipe.transformer
    geometry = family.geometry(pipe, inputs["height"], inputs["width"], inputs.get("num_frames", 1))
    arguments = _arguments(model, geometry, text, batch)
    found = {}
    with _noted() as found[1]:
        raw = base(**arguments)
    call = family.parse(base, arguments)
    full = family.output(base, call, raw)
    for k in (2, 4):

        def low(latent: torch.Tensor, sigma: Any, multiple: int) -> torch.Tensor:
            given = family.low_arguments(call, latent, sigma, multiple, True)
            return family.low_output(base, call, base(**given), multiple).float()

        models = Models(low=low, tokens=low)
        path = BandSplitPath(delta=True, extrapolate=True, line=True)
        trajectory = PredictionHistory()
        for sigma in (0.9, 0.8):
            anchor = Anchor(sigma, call.latent, full, models)
            anchor.residuals[k] = path.missed(anchor, k, call.geometry)
            trajectory.add_full(anchor)
        with _noted() as found[k]:
            prediction = path.predict(trajectory, call.latent, 0.7, k, call.geometry, models)
            family.wrap(base, call, prediction.to(call.latent.dtype))
    return found


def end(model: str, which: str) -> Row:
    """What stands before or behind the denoising steps of a request.

    Args:
        model: ``"flux"`` or ``"wan"``.
        which: One of :data:`pipe_ends.ENDS`.
    """
    run = make(model, which, torch.device("meta"), tiny=False)
    with _noted() as row:
        run()
    return row


def _arguments(model: str, geometry: Any, text: int, batch: int) -> dict[str, Any]:
    """Of a transformer call as the pipeline makes it, without data."""

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    whole = torch.empty(batch, device="meta")
    if model == "wan":
        latent = half(batch, geometry.channels, geometry.frames, geometry.height, geometry.width)
        return {
            "hidden_states": latent,
            "timestep": whole,
            "encoder_hidden_states": half(batch, text, 4096),
            "return_dict": False,
        }
    tokens = geometry.tokens(1)
    ids = half(tokens, 3)
    ids._ddit_grid = geometry.grid(1)  # type: ignore[attr-defined]  # there are no values to read it from
    return {
        "hidden_states": half(batch, tokens, 4 * geometry.channels),
        "timestep": half(batch),
        "guidance": whole,
        "pooled_projections": half(batch, 768),
        "encoder_hidden_states": half(batch, text, 4096),
        "txt_ids": half(text, 3),
        "img_ids": ids,
        "return_dict": False,
    }
