"""Batches, stopping, memory that runs out: the engine without HTTP."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddit_rt import ConfigError
from ddit_rt.serve import ModelConfig
from ddit_rt.serve.encode import picture_bytes
from ddit_rt.serve.engine import Engine
from ddit_rt.serve.errors import ApiError
from ddit_rt.serve.loading import load, warm
from ddit_rt.serve.uploads import mask_of
from ddit_rt.serve.work import Event, Work


def _work(seed: int = 0, prompt: str = "a red apple", seconds: float = 60, **more: Any) -> Work:
    fields = {"width": 64, "height": 64, "steps": 6, **more}
    return Work("req", prompt, seed, deadline=time.time() + seconds, **fields)


def _run(test: Callable[[Engine], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def around() -> Any:
        engine = load(ModelConfig(name="demo", model="demo", sizes=("64x64",), **settings), waiting=32)
        await engine.start()
        try:
            return await test(engine)
        finally:
            await engine.close()

    return asyncio.run(around())


async def _done(engine: Engine, work: Work) -> Event:
    async with aclosing(engine.run(work)) as events:
        async for event in events:
            last = event
    return last


async def _idle(engine: Engine) -> None:
    """Waits until nothing runs: a result is there a moment before its batch is over."""
    end = time.monotonic() + 10
    while engine.busy():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def _pixels(event: Event) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(event.data))).astype(int)


def test_a_picture_does_not_depend_on_its_batch_mates() -> None:
    works = [
        _work(i, prompt, settings=(("speedup", 2.0),)) for i, prompt in enumerate(("zebras", "a blue ball", "", "x"))
    ]

    async def test(engine: Engine) -> None:
        alone = [await _done(engine, work) for work in works]
        together = await asyncio.gather(*(_done(engine, work) for work in works))
        assert [event.facts["batch"] for event in alone] == [1] * 4
        assert [event.facts["batch"] for event in together] == [4] * 4
        for one, other in zip(alone, together):
            assert np.abs(_pixels(one) - _pixels(other)).max() <= 1
        assert np.abs(_pixels(alone[0]) - _pixels(alone[1])).max() > 50

    _run(test, batch_wait=0.2)


@pytest.mark.parametrize("kind", ["edit", "inpaint"])
def test_every_edit_of_a_batch_starts_from_its_own_picture(kind: Any) -> None:
    generator = np.random.default_rng(0)
    whole = [generator.integers(0, 255, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(3)]
    pictures = [picture_bytes(pixels, "png") for pixels in whole]
    masks: list[bytes | None] = [None] * 3
    if kind == "inpaint":
        opened = [np.where(np.arange(64)[:, None] // 16 == band, 255, 0) for band in range(3)]
        masks = [mask_of(Image.fromarray(band.repeat(64, 1).astype(np.uint8)), (64, 64)) for band in opened]
    works = [_work(3, kind=kind, images=(data,), mask=mask, strength=0.5) for data, mask in zip(pictures, masks)]

    async def test(engine: Engine) -> None:
        alone = [_pixels(await _done(engine, work)) for work in works]
        events = await asyncio.gather(*(_done(engine, work) for work in works))
        assert [event.facts["batch"] for event in events] == [3] * 3
        together = [_pixels(event) for event in events]
        for place, picture in enumerate(together):
            assert np.abs(picture - alone[place]).max() <= 1
            differences = [np.abs(picture - pixels).mean() for pixels in whole]
            assert differences.index(min(differences)) == place

    _run(test, batch_wait=0.2)


def test_a_schedule_has_the_steps_that_an_edits_strength_leaves() -> None:
    picture = picture_bytes(np.zeros((64, 64, 3), np.uint8), "png")

    def edit(schedule: tuple[int, ...], strength: float | None) -> Work:
        fields = {"kind": "edit", "images": (picture,), "strength": strength, "steps": 8}
        return _work(settings=(("schedule", schedule),), **fields)

    async def test(engine: Engine) -> None:
        for schedule, strength in (((1, 2, 0, 1), 0.5), ((1, 2, 0, 0, 1), None), ((1, 0) * 4, 1.0)):
            event = await _done(engine, edit(schedule, strength))
            assert event.facts["steps"] == list(schedule)
        for schedule, strength in (((1,) * 8, 0.5), ((1,) * 5, 1.0)):
            with pytest.raises(ApiError, match=f"has {len(schedule)} entries") as caught:
                await _done(engine, edit(schedule, strength))
            assert caught.value.status == 400
        with pytest.raises(ApiError) as caught:  # a strength shortens no picture that starts from none
            await _done(engine, _work(settings=(("schedule", (1, 1)),), strength=0.5))
        assert (caught.value.status, caught.value.param) == (400, "schedule")

    _run(test)


def test_blocks_in_few_bits_are_served() -> None:
    pytest.importorskip("torchao")

    async def draw(engine: Engine) -> np.ndarray:
        pipe = engine.variants.pipe
        kinds = {type(block.attn.to_q.weight).__name__ for block in pipe.transformer.transformer_blocks}
        assert ("Parameter" in kinds) != ("Int8Tensor" in kinds)
        return _pixels(await _done(engine, _work()))

    exact, eight = _run(draw), _run(draw, quantize="int8")
    assert not np.array_equal(exact, eight) and np.abs(exact - eight).mean() < 16
    with pytest.raises(ConfigError, match=r"fp8.* cannot be had on cpu"):
        load(ModelConfig(name="demo", model="demo", quantize="fp8", device="cpu"), waiting=1)


def test_out_of_memory_halves_the_batch_and_is_learnt() -> None:
    sizes: list[int] = []

    async def test(engine: Engine) -> None:
        inner = engine.variants.arguments

        def scarce(works: Any) -> Any:
            sizes.append(len(works))
            if len(works) > 2:
                raise torch.OutOfMemoryError("no memory")
            return inner(works)

        engine.variants.arguments = scarce  # type: ignore[method-assign]
        events = await asyncio.gather(*(_done(engine, _work(seed)) for seed in range(4)))
        assert [event.facts["seed"] for event in events] == [0, 1, 2, 3]
        assert sizes == [4, 2, 2]
        sizes.clear()
        await asyncio.gather(*(_done(engine, _work(seed)) for seed in range(4)))
        assert sizes == [2, 2]

    _run(test, batch_wait=0.2)


def test_what_does_not_fit_alone_is_refused_and_the_next_is_done() -> None:
    async def test(engine: Engine) -> None:
        inner = engine.variants.arguments

        def scarce(works: Any) -> Any:
            if works[0].width > 64:
                raise torch.OutOfMemoryError("no memory")
            return inner(works)

        engine.variants.arguments = scarce  # type: ignore[method-assign]
        with pytest.raises(ApiError) as caught:
            await _done(engine, _work(width=128))
        assert (caught.value.status, caught.value.code) == (507, "out_of_memory")
        assert (await _done(engine, _work())).type == "done"

    _run(test)


def test_who_stops_listening_frees_the_device_within_a_step() -> None:
    async def test(engine: Engine) -> None:
        calls: list[int] = []
        inner = engine.variants.pipe.transformer.forward
        hook = engine.variants.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
        assert inner is not None
        events = engine.run(_work(steps=100, settings=(("threshold", 0.0),)))
        assert (await anext(events)).type == "accepted"
        while len(calls) < 4:
            await asyncio.sleep(0.01)
        await events.aclose()
        made = len(calls)
        began = time.monotonic()
        await _done(engine, _work(steps=2, settings=(("threshold", 0.0),)))
        # guidance calls the transformer twice a step: one step was under way, one more may have begun
        assert len(calls) - made <= 2 * 2 + 2 * 2
        assert time.monotonic() - began < 30
        hook.remove()

    _run(test)


def test_a_batch_goes_on_for_those_who_still_wait() -> None:
    async def test(engine: Engine) -> None:
        alone = await _done(engine, _work(7, steps=12))
        await _idle(engine)
        gone, stays = engine.run(_work(6, steps=12)), engine.run(_work(7, steps=12))
        await anext(gone)
        await anext(stays)
        while not engine._running:
            await asyncio.sleep(0.005)
        assert len(engine._running) == 2
        await gone.aclose()
        last = [event async for event in stays][-1]
        assert np.abs(_pixels(last) - _pixels(alone)).max() <= 1

    _run(test, batch_wait=0.1)


def test_a_deadline_ends_waiting_and_running() -> None:
    async def test(engine: Engine) -> None:
        long = asyncio.create_task(_done(engine, _work(steps=100, seconds=0.6, settings=(("threshold", 0.0),))))
        await asyncio.sleep(0.2)
        with pytest.raises(ApiError, match="in time") as caught:  # waits behind it for too long
            await _done(engine, _work(steps=3, seconds=0.1))
        assert caught.value.status == 504
        with pytest.raises(ApiError, match="in time"):
            await long
        assert (await _done(engine, _work(steps=2))).type == "done"
        await _idle(engine)

    _run(test)


def test_an_error_in_the_pipeline_is_the_requests_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(ApiError) as caught:
            await _done(engine, _work(settings=(("speedup", 5.9),)))
        assert (caught.value.status, caught.value.param) == (400, "speedup")
        inner = engine.variants.arguments
        engine.variants.arguments = lambda works: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ApiError) as failed:
            await _done(engine, _work())
        assert failed.value.status == 500 and "ZeroDivisionError" in failed.value.message
        engine.variants.arguments = inner  # type: ignore[method-assign]
        assert (await _done(engine, _work())).type == "done"

    _run(test)
    assert "a batch of 1 failed" in caplog.text


def test_a_broken_device_is_told_and_a_fault_of_ours_holds_nobody_up() -> None:
    async def test(engine: Engine) -> None:
        inner = engine.variants.arguments

        def broken(works: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        engine.variants.arguments = broken  # type: ignore[method-assign]
        with pytest.raises(ApiError):
            await _done(engine, _work())
        assert engine.broken == "CUDA error: an illegal memory access was encountered"
        engine.variants.arguments = inner  # type: ignore[method-assign]
        split = engine._split
        engine._split = lambda batch: 1 / 0  # type: ignore[method-assign, assignment]
        engine.variants.arguments = lambda works: (_ for _ in ()).throw(MemoryError())  # type: ignore[method-assign]
        with pytest.raises(ApiError) as caught:
            await _done(engine, _work())
        assert caught.value.status == 500
        engine._split, engine.variants.arguments = split, inner  # type: ignore[method-assign]
        assert (await _done(engine, _work())).type == "done"

    _run(test)


def test_a_picture_that_is_not_finite_is_an_error() -> None:
    async def test(engine: Engine) -> None:
        engine.variants.pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
        with pytest.raises(ApiError) as caught:
            await _done(engine, _work())
        assert caught.value.code == "not_finite"

    _run(test)


def test_the_tokenizer_is_used_by_the_devices_thread_alone() -> None:
    """Every call of a fast tokenizer sets its padding and truncation anew, under the feet of another thread's call."""
    threads: set[str] = set()

    async def test(engine: Engine) -> None:
        tokenizer = engine.variants.pipe.tokenizer_2

        def noted(method: Any) -> Any:
            def call(self: Any, *arguments: Any, **more: Any) -> Any:
                threads.add(threading.current_thread().name)
                return method(self, *arguments, **more)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in ("__call__", "tokenize"):
                patch.setattr(type(tokenizer), name, noted(getattr(type(tokenizer), name)))
            events = await asyncio.gather(*(_done(engine, _work(seed)) for seed in range(3)))
        assert {event.facts["text_tokens"] for event in events} == {4}

    _run(test, batch_wait=0.2)
    assert threads == {"device_0"}


