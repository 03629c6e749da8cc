"""Attention back-ends: what is chosen on which card, what is refused, and that they come off again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from recorded import recorded
from specimens import SPECIMENS
from tiny import flux, flux_inputs, latents_of, wan, wan_inputs

import ddit_rt
from ddit_rt import ConfigError
from ddit_rt.pipeline import checks, inspect_pipeline
from ddit_rt.runtime import AttentionSwitch, choose_attention
from ddit_rt.runtime.attention import CUDNN, FLASH_3, unusable

SCHEDULE = (1, 1, 2, 4, 1, 0, 4, 2)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def process_backend():
    """Puts the process's own back-end back, which diffusers sets along with a transformer's."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def having(*names: str) -> Callable[[str], str]:
    return lambda name: "" if name in names else f"{name} is missing"


def backends(pipe: Any) -> set[Any]:
    processors = [getattr(layer, "processor", None) for layer in pipe.transformer.modules()]
    return {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}


@pytest.mark.parametrize(
    ("capability", "installed", "backend", "reason"),
    [
        (None, (FLASH_3, CUDNN), "native", "no CUDA device"),
        ((8, 0), (FLASH_3, CUDNN), "native", "sm_80, where nothing of the same precision that is installed is faster"),
        ((8, 9), (FLASH_3, CUDNN, "sage"), "native", "sm_89, where nothing"),
        ((9, 0), (FLASH_3, CUDNN, "sage"), "_flash_3", "sm_90, FlashAttention-3 is installed"),
        ((9, 0), (CUDNN, "sage", "flash"), "_native_cudnn", "sm_90"),
        ((9, 0), ("sage",), "native", "sm_90, where nothing"),
        ((10, 0), (FLASH_3, CUDNN), "_native_cudnn", "sm_100"),
        ((12, 0), (FLASH_3, CUDNN), "native", "sm_120, where nothing"),
    ],
)
def test_the_card_and_what_is_installed_decide(
    capability: tuple[int, int] | None, installed: tuple[str, ...], backend: str, reason: str
) -> None:
    found = choose_attention(capability, BF16, 128, True, having(*installed))
    assert found.backend == backend and found.reason.startswith(reason)
    assert found.backend in {name.value for name in AttentionBackendName}


@pytest.mark.parametrize(
    ("dtype", "width", "unmasked", "reason"),
    [
        (torch.float32, 128, True, "float32 is for PyTorch's own alone"),
        (BF16, 256, True, "256 values per head"),
        (BF16, 44, True, "44 values per head"),
        (BF16, None, True, "unknown values per head"),
        (BF16, 128, False, "the model's attention takes masks"),
    ],
)
def test_what_others_cannot_compute_is_left_to_pytorch(
    dtype: torch.dtype, width: int | None, unmasked: bool, reason: str
) -> None:
    found = choose_attention((9, 0), dtype, width, unmasked, having(FLASH_3, CUDNN))
    assert (found.backend, found.reason) == ("native", reason)


def test_diffusers_says_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    assert unusable(FLASH_3) == ""
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    assert "Please build FA3" in unusable(FLASH_3)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert unusable(CUDNN) == ""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert unusable(CUDNN) == "PyTorch has no cuDNN here."


def test_on_a_cpu_auto_is_native_and_the_report_says_so() -> None:
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, schedule=(1,) * 8, attention="auto"):
        assert backends(pipe) == {AttentionBackendName.NATIVE}
        assert torch.equal(latents_of(pipe, inputs), plain)
        report = ddit_rt.report(pipe)
    assert report.attention == "native (no CUDA device)"
    assert str(report).splitlines()[-1] == "attention: native (no CUDA device)"
    assert json.loads(report.to_json())["attention"] == report.attention
    assert backends(pipe) == {None}
    with ddit_rt.accelerated(pipe, schedule=(1,) * 8):
        latents_of(pipe, inputs)
        assert ddit_rt.report(pipe).attention == "" and "attention" not in str(ddit_rt.report(pipe))


