"""What a pipeline can be asked for."""

from __future__ import annotations

import pytest
from helpers.specimens import SPECIMENS

from ddit_rt.serve import ModelConfig
from ddit_rt.serve.variants import Variants


@pytest.mark.parametrize(
    "name, images",
    [("flux", 1), ("flux-kontext", 1), ("qwen-image-edit", 1), ("qwen-image-edit-plus", 16), ("flux2", 16)],
)
def test_how_many_pictures_an_edit_may_be_shown(name: str, images: int) -> None:
    if name not in SPECIMENS:
        pytest.skip("the installed diffusers has no such pipeline")
    facts = Variants(SPECIMENS[name].make(), ModelConfig(name="it", model="it")).facts()
    assert facts.edits and facts.images == images
