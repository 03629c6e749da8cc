"""Zeroed counters for kernels that leave them zeroed again."""

from __future__ import annotations

import torch

from ddit_kernels._common import power_of_2

ARENA = 1 << 16  # int32 per device set aside for captured graphs

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}
_arenas: dict[torch.device, tuple[torch.Tensor, int]] = {}


def zeroed(device: torch.device, size: int) -> torch.Tensor:
    """int32 (at least ``size``,), zero, for one launch on the current stream of ``device`` that zeroes what it used.

    Launches on one stream share a buffer, so no launch pays for clearing it. A captured graph may replay on any stream
    beside others: each captured launch takes its own piece of an arena that was zeroed before the capture, and only
    when that is used up does the graph clear a buffer of its own.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        arena, used = _arenas.get(device, (None, 0))
        if arena is None or used + size > arena.numel():
            return torch.zeros(size, dtype=torch.int32, device=device)
        _arenas[device] = arena, used + size
        return arena[used : used + size]
    if device not in _arenas:
        _arenas[device] = torch.zeros(ARENA, dtype=torch.int32, device=device), 0
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept = _kept.get(key)
    if kept is None or kept.numel() < size:
        kept = _kept[key] = torch.zeros(power_of_2(size), dtype=torch.int32, device=device)
    return kept
