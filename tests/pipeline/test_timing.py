import time

import torch

from ddit_rt.pipeline.call_state import stopwatch


def test_it_measures_between_start_and_stop(monkeypatch):
    clock = iter([10.0, 12.5, 99.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stop = stopwatch(torch.device("cpu"))
    seconds = stop()
    assert seconds() == 2.5 and seconds() == 2.5
