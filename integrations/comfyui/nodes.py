"""The nodes, in the V3 schema of ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui

from ddit_rt.integrations.comfyui import attach, attached, settings

CATEGORY = "advanced/model"


class DDiTAccelerate(io.ComfyNode):
    """A model whose sampling runs skip steps, or make them on coarse tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DDiTAccelerate",
            display_name="DDiT accelerate",
            category=CATEGORY,
            description="Skips the model's call in steps that earlier predictions foretell, and corrects the gap. With "
            "a schedule file or a threshold, steps may also run on coarse tokens. For flow models; best with the "
            "sampler euler.",
            inputs=[
                io.Model.Input("model", tooltip="Flux, Flux.2, Qwen-Image, Wan, Z-Image, or another flow model."),
                io.Float.Input(
                    "speedup",
                    default=2.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Ratio of FLOP to aim at by skipping steps. At 1 the threshold decides.",
                ),
                io.String.Input(
                    "schedule",
                    default="",
                    tooltip="File that ddit-rt fit wrote, for this number of steps, or its hub id. Goes before the "
                    "speed-up. Empty: none.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    round=0.000001,
                    tooltip="τ of the DDiT paper's rule, where there is neither speed-up nor schedule; 0 leaves every "
                    "step full.",
                ),
                io.Combo.Input(
                    "multiples",
                    options=["1,2,4", "1,2", "1"],
                    default="1,2,4",
                    tooltip="Patch sizes that steps may run at, as multiples of the model's own.",
                ),
                io.Combo.Input(
                    "coarse",
                    options=["auto", "delta", "band-split", "extrapolate", "reuse"],
                    default="auto",
                    tooltip="What a coarse step computes; auto is delta.",
                ),
                io.Combo.Input(
                    "positions",
                    options=["native", "interpolated"],
                    default="native",
                    tooltip="Where coarse tokens lie: as in a smaller picture, or at the centres of the tokens that "
                    "each covers.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The accelerated model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, schedule: str | None, **inputs: Any) -> float:
        """A schedule that was fitted anew counts as another input; None is one that another node has yet to name."""
        named = (schedule or "").strip()
        path = Path(named)
        if named and path.is_dir():
            path = path / "schedule.json"
        return path.stat().st_mtime if path.is_file() else 0.0

    @classmethod
    def execute(
        cls,
        model: Any,
        speedup: float,
        schedule: str,
        threshold: float,
        multiples: str,
        coarse: str,
        positions: str,
    ) -> io.NodeOutput:
        config = settings(speedup, schedule, threshold, multiples, coarse, positions)
        return io.NodeOutput(attach(model, config, WrappersMP))


class DDiTReport(io.ComfyNode):
    """What the last sampling run of an accelerated model did."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DDiTReport",
            display_name="DDiT report",
            category=CATEGORY,
            description="Steps by patch size and an estimate of the FLOP saved, of the run that made the latent.",
            inputs=[
                io.Model.Input("model", tooltip="The output of a 'DDiT accelerate' node, or a model made from it."),
                io.Latent.Input("latent", tooltip="What the sampler made with that model: the report comes after it."),
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any]) -> io.NodeOutput:
        report = attached(model).report
        text = "no run yet: connect the latent of the sampler that uses this model." if report is None else str(report)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class DDiTExtension(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DDiTAccelerate, DDiTReport]


async def comfy_entrypoint() -> DDiTExtension:
    """What ComfyUI asks of a node pack."""
    return DDiTExtension()
