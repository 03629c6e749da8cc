"""What is done to a transformer's weights: LoRA, adapters, saving, offloading, storage in 8 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging import version
from peft import LoraConfig

from ...granularity import load_adapter, save_adapter
from ...pipeline import accelerate, accelerated, restore
from .. import denoisers, family_of, fresh_adapter
from .checks import NotRun, check
from .coarse import assert_close
from .running import coarse_run
from .specimen import Specimen, run

LORA = "kit"


def _transformer(pipe: Any) -> Any:
    return next(iter(denoisers(pipe, family_of(pipe)).values()))


def _add_lora(pipe: Any) -> None:
    torch.manual_seed(0)
    family, module = family_of(pipe), _transformer(pipe)
    names = list(family.target_layers(module, list(family.layer_groups)[:1]))
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    module.add_adapter(config, adapter_name=LORA)


@check("LoRA", "loaded before or after, disabled, fused, taken off")
def lora(specimen: Specimen) -> None:
    pipe = specimen.make()
    without = coarse_run(specimen, pipe)
    accelerate(pipe, schedule=specimen.schedule)
    _add_lora(pipe)
    after = run(pipe, specimen.arguments())
    assert not torch.equal(after, without), "a LoRA loaded after accelerate() changes nothing"
    restore(pipe)
    assert torch.equal(coarse_run(specimen, pipe), after), "before and after accelerate() differ"
    plain = run(pipe, specimen.arguments())
    with accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, specimen.arguments()), plain)
    module = _transformer(pipe)
    module.fuse_lora()
    assert_close(coarse_run(specimen, pipe), after, 1e-2, "fused")
    module.unfuse_lora()
    module.delete_adapters(LORA)
    assert_close(coarse_run(specimen, pipe), without, 1e-2, "taken off")


@check("adapter", "an untrained adapter computes what band-split computes; a trained one is saved and loaded")
def adapter(specimen: Specimen) -> None:
    pipe = specimen.make()
    torch.manual_seed(0)
    family = family_of(pipe)
    made = fresh_adapter(family, _transformer(pipe), multiples=specimen.multiples, rank=2)
    wanted = coarse_run(specimen, pipe, coarse="band-split")
    sizes: dict[str, Any] = {"multiples": (1, *specimen.multiples)}
    assert_close(coarse_run(specimen, pipe, adapter=made, **sizes), wanted, 1e-4, "fresh")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    trained = coarse_run(specimen, pipe, adapter=made, **sizes)
    assert not torch.equal(trained, wanted), "the adapter's weights change nothing"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(made, path)
        again = coarse_run(specimen, pipe, adapter=load_adapter(path), **sizes)
    assert torch.equal(again, trained)


@check("save and load", "an accelerated pipeline is saved plain, and a loaded one accelerates")
def saved(specimen: Specimen) -> None:
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    coarse = coarse_run(specimen, pipe)
    with tempfile.TemporaryDirectory() as folder:
        with accelerated(pipe, schedule=specimen.schedule):
            pipe.save_pretrained(folder)
        loaded = type(pipe).from_pretrained(folder, **{name: None for name, c in pipe.components.items() if c is None})
    loaded.set_progress_bar_config(disable=True)
    # a file's weights lie in memory otherwise, which changes the order of sums
    assert_close(run(loaded, specimen.arguments()), plain, 1e-3, "full steps")
    assert_close(coarse_run(specimen, loaded), coarse, 1e-3, "coarse steps")


@check("bfloat16", "finite, and without coarse steps the plain latents bit for bit")
def bfloat16(specimen: Specimen) -> None:
    pipe = specimen.make().to(torch.bfloat16)

    def arguments() -> dict[str, Any]:
        given = specimen.arguments()
        return {name: half(value) for name, value in given.items()}

    def half(value: Any) -> Any:
        if isinstance(value, list):
            return [half(one) for one in value]
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if floats else value

    plain = run(pipe, arguments())
    with accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, arguments()), plain)
    coarse_run(specimen, pipe, arguments())


@check("model offload", "enable_model_cpu_offload() before and after accelerate()")
def model_offload(specimen: Specimen) -> None:
    _stays(specimen, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))


@check("group offload", "enable_group_offload() on the transformer before and after accelerate()")
def group_offload(specimen: Specimen) -> None:
    cpu = torch.device("cpu")
    if torch.accelerator.current_accelerator() is None and version.parse(diffusers.__version__).release < (0, 40):
        raise NotRun(f"diffusers {diffusers.__version__} offloads groups on an accelerator only")
    _stays(
        specimen,
        lambda pipe: _transformer(pipe).enable_group_offload(cpu, cpu, offload_type="leaf_level"),
    )


def _stays(specimen: Specimen, change: Callable[[Any], Any]) -> None:
    """Plain and coarse latents are the same after a change that only moves weights, made before or after."""
    pipe = specimen.make()
    plain = run(pipe, specimen.arguments())
    coarse = coarse_run(specimen, pipe)
    accelerate(pipe, schedule=specimen.schedule)
    change(pipe)
    assert torch.equal(run(pipe, specimen.arguments()), coarse), "changed after accelerate()"
    restore(pipe)
    assert torch.equal(run(pipe, specimen.arguments()), plain), "restored"
    assert torch.equal(coarse_run(specimen, pipe), coarse), "changed before accelerate()"


@check("layerwise casting", "weights stored in float8, computed in float32")
def layerwise_casting(specimen: Specimen) -> None:
    pipe = specimen.make()
    _transformer(pipe).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=["norm"]
    )
    _as_itself(specimen, pipe, "naive")


@check("int8 weights", "torchao's int8 weight-only quantisation of the blocks")
def int8_weights(specimen: Specimen) -> None:
    _quantised(specimen, "Int8WeightOnlyConfig")


@check("fp8 weights", "torchao's float8 weight-only quantisation of the blocks")
def fp8_weights(specimen: Specimen) -> None:
    _quantised(specimen, "Float8WeightOnlyConfig")


def _quantised(specimen: Specimen, setting: str) -> None:
    """The linear layers between embedding and de-embedding in torchao's tensors, full steps and coarse ones."""
    try:
        from torchao import quantization
    except ImportError:
        raise NotRun("torchao is not installed") from None
    pipe = specimen.make()
    ends = family_of(pipe).projection_names
    quantization.quantize_(
        _transformer(pipe),
        getattr(quantization, setting)(),
        lambda layer, name: isinstance(layer, torch.nn.Linear) and not name.startswith(ends),
    )
    _as_itself(specimen, pipe, "naive")


def _as_itself(specimen: Specimen, pipe: Any, *paths: str) -> None:
    """Full steps are the pipeline's own, coarse ones run."""
    plain = run(pipe, specimen.arguments())
    with accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, specimen.arguments()), plain)
    for path in ("delta", *paths):
        coarse_run(specimen, pipe, coarse=path)
