"""Blocks for Modular Diffusers: one accelerates the pipeline it stands in, one tells what the steps were.

``ddit_rt.accelerate`` also takes a modular pipeline itself; the blocks are for pipelines that are shared as blocks, and
for settings that come with a call. Verified with diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam

from ..errors import ConfigError
from ..pipeline import accelerate, find_accelerated, report

INPUT, OUTPUT = "ddit", "ddit_report"


class DDiTAccelerateStep(ModularPipelineBlocks):
    """Accelerates the pipeline, by the call's settings; stands anywhere before the block that denoises."""

    def __init__(self) -> None:
        super().__init__()
        self._made: tuple[int, Mapping[str, Any]] | None = None

    @property
    def description(self) -> str:
        return "Makes the denoising steps that follow choose their patch size anew, or skips them (ddit_rt)."

    @property
    def inputs(self) -> list[InputParam]:
        told = 'Settings of ddit_rt.accelerate, as in {"speedup": 2.5}; {"threshold": 0} runs plain.'
        return [InputParam(INPUT, type_hint=dict, description=told)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Raises:
        ConfigError, ScheduleError, UnsupportedPipelineError: as of :func:`ddit_rt.accelerate`.
        """
        settings = self.get_block_state(state).ddit or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(f'{INPUT}={settings!r}: give settings by name, as in {{"speedup": 2.5}}.')
        found = find_accelerated(components)
        # graphs and calibrations stay as long as the settings do
        if found is None or self._made != (id(found), settings):
            accelerate(components, **settings)
            self._made = id(find_accelerated(components)), dict(settings)
        return components, state


class DDiTReportStep(ModularPipelineBlocks):
    """Tells what the steps were; stands behind the block that denoises."""

    @property
    def description(self) -> str:
        return "What the denoising steps were: size, tokens and seconds of each, and the ratio of FLOP (ddit_rt)."

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(OUTPUT, type_hint=dict, description="Report.to_dict() of ddit_rt")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Raises:
        DDiTError: the pipeline is not accelerated.
        """
        block_state = self.get_block_state(state)
        block_state.ddit_report = report(components).to_dict()
        self.set_block_state(state, block_state)
        return components, state
