"""How long a step took, without stalling the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts timing; call the result to stop, and what that returns for the seconds in between.

    On CUDA, events mark both ends in the stream, and only reading the seconds waits for the device.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()

        def stop() -> Callable[[], float]:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return start.elapsed_time(end) / 1e3

            return seconds

        return stop

    began = time.perf_counter()

    def stop_host() -> Callable[[], float]:
        took = time.perf_counter() - began
        return lambda: took

    return stop_host
