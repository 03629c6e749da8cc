"""The fingerprint of a model: equal where the same weights are loaded, different where they are not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
from adapters import trained
from peft import LoraConfig
from torch import nn

import ddit_rt
from ddit_rt.families import fingerprint


class Net(nn.Module):
    """Small tensors, which are read whole, and a large one, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("saved", torch.arange(5.0))
        self.register_buffer("derived", torch.arange(7.0), persistent=False)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) * 2.0**-10 + i)


def test_a_known_model_has_a_known_fingerprint():
    # schedules in users' stores are found by it: it stays what it is in every process and version
    assert fingerprint(Net()) == "d01737d12e4c59ffa4298325decdbc05"


def test_two_loads_and_two_processes_agree(tmp_path):
    model = tiny.flux_transformer()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    code = (
        "from diffusers import FluxTransformer2DModel; from ddit_rt.families import fingerprint;"
        f"print(fingerprint(FluxTransformer2DModel.from_pretrained({str(tmp_path)!r})))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert fingerprint(model) == fingerprint(loaded) == other


@pytest.mark.parametrize("name", ["large.bias", "norm.weight", "saved"])
def test_one_changed_value_of_a_small_tensor_is_seen(name):
    model = Net()
    before = fingerprint(model)
    model.state_dict()[name][3] += 2**-8
    assert fingerprint(model) != before


def test_further_training_of_a_large_tensor_is_seen():
    model = Net()
    before = fingerprint(model)
    model.state_dict()["large.weight"].mul_(1 + 2**-10)
    assert fingerprint(model) != before


def test_values_that_are_not_saved_do_not_count():
    model = Net()
    before = fingerprint(model)
    model.derived += 1
    assert fingerprint(model) == before


def test_memory_layout_does_not_count():
    model, other = Net(), Net()
    other.large.weight = nn.Parameter(other.large.weight.detach().T.contiguous().T)
    assert not other.large.weight.is_contiguous() and fingerprint(other) == fingerprint(model)


def test_configuration_class_and_number_of_models_count():
    model, guided = tiny.flux_transformer(), tiny.flux_transformer()
    guided.register_to_config(axes_dims_rope=(8, 4, 4))
    found = [fingerprint(model), fingerprint(guided), fingerprint(model, guided), fingerprint(guided, model)]
    assert len(set(found)) == 4
    model.register_to_config(_name_or_path="elsewhere", a_later_setting=False, another=None)
    assert fingerprint(model) == found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_another_precision_is_another_model_and_changes_in_it_are_seen(dtype):
    model, changed = Net().to(dtype), Net()
    changed.large.weight.data += 1
    assert len({fingerprint(model), fingerprint(changed.to(dtype)), fingerprint(Net())}) == 3


def test_a_lora_beside_the_weights_does_not_count_and_a_fused_one_does():
    pipe = tiny.flux()
    model = pipe.transformer
    before = fingerprint(model)
    targets = ["to_q", "x_embedder", "proj_out"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, use_dora=True, init_lora_weights=False), "style")
    assert fingerprint(model) == before
    model.disable_adapters()
    assert fingerprint(model) == before
    model.enable_adapters()
    model.fuse_lora()
    assert fingerprint(model) != before


def test_compiling_and_accelerating_do_not_count(tmp_path):
    pipe = tiny.flux()
    before = fingerprint(pipe.transformer)
    assert fingerprint(torch.compile(pipe.transformer)) == before
    adapter = trained(pipe)
    ddit_rt.accelerate(pipe, adapter=adapter, schedule=[1, 1, 2, 0])
    pipe(**tiny.flux_inputs(steps=4))
    assert fingerprint(pipe.transformer) == before
    other = trained(pipe)
    assert fingerprint(adapter) == fingerprint(other)
    next(other.parameters()).data += 1
    assert fingerprint(adapter) != fingerprint(other)


def test_offloaded_weights_are_read_and_absent_ones_refused():
    from accelerate import cpu_offload

    model = tiny.flux_transformer()
    before = fingerprint(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.x_embedder.weight.is_meta and fingerprint(model) == before
    with torch.device("meta"):
        absent = Net()
    with pytest.raises(ddit_rt.ConfigError, match=r"Net\.large\.bias is on the meta device.*load the weights first"):
        fingerprint(absent)
    with pytest.raises(ddit_rt.ConfigError, match=r"modules=\(\)"):
        fingerprint()


class TwoParts(torch.Tensor):
    """Built of two tensors as a quantised weight is; computing with it is refused."""

    @staticmethod
    def __new__(cls, data, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
        made.data_of, made.scale = data, scale
        return made

    def __tensor_flatten__(self):
        return ["data_of", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_a_quantised_weight_is_what_it_is_made_of():
    def model(data, scale):
        layer = nn.Module()
        layer.weight = nn.Parameter(TwoParts(torch.full((4, 4), data, dtype=torch.int8), torch.tensor(scale)), False)
        return layer

    assert fingerprint(model(1, 0.5)) == fingerprint(model(1, 0.5))
    assert len({fingerprint(model(*values)) for values in [(1, 0.5), (2, 0.5), (1, 0.25)]}) == 3


def with_buffer(tensor):
    layer = nn.Module()
    layer.register_buffer("weight", tensor)
    return layer


def test_quantised_dtypes_of_torch_are_read():
    models = [with_buffer(torch.quantize_per_tensor(torch.ones(3) * x, 0.1, 0, torch.qint8)) for x in (1, 1, 2)]
    first, same, other = map(fingerprint, models)
    assert first == same != other


def test_a_weight_that_cannot_be_read_counts_with_its_name_and_shape():
    first, same, other = (fingerprint(with_buffer(torch.eye(size).to_sparse())) for size in (3, 3, 4))
    assert first == same != other
