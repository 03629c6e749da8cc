"""What a pipeline can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.specimens import SPECIMENS

from ddit_rt.serve import ModelConfig
from ddit_rt.serve.variants import Variants
from ddit_rt.serve.work import Work


@pytest.mark.parametrize(
    "name, images",
    [("flux", 1), ("flux-kontext", 1), ("qwen-image-edit", 1), ("qwen-image-edit-plus", 16), ("flux2", 16)],
)
def test_how_many_pictures_an_edit_may_be_shown(name: str, images: int) -> None:
    if name not in SPECIMENS:
        pytest.skip("the installed diffusers has no such pipeline")
    facts = Variants(SPECIMENS[name].make(), ModelConfig(name="it", model="it")).facts()
    assert facts.edits and facts.images == images


@pytest.mark.parametrize("name, strength", [("flux", True), ("flux-kontext", False)])
def test_whether_an_edit_runs_a_part_of_the_steps(name: str, strength: bool) -> None:
    variants = Variants(SPECIMENS[name].make(), ModelConfig(name="it", model="it"))
    assert variants.facts().strength is strength
    work = Work("req", "x", 0, 64, 64, 8, 0.0, kind="edit", images=(b"",), strength=0.5)
    assert variants.strength(work) == (0.5 if strength else None)
    own = Variants(SPECIMENS[name].make(), ModelConfig(name="it", model="it", call={"strength": 0.3}))
    assert own.strength(replace(work, strength=None)) == (0.3 if strength else None)
