"""Inspecting a pipeline by its configuration, for every kind of pipeline that a family runs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import ModelMixin, SchedulerMixin
from specimens import SPECIMENS

from ddit_rt.pipeline import inspect_pipeline

FINDINGS = json.loads((Path(__file__).parents[2] / "docs" / "models.json").read_text(encoding="utf-8"))
# a specimen per class; some specimens' classes are their own
BY_CLASS = {FINDINGS.get(name, {}).get("pipeline", name): name for name in reversed(SPECIMENS)}
PUBLIC = [name for cls, name in BY_CLASS.items() if hasattr(diffusers, cls)]


def write_configs(pipe: Any, folder: Path) -> None:
    """Files as of a saved pipeline, without weights; parts of other libraries are named after their annotation."""
    annotations = inspect.signature(type(pipe).__init__).parameters
    index: dict[str, Any] = {"_class_name": type(pipe).__name__}
    for name, given in pipe.config.items():
        part = pipe.components.get(name)
        if isinstance(part, ModelMixin | SchedulerMixin):
            part.save_config(folder / name)
            index[name] = list(given)
        elif name in pipe.components:
            index[name] = ["transformers", getattr(annotations[name].annotation, "__name__", "PreTrainedModel")]
        elif not name.startswith("_"):
            index[name] = given
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_configuration_makes_the_pipeline_and_its_sizes(name: str, tmp_path: Path) -> None:
    specimen = SPECIMENS[name]
    pipe = specimen.make()
    write_configs(pipe, tmp_path)
    found = inspect_pipeline(str(tmp_path), *specimen.size)
    assert (found.pipeline, found.family) == (type(pipe).__name__, specimen.family.name)
    geometry = specimen.family.geometry(pipe, *specimen.size)
    assert [size.tokens for size in found.sizes] == [geometry.tokens(k) for k in specimen.family.multiples]
