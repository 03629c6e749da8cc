"""Stamps of model runs and steps, and the store that keeps rows."""

import json

import pytest
import torch
from pipe_timeline import Timeline, watched
from store import Store


class Event:
    """A CUDA event whose stream is one millisecond further at every record."""

    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 1
        self.at = Event.clock

    def elapsed_time(self, end):
        return float(end.at - self.at)


class Model(torch.nn.Module):
    def forward(self):
        return "result"


def test_steps_runs_and_gaps_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    plain = Model.forward
    timeline = Timeline(torch.device("cuda"))
    with watched(Model, timeline):
        model = Model()
        model()  # not recorded
        with timeline.recording():
            for _ in range(3):  # two runs a step, one of them a graph's
                assert model() == "result"
                torch.cuda.CUDAGraph.replay(model)
                timeline.on_step_end(None, 0, None, {})
            capturing.append(True)
            model()
    assert Model.forward is plain
    assert timeline.steps() == pytest.approx([5e-3] * 2)
    assert timeline.model_runs() == pytest.approx([2e-3] * 2)
    assert timeline.gaps() == pytest.approx([2e-3] * 2)  # the end of the step lies between


def test_rows_survive_and_are_measured_again_when_versions_change(tmp_path):
    path = tmp_path / "new" / "flux.json"
    store = Store(path, ("provider",), cuda=False)
    store.put({"provider": "stock", "value": 1})
    store.put({"provider": "ours", "value": 2})
    store.put({"provider": "stock", "value": 3})
    store.note("tests", {"passed": True})
    again = Store(path, ("provider",), cuda=False)
    assert {row["provider"]: row["value"] for row in again.rows} == {"ours": 2, "stock": 3}
    assert again.has(provider="stock") and not again.has(provider="other") and again.current(again.content["tests"])
    content = json.loads(path.read_text())
    content["rows"][0]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    assert not Store(path, ("provider",), cuda=False).has(provider=content["rows"][0]["provider"])
    assert not Store(path, ("provider",), cuda=False, again=True).has(provider="stock")
    assert list(path.parent.iterdir()) == [path]