@pytest.mark.parametrize(("make", "inputs"), [(flux, flux_inputs), (wan, wan_inputs)])
def test_the_card_is_asked_for_the_pipelines_device(
    make: Callable[..., Any], inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    pipe = make(dtype=BF16)
    pipe.transformer.register_to_config(attention_head_dim=64)
    ddit_rt.accelerate(pipe, attention="auto")
    assert backends(pipe) == {AttentionBackendName._NATIVE_CUDNN}
    ddit_rt.restore(pipe)
    assert backends(pipe) == {None}


def test_a_back_end_by_name_comes_off_bit_for_bit() -> None:
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    pipe.transformer.set_attention_backend("native")
    active = _AttentionBackendRegistry.get_active_backend()[0]
    with ddit_rt.accelerated(pipe, schedule=SCHEDULE, attention="_native_math"):
        assert backends(pipe) == {AttentionBackendName._NATIVE_MATH}
        # other models of the process are left alone
        assert _AttentionBackendRegistry.get_active_backend()[0] == active
        latents_of(pipe, inputs)
        assert ddit_rt.report(pipe).attention == "_native_math (asked for)"
    assert backends(pipe) == {AttentionBackendName.NATIVE}
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_new_settings_take_the_place_of_the_old() -> None:
    pipe = flux()
    ddit_rt.accelerate(pipe, attention="_native_math")
    ddit_rt.accelerate(pipe, attention="auto")
    assert backends(pipe) == {AttentionBackendName.NATIVE}
    with pytest.raises(ConfigError):
        ddit_rt.accelerate(pipe, attention="quick")
    assert backends(pipe) == {AttentionBackendName.NATIVE}
    ddit_rt.accelerate(pipe)
    assert backends(pipe) == {None}
    ddit_rt.accelerate(pipe, attention="auto")
    pipe.transformer.set_attention_backend("_native_math")  # by the user, later
    ddit_rt.restore(pipe)
    assert backends(pipe) == {AttentionBackendName._NATIVE_MATH}


def test_graphs_are_those_of_the_back_end() -> None:
    pipe, inputs = flux(), flux_inputs()
    wanted = latents_of(pipe, inputs)
    recording = recorded(pipe, schedule=(1,) * 8, attention="native")
    torch.testing.assert_close(latents_of(pipe, inputs), wanted, rtol=1e-4, atol=1e-4)
    captures = recording.captures
    pipe.transformer.set_attention_backend("_native_math")
    latents_of(pipe, inputs)
    assert recording.captures > captures
    ddit_rt.restore(pipe)


def test_a_failure_while_switching_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan(two=True)
    active = _AttentionBackendRegistry.get_active_backend()[0]

    def fail(_: str) -> None:
        raise OSError("the hub is away")

    monkeypatch.setattr(pipe.transformer_2, "set_attention_backend", fail)
    with pytest.raises(OSError, match="the hub is away"):
        ddit_rt.accelerate(pipe, attention="_native_math")
    assert backends(pipe) == {None} and _AttentionBackendRegistry.get_active_backend()[0] == active
    assert not hasattr(pipe.transformer.forward, "_ddit_link")


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ("quick", "attention='quick': use 'auto' or one of 'flash', "),
        ("sage", "attention='sage': Sage Attention backend 'sage' is not usable .* Or take attention='auto'"),
        (3, "attention=3: 'auto', the name of an attention back-end of diffusers, or None"),
    ],
)
def test_names_that_cannot_be_had_are_refused_before_anything_is_patched(attention: Any, said: str) -> None:
    pipe = flux()
    with pytest.raises(ConfigError, match=said):
        ddit_rt.accelerate(pipe, attention=attention)
    assert backends(pipe) == {None} and not hasattr(pipe.transformer.forward, "_ddit_link")


def test_attention_that_diffusers_cannot_exchange_is_refused() -> None:
    pipe = SPECIMENS["sd3"].make()
    with pytest.raises(ConfigError, match="SD3Transformer2DModel has no attention whose back-end diffusers can change"):
        ddit_rt.accelerate(pipe, attention="_native_math")
    with ddit_rt.accelerated(pipe, attention="auto"):
        assert backends(pipe) == set()


def test_ranks_need_a_back_end_that_divides_tokens() -> None:
    pipe = flux()
    for layer in pipe.transformer.modules():
        if hasattr(layer, "processor"):
            layer.processor._parallel_config = object()
    with pytest.raises(ConfigError, match="attention='flex' does not work on tokens that are divided among ranks"):
        ddit_rt.accelerate(pipe, attention="flex")


def test_inspection_tells_what_auto_takes() -> None:
    assert inspect_pipeline("demo", 256, 256).attention == "native (no CUDA device)"


def test_a_switch_takes_off_what_it_put_on_alone() -> None:
    pipe = flux()
    switch = AttentionSwitch([pipe.transformer], "_native_math")
    switch.take_off()
    assert backends(pipe) == {None}
    switch.put_on()
    switch.take_off()
    switch.take_off()
    assert backends(pipe) == {None}
