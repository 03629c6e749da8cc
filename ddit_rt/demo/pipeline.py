"""The shipped demo model: `load_pipeline()` and how to call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from ..pipeline import DEMO, DEMO_256, DEMO_VIDEO, SHIPPED, call_defaults, example_prompts

MODEL_DIR = SHIPPED[DEMO]

DEMO_PROMPTS: dict[str, str] = example_prompts(DEMO)
"""Prompts inside the grammar of the training captions, from the plainest to the most detailed."""

CALL_DEFAULTS: dict[str, Any] = call_defaults(DEMO)
"""Keyword arguments for calling the demo pipeline: sizes in pixels; classifier-free guidance, none distilled."""

ADAPTER = MODEL_DIR / "adapter.safetensors"
"""The trained adapter that ships with the model."""

_SCHEDULES = Path(__file__).parent / "schedules"

FITTED = {speedup: _SCHEDULES / f"50-steps-{speedup}x.json" for speedup in (2, 3)}
"""Ratio of FLOP -> the schedule of 50 steps that `ddit-rt fit demo --speedup ...` found."""

FITTED_ADAPTER = {speedup: _SCHEDULES / f"50-steps-{speedup}x-adapter.json" for speedup in (2, 3)}
"""The same with `--adapter`, for the adapter's coarse steps."""

_CAPTIONS = Path(__file__).parent / "distill_prompts.txt"

DISTILL_PROMPTS = {
    DEMO: _CAPTIONS,
    DEMO_256: _CAPTIONS,
    DEMO_VIDEO: _CAPTIONS.with_name("distill_video_prompts.txt"),
}
"""Shipped model -> captions that the scenes of its ``examples`` draw, one a line, to distill an adapter on."""

DEMO_THRESHOLD = 2e-3
"""τ of the demo at 50 steps."""


def load_pipeline(dtype: torch.dtype = torch.float32, path: Path | str = MODEL_DIR) -> FluxPipeline:
    """Load the demo `FluxPipeline` from the package (or from another export at `path`) without any download."""
    if not (Path(path) / "model_index.json").exists():
        raise FileNotFoundError(
            f"{path} holds no pipeline: train one with python -m examples.demo_model.train --out RUN"
        )
    return FluxPipeline.from_pretrained(str(path), dtype=dtype, local_files_only=True)
