"""Compile every kernel at every shipped configuration for five GPU architectures, without a GPU.

    python -m ddit_kernels.aot [--arch 80 89 90 100 120] [--kernel evolution quantile embed deembed band adapter]

Prints registers, shared memory, stack and local memory of each, as the CUDA tools bundled with Triton report them, and
exits with 1 if one of them spills more than two registers (stack or local memory) or needs more shared memory than a
block of that GPU has. The kernels' own launchers build the arguments, from tensors on the meta device, so what is
checked is what runs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ddit_kernels._common import INTERPRETED, Launch
from ddit_kernels.adapter_features import features_launch
from ddit_kernels.adapter_velocity import velocity_launch
from ddit_kernels.band_rest import BandMemory, band_launch
from ddit_kernels.latent_evolution import WORKSPACE, evolution_launch, patch_counts
from ddit_kernels.patch_deembed import deembed_launch
from ddit_kernels.patch_embed import embed_launch
from ddit_kernels.patch_quantile import quantile_launch

# Shared memory one block may use, bytes (CUDA programming guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes a thread may spill: two registers of one of several configurations, among which the autotuner takes the time.
SPILL_LIMIT = 8
GPU = {80: "A100", 89: "RTX 4090", 90: "H100/H200", 100: "B200", 120: "RTX 5090"}

FLUX, WAN_480, WAN_720 = (1, 16, 128, 128), (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)


@dataclass(frozen=True)
class Row:
    """Resources of one compiled kernel; bytes, registers per thread."""

    arch: int
    kernel: str
    case: str
    warps: int
    registers: int
    shared: int
    stack: int
    local: int

    @property
    def problem(self) -> str:
        """What is wrong with it, empty if nothing is."""
        if self.stack + self.local > SPILL_LIMIT:
            return "spills"
        return "too much shared memory" if self.shared > SHARED_LIMIT[self.arch] else ""


class _Target:
    """Stands in for the CUDA driver: Triton asks it for what to compile, and nothing is ever launched."""

    arch = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels per device

    def get_current_stream(self, _: int) -> int:
        return 0


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _pack(latent: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, int]]:
    batch, channels, height, width = latent
    return (batch, height // 2 * (width // 2), channels * 4), (height // 2, width // 2)


def _evolutions() -> Iterator[tuple[str, Launch]]:
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for name, latent, sizes, dtype, order, is_packed in (
        ("FLUX packed", FLUX, (2, 4, 8), torch.float32, 3, True),
        ("FLUX packed", FLUX, (4, 8), torch.float32, 3, True),
        ("FLUX packed", FLUX, (4, 8), torch.bfloat16, 2, True),
        ("FLUX", FLUX, (2, 4, 8), torch.float32, 3, False),
        ("base patch 1", FLUX, (1, 2, 4), torch.float16, 1, False),
        ("4 channels", (2, 4, 16, 16), (2, 4), torch.float32, 3, False),
        ("Wan 480p", WAN_480, (2, 4, 8), torch.float32, 3, False),
        ("Wan 720p", WAN_720, (4, 8), torch.float32, 3, False),
        ("Wan 2.2", (1, 48, 31, 44, 80), (4, 8), torch.float32, 3, False),
    ):
        shape, grid = _pack(latent) if is_packed else (latent, None)
        increments = [_meta(*shape, dtype=dtype)] * order
        stds, decision = _meta(1, 1), _meta(1, dtype=torch.int32)
        workspace = _meta(WORKSPACE, dtype=torch.int32)
        launch = evolution_launch(increments, sizes, 0.4, 1e-3, grid, stds, decision, workspace)
        yield f"{name} {short[dtype]} order {order} sizes {','.join(map(str, sizes))}", launch


def _quantiles() -> Iterator[tuple[str, Launch]]:
    for name, (frames, height, width), sizes in (
        ("FLUX 512", (1, 64, 64), (4, 8)),
        ("FLUX 1024", (1, 128, 128), (2, 4, 8)),
        ("Wan 480p", (21, 60, 104), (4, 8)),
        ("Wan 720p", (21, 90, 160), (4, 8)),
        ("Wan 720p, streamed", (21, 90, 160), (2, 4, 8)),
    ):
        counts = patch_counts(frames, height, width, sizes)
        yield (
            f"{name} sizes {','.join(map(str, sizes))}",
            quantile_launch(_meta(1, sum(counts)), counts, sizes, 0.4, _meta(1, len(sizes))),
        )


def _embeds() -> Iterator[tuple[str, Launch]]:
    bf16 = torch.bfloat16
    for name, latent, width, size, mean, is_packed, position, dtype in (
        ("FLUX packed", FLUX, 3072, 2, 1, True, False, bf16),
        ("FLUX packed", FLUX, 3072, 4, 1, True, False, bf16),
        ("FLUX packed", FLUX, 3072, 8, 1, True, False, bf16),
        ("FLUX packed, mean", FLUX, 3072, 2, 2, True, False, bf16),
        ("FLUX packed, mean", FLUX, 3072, 2, 4, True, False, bf16),
        ("FLUX, mean", FLUX, 3072, 2, 2, False, False, bf16),
        ("FLUX, mean", FLUX, 3072, 2, 4, False, False, bf16),
        ("FLUX adapter", (1, 51, 128, 128), 3072, 4, 1, False, False, bf16),
        ("FLUX adapter", (1, 51, 128, 128), 3072, 8, 1, False, False, bf16),
        ("SD3", FLUX, 1536, 2, 1, False, True, torch.float16),
        ("Wan", WAN_480, 1536, 2, 1, False, False, bf16),
        ("Wan", WAN_480, 1536, 4, 1, False, False, bf16),
        ("Wan, edge", WAN_480, 5120, 8, 1, False, False, bf16),
        ("Wan, mean", WAN_480, 1536, 2, 2, False, False, bf16),
        ("Wan, mean, edge", WAN_480, 1536, 2, 4, False, False, bf16),
        ("FLUX float32", FLUX, 3072, 2, 1, True, True, torch.float32),
        ("FLUX float32", FLUX, 3072, 8, 1, False, False, torch.float32),
    ):
        shape, grid = _pack(latent) if is_packed else (latent, None)
        frames, side = latent[2] if len(latent) == 5 else 1, size * mean
        tokens = _meta(1, patch_counts(frames, *latent[-2:], [side])[0], width, dtype=dtype)
        launch = embed_launch(
            _meta(*shape, dtype=dtype),
            _meta(width, latent[1], size, size, dtype=dtype),
            _meta(width, dtype=dtype),
            size,
            _meta(*tokens.shape[1:], dtype=dtype) if position else None,
            _meta(width, dtype=dtype) if size > 2 else None,
            mean,
            1.0,
            _meta(1) if mean > 1 else None,
            grid,
            tokens,
        )
        yield f"{name} s={size} k={mean} d={width}", launch


def _deembeds() -> Iterator[tuple[str, Launch]]:
    bf16 = torch.bfloat16
    for name, latent, width, size, spread, is_packed, dtype in (
        ("FLUX packed", FLUX, 3072, 2, 1, True, bf16),
        ("FLUX packed", FLUX, 3072, 4, 1, True, bf16),
        ("FLUX packed", FLUX, 3072, 8, 1, True, bf16),
        ("FLUX packed, spread", FLUX, 3072, 2, 2, True, bf16),
        ("FLUX packed, spread", FLUX, 3072, 2, 4, True, bf16),
        ("FLUX, spread", FLUX, 3072, 2, 2, False, bf16),
        ("FLUX, spread", FLUX, 3072, 2, 4, False, bf16),
        ("FLUX adapter", (1, 32, 128, 128), 3072, 4, 1, False, bf16),
        ("SD3", FLUX, 1536, 2, 1, False, torch.float16),
        ("Wan", WAN_480, 1536, 2, 1, False, bf16),
        ("Wan", WAN_480, 1536, 4, 1, False, bf16),
        ("Wan", WAN_480, 5120, 8, 1, False, bf16),
        ("Wan, spread", WAN_480, 1536, 2, 4, False, bf16),
        ("FLUX float32", FLUX, 3072, 2, 1, True, torch.float32),
        ("FLUX float32", FLUX, 3072, 8, 1, False, torch.float32),
    ):
        shape, out_grid = _pack(latent) if is_packed else (latent, None)
        side, out_dtype = size * spread, torch.float32 if spread > 1 else dtype  # as the rest of band-split is
        grid = [*latent[2:-2], -(-latent[-2] // side), -(-latent[-1] // side)]
        launch = deembed_launch(
            _meta(1, torch.Size(grid).numel(), width, dtype=dtype),
            _meta(size, size, latent[1], width, dtype=dtype),
            _meta(size, size, latent[1], dtype=dtype),
            size,
            grid,
            _meta(*shape, dtype=out_dtype) if side > 2 else None,
            1.0,
            _meta(1) if spread > 1 else None,
            spread,
            out_grid,
            _meta(*shape, dtype=out_dtype),
        )
        yield f"{name} s={size} k={spread} d={width}", launch


def _bands() -> Iterator[tuple[str, Launch]]:
    bf16 = torch.bfloat16
    for name, latent, multiple, high, residuals, dtype in (
        ("FLUX", (1, 16, 1, 128, 128), 2, "line", 2, bf16),
        ("FLUX", (1, 16, 1, 128, 128), 4, "line", 2, bf16),
        ("FLUX", (1, 16, 1, 128, 128), 2, "clean", 0, bf16),
        ("FLUX", (1, 16, 1, 128, 128), 2, "latent", 0, bf16),
        ("FLUX", (1, 16, 1, 128, 128), 4, "probe", 0, bf16),
        ("Wan 480p", WAN_480, 2, "line", 2, bf16),
        ("Wan 480p, edge", WAN_480, 4, "clean", 1, torch.float32),
    ):
        rows, columns = (-(-n // (2 * multiple)) * 2 for n in latent[-2:])
        low = _meta(*latent[:3], rows, columns)
        level = _meta(1, dtype=torch.float64)
        memory = BandMemory(
            high,
            _meta(*latent, dtype=dtype),
            _meta(*latent, dtype=dtype),
            _meta(*latent, dtype=dtype),
            low if residuals else None,
            low if residuals > 1 else None,
            level,
            level,
        )
        rest = low if high == "probe" else _meta(*latent)
        launch = band_launch(
            _meta(*latent, dtype=dtype), level, multiple, (rows, columns), memory, rest, _meta(3, latent[0])
        )
        yield f"{name} k={multiple} {high} residuals={residuals}", launch


def _adapters() -> Iterator[tuple[str, Launch]]:
    bf16 = torch.bfloat16
    for name, latent, multiple, reads in (
        ("FLUX", (1, 16, 1, 128, 128), 2, True),
        ("FLUX", (1, 16, 1, 128, 128), 4, True),
        ("FLUX, no memory", (1, 16, 1, 128, 128), 2, False),
        ("Wan 480p", WAN_480, 2, True),
        ("Wan 480p, edge", WAN_480, 4, True),
    ):
        batch, channels, frames = latent[:3]
        side, level = 2 * multiple, _meta(1, dtype=torch.float64)
        rows, columns = (-(-n // side) for n in latent[-2:])
        z, factors = _meta(*latent, dtype=bf16), _meta(4, batch)
        memory = BandMemory("clean", z, z, z, level_newest=level, level_older=level)
        count = channels + (2 * channels + 3 if reads else 1)
        features = _meta(batch, count, frames, rows * side, columns * side, dtype=bf16)
        launch = features_launch(z, level, multiple, memory, _meta(batch), reads, features, factors)
        yield f"features, {name} k={multiple}", launch
        decoded = _meta(batch, 2 * channels, *features.shape[2:], dtype=bf16)
        residual = _meta(batch, frames * rows * columns, channels * side**2, dtype=bf16)
        trust = _meta(channels, dtype=bf16) if reads else None
        launch = velocity_launch(
            z, level, multiple, side, decoded, residual, trust, 20.0, memory, factors, _meta(*latent)
        )
        yield f"velocity, {name} k={multiple}", launch


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) of the one kernel in a compiled binary."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


KERNELS = {
    "evolution": _evolutions,
    "quantile": _quantiles,
    "embed": _embeds,
    "deembed": _deembeds,
    "band": _bands,
    "adapter": _adapters,
}


def check(arch: int, kernels: Sequence[str], target: _Target) -> Iterator[Row]:
    """Compile ``kernels`` for one architecture (compute capability times ten)."""
    target.arch = arch
    for kernel in kernels:
        for case, launch in KERNELS[kernel]():
            compiled: Any = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
            for one in compiled if isinstance(compiled, list) else [compiled]:
                registers, stack, local = _resources(one.asm["cubin"])
                yield Row(arch, kernel, case, one.metadata.num_warps, registers, one.metadata.shared, stack, local)


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ddit_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    options = parser.parse_args()
    if INTERPRETED:
        print("Unset TRITON_INTERPRET: interpreted kernels cannot be compiled.", file=sys.stderr)
        return 2
    target, begin, problems, total = _Target(), time.perf_counter(), 0, 0
    driver.set_active(target)
    line = "{:<7}{:<10}{:<46}{:>6}{:>6}{:>9}{:>7}{:>7}  {}"
    for arch in options.arch:
        print(
            f"\nsm_{arch} ({GPU[arch]}), shared memory limit {SHARED_LIMIT[arch]:,} bytes, Triton {triton.__version__}"
        )
        print(line.format("arch", "kernel", "case", "warps", "regs", "shared", "stack", "local", ""))
        for row in check(arch, options.kernel, target):
            print(
                line.format(
                    f"sm_{arch}", row.kernel, row.case, row.warps, row.registers, row.shared, row.stack, row.local,
                    row.problem,
                ),
                flush=True,
            )  # fmt: skip
            total, problems = total + 1, problems + bool(row.problem)
    print(f"\n{total} kernels compiled in {time.perf_counter() - begin:.0f} s, {problems} with problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