def test_closing_answers_everybody() -> None:
    async def test(engine: Engine) -> None:
        works = [_work(seed, steps=60, settings=(("threshold", 0.0),)) for seed in range(3)]
        tasks = [asyncio.create_task(_done(engine, work)) for work in works]
        await asyncio.sleep(0.3)
        await engine.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, ApiError) and result.status == 503 for result in results)

    _run(test, max_batch=1)


def test_a_lora_by_name(tmp_path: Any) -> None:
    """Of two loaded LoRAs a request takes one, the other or none, and none leaves a trace."""
    from peft import LoraConfig

    from ddit_rt.demo import load_pipeline

    for name, scale in (("small", 0.05), ("large", 0.3)):
        pipe = load_pipeline()
        pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
        generator = torch.Generator().manual_seed(1)
        for key, weight in pipe.transformer.named_parameters():
            if "lora_" in key:
                weight.data = scale * torch.randn(weight.shape, generator=generator)
        from peft import get_peft_model_state_dict

        pipe.save_lora_weights(tmp_path / name, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))

    async def test(engine: Engine) -> None:
        pictures = {}
        for name in ("", "small", "large", "small", ""):
            picture = _pixels(await _done(engine, _work(3, lora=name)))
            if name in pictures:
                assert np.array_equal(pictures[name], picture)
            pictures[name] = picture
        for one, other in (("", "small"), ("small", "large"), ("", "large")):
            assert np.abs(pictures[one] - pictures[other]).max() > 3

    _run(test, loras={"small": str(tmp_path / "small"), "large": str(tmp_path / "large")})


def test_warming_up_teaches_previews() -> None:
    async def test(engine: Engine) -> None:
        assert engine.decoder.decode(torch.zeros(4, 16, 16)) is None
        await warm(engine)
        await _idle(engine)
        assert engine.decoder.learnt == 1
        picture = engine.decoder.decode(torch.zeros(4, 16, 16))
        assert picture is not None and picture.shape == (64, 64, 3)

    _run(test, call={"num_inference_steps": 4})
