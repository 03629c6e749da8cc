"""What a model watch notices, on the real transformers and the real ways in which users change them."""

import operator
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from tiny import flux_transformer, wan_transformer

from ddit_rt.runtime.model_state import ModelState, _flags_getter, ambient, wrapped_forward


def lora(model, name, seed):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name=name)
    model.requires_grad_(False)


def watched(model):
    return model, ModelState(model)


def seen(watch):
    watch.refresh()
    return watch.version, watch.switches, ambient()


@pytest.mark.parametrize("make", [flux_transformer, wan_transformer])
def test_nothing_changes_by_itself_or_in_place(make):
    model, watch = watched(make().eval())
    before = seen(watch)
    model.proj_out.weight.mul_(2)
    model.eval()
    model.to("cpu")
    assert seen(watch) == before and watch.obstacle == ""


def set_data(model):
    model.proj_out.weight.data = model.proj_out.weight.data.clone()


def set_strides(model):
    weight = model.proj_out.weight
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


CHANGES = {
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "data": set_data,
    "strides": set_strides,
    "new parameter": lambda model: setattr(model.proj_out, "bias", torch.nn.Parameter(model.proj_out.bias.clone())),
    "new module": lambda model: setattr(model, "proj_out", torch.nn.Linear(32, 16)),
    "new buffer": lambda model: model.register_buffer("more", torch.ones(1)),
    "load LoRA": lambda model: lora(model, "style", 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_moved_weights_and_new_layers_make_a_new_version(name):
    model, watch = watched(flux_transformer())
    before = watch.version
    CHANGES[name](model)
    assert seen(watch)[0] > before
    assert seen(watch) == seen(watch)


def test_switching_loras_changes_the_switches_and_back():
    model, watch = watched(flux_transformer())
    lora(model, "first", 0)
    lora(model, "second", 1)
    states = {}
    for name, switch in {
        "first": lambda: model.set_adapter("first"),
        "second": lambda: model.set_adapter("second"),
        "both": lambda: model.set_adapter(["first", "second"]),
        "weaker": lambda: model.set_adapters(["first", "second"], weights=[0.5, 1.0]),
        "off": lambda: model.disable_adapters(),
        "on": lambda: model.enable_adapters(),
    }.items():
        switch()
        states[name] = seen(watch)
    assert states["on"] == states["weaker"]
    assert len({state[1] for state in states.values()}) == 5 and len({state[0] for state in states.values()}) == 1
    model.set_adapters(["first", "second"], weights=[1.0, 1.0])
    assert seen(watch) == states["both"]


def test_fusing_and_unloading_are_noticed():
    model, watch = watched(flux_transformer())
    lora(model, "style", 0)
    loaded = seen(watch)
    model.fuse_lora()
    fused = seen(watch)
    model.unfuse_lora()
    assert seen(watch)[1] == loaded[1] != fused[1]
    model.unload_lora()
    assert seen(watch)[0] > fused[0]


def test_a_scale_passed_with_a_call_leaves_no_trace():
    model, watch = watched(flux_transformer())
    lora(model, "style", 0)
    before = seen(watch)
    layer = model.transformer_blocks[0].attn.to_q
    for scale in (0.3, 0.7, 1.1):
        layer.scale_layer(scale)
        layer.unscale_layer(scale)
    assert seen(watch) == before


def test_attention_backends_are_switches():
    model, watch = watched(flux_transformer())
    before = seen(watch)
    with attention_backend("native"):  # also sets the process's own, so that is put back
        model.set_attention_backend("_native_math")
        assert seen(watch)[1] != before[1] and seen(watch)[2] != before[2] and watch.obstacle == ""
        model.reset_attention_backend()
    assert seen(watch) == before
    with attention_backend("_native_math"):
        assert seen(watch) != before
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert seen(watch) != before
    # torch.autocast("cuda") turns itself off without CUDA; the flag it sets does not
    torch.set_autocast_enabled("cuda", True)
    try:
        assert ambient() != before[2]
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen(watch) == before


@pytest.fixture
def put_back():
    """Gives attributes of torch.backends a value, and at the end the one they had."""
    before = []

    def change(name, value):
        path, _, attribute = name.rpartition(".")
        owner = operator.attrgetter(path)(torch.backends) if path else torch.backends
        if not hasattr(owner, attribute):
            pytest.skip(f"torch {torch.__version__} has no torch.backends.{name}")
        before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    yield change
    for owner, attribute, value in reversed(before):
        setattr(owner, attribute, value)


@pytest.mark.parametrize("name", ["fp32_precision", "cuda.matmul.fp32_precision"])
def test_the_newer_settings_of_tf32_are_read(put_back, name):
    """After them PyTorch's older getters raise."""
    before = ambient()
    put_back(name, "tf32")
    assert ambient() != before


def test_before_the_newer_settings_the_older_are_read():
    cudnn = SimpleNamespace(allow_tf32=False, enabled=True, benchmark=False, deterministic=True)
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)), cudnn=cudnn)
    assert _flags_getter(backends)(backends) == (True, False, True, False, True)


