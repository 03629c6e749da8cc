"""What the documentation says of the demo model of 256 pixels, and that it draws at all its sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ddit_rt
from ddit_rt.demo import DEMO_PROMPTS
from ddit_rt.evaluate.adherence import parse, read, to_pictures
from ddit_rt.pipeline import DEMO_256, SHIPPED, call_defaults, load_any

CALL = {**call_defaults(DEMO_256), "num_inference_steps": 12}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_any(DEMO_256)


def test_it_is_small_and_has_1024_tokens_at_p(pipe: Any) -> None:
    assert sum(path.stat().st_size for path in SHIPPED[DEMO_256].rglob("*") if path.is_file()) < 30e6
    with ddit_rt.accelerated(pipe, schedule=[1, 2, 4], coarse="band-split"):
        pipe(prompt="a red apple", **{**CALL, "num_inference_steps": 3, "output_type": "latent"})
        assert [step.tokens for step in ddit_rt.report(pipe).steps] == [1024, 256, 64]


@pytest.mark.parametrize("side", [256, 128, 64])
def test_what_captions_ask_for_is_drawn_at_every_size(pipe: Any, side: int) -> None:
    found = []
    for prompt in DEMO_PROMPTS.values():
        generator = torch.Generator().manual_seed(0)
        picture = pipe(prompt, generator=generator, **{**CALL, "height": side, "width": side}).images[0]
        statements = parse(prompt)
        assert statements is not None
        found.append(read(to_pictures([picture]))[0].share(statements))
    assert np.mean(found) > 0.6
