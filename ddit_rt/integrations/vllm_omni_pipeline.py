"""vLLM-Omni's diffusers adapter, accelerated: the way that patches nothing of the engine.

``vllm serve MODEL --omni --diffusion-load-format diffusers --custom-pipeline-args '{"pipeline_class":
"ddit_rt.integrations.vllm_omni_pipeline.DDiTDiffusersPipeline", "ddit": {"speedup": 2.5}}'``
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline

from ..config import DDiTConfig
from .acceleration import accelerate_for
from .settings import PluginSettings, settings_from_environment
from .vllm_omni import BACKEND, ENGINE, run_adapter


class DDiTDiffusersPipeline(DiffusersAdapterPipeline):
    """The adapter, with what it has loaded accelerated by ``DDIT_*`` variables and the entry ``ddit`` of its arguments.

    Args:
        od_config: Of the engine.
        device: Where to run; None is the engine's device of this process.

    Raises:
        ConfigError, ScheduleError: the settings are out of range; nothing is loaded yet.
    """

    accelerates_itself = True
    """For the plug-in, whose patches of the parent class then stand aside."""

    def __init__(self, *, od_config: Any, device: Any = None) -> None:
        given = (od_config.custom_pipeline_args or {}).get(BACKEND) or {}
        self._ddit_settings = (settings_from_environment() or PluginSettings(DDiTConfig())).replace(given)
        super().__init__(od_config=od_config, device=device or get_local_device())

    def load_weights(self, weights: Iterable[Any] = ()) -> None:
        """Loads the pipeline and accelerates it. ``weights`` of the engine's loader are none: it finds its own."""
        super().load_weights()
        accelerate_for(ENGINE, self._pipeline, self._ddit_settings)

    def forward(self, req: Any) -> Any:
        return run_adapter(self, req, lambda: DiffusersAdapterPipeline.forward(self, req))
