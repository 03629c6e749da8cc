"""vLLM-Omni's diffusers adapter with the plug-in, in process: it has no platform for CPUs, so no server starts there.

python tests/engines/vllm_omni_adapter.py backend | environment | pipeline-class
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

if len(sys.argv) > 1 and sys.argv[1] == "environment":
    os.environ["DDIT_SPEEDUP"] = "3"

import numpy as np
import torch
from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker import diffusion_model_runner as runner
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.plugins import load_omni_general_plugins

import ddit_rt
from ddit_rt.integrations import vllm_omni as plugin

MODEL = str(Path(ddit_rt.__file__).parent / "demo" / "model")
SCHEDULE = [1, 1, 1, 1, 4, 4, 1, 2, 2, 1, 0, 0, 1, 0, 0, 1]


def config(**more: Any) -> Any:
    return OmniDiffusionConfig.from_kwargs(model=MODEL, diffusion_load_format="diffusers", dtype="float32", **more)


def loaded(settings: Any) -> Any:
    adapter = DiffusersAdapterPipeline(od_config=settings, device=torch.device("cpu"))
    adapter.load_weights()
    adapter._pipeline.set_progress_bar_config(disable=True)
    return adapter


def picture(adapter: Any, **extra: Any) -> np.ndarray:
    sampling = OmniDiffusionSamplingParams(
        seed=3,
        num_inference_steps=len(SCHEDULE),
        height=128,
        width=128,
        guidance_scale=1.0,
        generator_device="cpu",
        output_type="np",
    )
    sampling.extra_args = extra
    request = OmniDiffusionRequest(prompt="zebras behind a fence", sampling_params=sampling, request_id="one")
    return np.asarray(adapter.forward(DiffusionRequestBatch(requests=[request])).output[0], np.float64)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(((one - other) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def backend() -> None:
    """``--cache-backend ddit``, through the engine's own selector."""
    settings = config(cache_backend="ddit", cache_config={"speedup": 2.5})
    adapter = loaded(settings)
    plain = picture(adapter)
    ours = runner.get_cache_backend(settings.cache_backend, settings.cache_config)
    ours.enable(adapter)
    ours.refresh(adapter, len(SCHEDULE))
    assert ours.is_enabled()
    first = picture(adapter)
    report = ddit_rt.report(adapter._pipeline)
    assert 2.3 < report.speedup_estimate < 2.9 and 0 in report.schedule and psnr(plain, first) > 15
    print(f"cache back-end: {report.summary()['sizes']}, {psnr(plain, first):.1f} dB to plain")
    mixed = picture(adapter, ddit={"schedule": SCHEDULE})
    assert ddit_rt.report(adapter._pipeline).schedule == SCHEDULE and psnr(plain, mixed) > 20
    assert np.array_equal(picture(adapter, ddit={"speedup": 1}), plain)
    assert np.array_equal(picture(adapter), first)
    refused(lambda: picture(adapter, ddit={"speedup": 0.2}), "speedup")
    refused(lambda: loaded(config(cache_backend="ddit", cache_config={"speed": 2})), "speed")
    refused(lambda: loaded(config(cache_backend="tea_cache")), "cache")


def environment() -> None:
    """``DDIT_SPEEDUP`` and no cache back-end."""
    adapter = loaded(config())
    picture(adapter)
    assert 2.7 < ddit_rt.report(adapter._pipeline).speedup_estimate < 3.4


def pipeline_class() -> None:
    """The class that patches nothing, loaded by the engine."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    name = "ddit_rt.integrations.vllm_omni_pipeline.DDiTDiffusersPipeline"
    settings = config(custom_pipeline_args={"pipeline_class": name, "ddit": {"speedup": 4}})
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        adapter = DiffusersPipelineLoader(LoadConfig(), od_config=settings).load_model(
            load_device="cpu",
            load_format="custom_pipeline",
            custom_pipeline_name=name,
            device=torch.device("cpu"),
        )
    picture(adapter)
    assert 3.6 < ddit_rt.report(adapter._pipeline).speedup_estimate < 4.4


def refused(call: Any, told: str) -> None:
    try:
        call()
    except Exception as error:
        assert told in str(error), error
    else:
        raise AssertionError(f"not refused: {told}")


if __name__ == "__main__":
    load_omni_general_plugins()
    chosen = selector.get_cache_backend
    plugin.register()  # a second time, as the engine may
    assert selector.get_cache_backend is chosen
    {"backend": backend, "environment": environment, "pipeline-class": pipeline_class}[sys.argv[1]]()
    print(f"vLLM-Omni, {sys.argv[1]}: as it should be")
