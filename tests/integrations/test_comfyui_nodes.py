"""The node pack for ComfyUI, loaded with doubles of what it imports there."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import tomllib
from pathlib import Path

import pytest
from comfy_api_double import load_pack
from comfyui_double import BaseModel, FlowSampling, Flux, Guider, ModelPatcher, Sampler, condition, sample_euler
from test_comfyui import levels, noise
from tiny import flux, flux_inputs, smooth

from ddit_rt.integrations.comfyui import settings

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


@pytest.fixture
def nodes(monkeypatch):
    pack = load_pack(FOLDER, monkeypatch)
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def test_the_inputs_are_those_of_the_settings(nodes):
    node = nodes["DDiTAccelerate"]
    declared = {socket.id: socket.declared for socket in node.define_schema().inputs}
    defaults = {name: value.default for name, value in inspect.signature(settings).parameters.items()}
    assert list(declared) == list(inspect.signature(node.execute).parameters) == ["model", *defaults]
    assert {name: found["default"] for name, found in declared.items() if name != "model"} == defaults
    for name in ("multiples", "coarse", "positions"):
        for option in declared[name]["options"]:
            settings(speedup=1, **{name: option})


def test_a_workflow_s_two_nodes(nodes):
    pipe, inputs = smooth(flux()), flux_inputs()
    model = ModelPatcher(BaseModel(Flux(pipe.transformer), FlowSampling()))
    (fast,) = nodes["DDiTAccelerate"].execute(model, 2.0, "", 0.0, "1,2,4", "auto", "native").args
    early = nodes["DDiTReport"].execute(fast, {"samples": None})
    assert early.args[0].startswith("no run yet")
    guider = Guider(fast, [condition(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])])
    late = nodes["DDiTReport"].execute(fast, {"samples": guider.sample(noise(), Sampler(sample_euler), levels())})
    assert late.ui.value == late.args[0] and "10 steps (5 skipped, 5 at p); 2.00x fewer FLOP" in late.args[0]
    assert nodes["DDiTReport"].define_schema().is_output_node


def test_a_schedule_that_was_written_anew_is_another_input(nodes, tmp_path):
    path, told = tmp_path / "schedule.json", nodes["DDiTAccelerate"].fingerprint_inputs
    path.write_text("{}")
    first = told(schedule=str(path), speedup=2.0)
    os.utime(path, (1, 1))
    assert told(schedule=str(path), speedup=2.0) == 1.0 != first
    assert told(schedule=str(tmp_path), speedup=2.0) == 1.0  # its folder
    assert told(schedule="", speedup=2.0) == told(schedule="owner/name", speedup=2.0) == 0.0
    assert told(schedule=None, speedup=2.0) == 0.0  # linked from a node that has not run


def test_the_pack_is_one_that_the_registry_takes():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["PublisherId"] and project["project"]["dependencies"][0].startswith("ddit-rt")


@pytest.mark.parametrize("path", sorted((FOLDER / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_the_example_workflow_is_whole(nodes, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    for number, node in graph.items():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert value[0] in graph, f"{number}.{name}"
        if node["class_type"] in nodes:
            known = [socket.id for socket in nodes[node["class_type"]].define_schema().inputs]
            assert list(node["inputs"]) == known
    assert set(nodes) <= {node["class_type"] for node in graph.values()}