@pytest.mark.parametrize(
    "name, value",
    {
        "cudnn.allow_tf32": False,
        "cudnn.conv.fp32_precision": "ieee",
        "cudnn.enabled": False,
        "cudnn.benchmark": True,
        "cudnn.deterministic": True,
        "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
        "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
        "cuda.matmul.allow_fp16_accumulation": True,
    }.items(),
)
def test_settings_that_choose_kernels_are_read(put_back, name, value):
    before = ambient()
    put_back(name, value)
    assert ambient() != before


def test_deterministic_algorithms_are_read():
    before = ambient()
    torch.use_deterministic_algorithms(True)
    try:
        assert ambient() != before
    finally:
        torch.use_deterministic_algorithms(False)
    assert ambient() == before


def test_training_is_a_switch():
    model, watch = watched(wan_transformer().eval())
    before = seen(watch)
    model.blocks[0].train()
    assert seen(watch)[0] == before[0] and watch.switches != before[1]
    model.eval()
    assert seen(watch) == before


def test_quantised_weights_are_watched_inside():
    class Packed(torch.Tensor):
        """A weight in two plain tensors, as torchao keeps them."""

        @staticmethod
        def __new__(cls, values, scale):
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

        def __init__(self, values, scale):
            self.values, self.scale = values, scale

        def __tensor_flatten__(self):
            return ["values", "scale"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Packed(**inner)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*(a.values * a.scale if isinstance(a, Packed) else a for a in args), **(kwargs or {}))

    model = torch.nn.Module()
    weight = Packed(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1))
    model.register_buffer("weight", weight)
    watch = ModelState(model)
    before = seen(watch)
    weight.scale.mul_(2)
    assert seen(watch) == before
    weight.values = weight.values.clone()
    assert seen(watch)[0] > before[0]


# -- obstacles ------------------------------------------------------------------------------------------------------


def test_offload_hooks_are_obstacles_until_they_are_gone():
    for child in (None, "proj_out"):
        model, watch = watched(flux_transformer())
        module = model if child is None else model.get_submodule(child)
        add_hook_to_module(module, CpuOffload(execution_device="cpu"))
        watch.refresh()
        assert "accelerate" in watch.obstacle and (child or "FluxTransformer2DModel") in watch.obstacle
        remove_hook_from_module(module)
        watch.refresh()
        assert watch.obstacle == ""


def test_hooks_of_diffusers_are_obstacles_until_they_are_gone():
    model, watch = watched(flux_transformer())
    with model.cache_context("cond"):  # makes an empty registry, as every pipeline does
        assert watch.obstacle == ""
    model.enable_cache(FirstBlockCacheConfig())
    watch.refresh()
    assert "hooks of diffusers" in watch.obstacle
    model.disable_cache()
    watch.refresh()
    assert watch.obstacle == ""


def test_forward_hooks_and_replaced_forwards_are_obstacles():
    model, watch = watched(wan_transformer())
    handle = model.blocks[1].register_forward_hook(lambda *args: None)
    watch.refresh()
    assert watch.obstacle == "blocks.1 has forward hooks"
    handle.remove()
    model.blocks[0].forward = lambda *args: args[0]
    watch.refresh()
    assert watch.obstacle.startswith("blocks.0 has its forward replaced")


def test_foreign_attention_processors_are_obstacles():
    class Mine:
        def __call__(self, attn, *args, **kwargs):
            return args

    model, watch = watched(flux_transformer())
    model.transformer_blocks[0].attn.processor = Mine()
    watch.refresh()
    assert "Mine" in watch.obstacle


def test_the_forward_itself_may_be_the_class_s_own_or_compiled():
    model = wan_transformer()
    assert wrapped_forward(model.forward, model) == ""
    assert wrapped_forward(torch.compile(model, backend="eager").forward, model) == ""
    assert "replaced by" in wrapped_forward(lambda *args: None, model)
    model.forward = lambda *args: None
    assert "WanTransformer3DModel" in wrapped_forward(model.forward, model)
