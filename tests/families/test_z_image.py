"""Z-Image: lists of latents, a negated prediction, padded sequences, and guidance that doubles the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetPipeline, ZImageInpaintPipeline, ZImageOmniPipeline, ZImageTransformer2DModel
from specimens import SPECIMENS
from specimens.z_image import z_image, z_image_call
from tiny import picture

from ddit_rt import UnsupportedPipelineError, accelerated, report
from ddit_rt.distill import DistillConfig
from ddit_rt.distill.objective import Student
from ddit_rt.distill.recordings import Library
from ddit_rt.distill.samples import draw
from ddit_rt.families import NotCoarseError, family_of, fresh_adapter
from ddit_rt.families.testing import counted_flops
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.families.z_image import ZImage
from ddit_rt.granularity import Geometry
from ddit_rt.schedule import FlowSolver
from ddit_rt.trajectories import last_latent_with_error, record, record_trajectory

SIZE = {"height": 128, "width": 128}


def run(pipe: Any, **options: Any) -> torch.Tensor:
    return pipe(**{**z_image_call(**SIZE), **options}).images


def first(**options: Any) -> Any:
    return first_call(SPECIMENS["z-image"], **options)


def test_the_prediction_is_what_the_scheduler_gets() -> None:
    caught, seen = first(), []
    step = caught.pipe.scheduler.step
    caught.pipe.scheduler.step = lambda output, *args, **kwargs: seen.append(output) or step(output, *args, **kwargs)
    run(caught.pipe)
    prediction = caught.family.output(caught.module, caught.call, caught.module(**caught.arguments))
    assert torch.equal(prediction, seen[0][:, :, None])
    assert torch.equal(caught.family.canonical(caught.module, caught.call, seen[0]), prediction)


@pytest.mark.parametrize("native", [True, False])
def test_a_sample_does_not_depend_on_how_long_the_others_captions_are(native: bool) -> None:
    together, alone = first(batch=2), first()
    assert [len(caption) for caption in together.arguments["cap_feats"]] == [5, 40]
    assert (together.call.text_tokens, alone.call.text_tokens) == (64, 32)
    latent = alone.call.latent
    latents = torch.cat([latent, latent.flip(-1)])

    def low(caught: Any, given: torch.Tensor) -> torch.Tensor:
        return caught.family.run_low(caught.module, caught.module.forward, caught.call, given, 0.7, 1, native)

    torch.testing.assert_close(low(together, latents)[:1], low(alone, latent), rtol=1e-4, atol=1e-5)


def test_centres_lie_between_the_patches_and_all_else_stays() -> None:
    caught = first()
    module, family = caught.module, caught.family
    own, k = module.rope_embedder, 4
    grid = torch.cartesian_prod(torch.tensor([33]), torch.arange(2), torch.arange(2)).int()
    padding = torch.zeros(3, 3, dtype=torch.int32)
    captions = torch.tensor([[1, 0, 0], [33, 0, 0]], dtype=torch.int32)
    with family.placed(module, caught.call, k, False):
        found = module.rope_embedder(torch.cat([grid, padding]))
        after = module.rope_embedder(captions)
    assert module.rope_embedder is own
    assert torch.equal(after, own(captions))
    assert torch.equal(found[4:], own(padding))
    # twice the angle at a centre is the sum of the angles of the first and the last patch covered
    steps = torch.tensor([1, k, k])
    corners = own((grid * steps).int()) * own((grid * steps + torch.tensor([0, k - 1, k - 1])).int())
    torch.testing.assert_close(found[:4] ** 2, corners)
    with family.placed(module, caught.call, 1, False):
        assert torch.equal(module.rope_embedder(grid), own(grid))


@pytest.mark.parametrize("normalization", [False, 0.5])
def test_guidance_that_ends_in_mid_run_begins_anew_with_half_the_batch(
    normalization: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, sources = z_image(), []
    levels = torch.linspace(1, 1 / 8, 8).tolist()
    options = {"sigmas": levels, "cfg_truncation": 0.3, "cfg_normalization": normalization}
    guided = {**z_image_call(guided=True), **options}
    plain = run(pipe, **guided)
    with accelerated(pipe, threshold=0):
        assert torch.equal(run(pipe, **{**guided, "generator": torch.Generator().manual_seed(1)}), plain)
    step = FlowSolver.step

    def see(self: Any, index: int, ran: Any, source: Any, *args: Any) -> Any:
        sources.append(source)
        return step(self, index, ran, source, *args)

    monkeypatch.setattr(FlowSolver, "step", see)
    # 1 - σ passes 0.3 at the sixth step, which could be skipped if the fifth was any guide
    with accelerated(pipe, schedule=[1, 1, 2, 4, 2, 0, 2, 1]):
        found = run(pipe, **{**guided, "generator": torch.Generator().manual_seed(1)})
        made = report(pipe)
    assert torch.isfinite(found).all()
    assert made.schedule == [1, 1, 2, 4, 2, 1, 2, 1]
    assert [source == sources[0] for source in sources] == [True] * 5 + [False] * 3
    assert made.steps[4].full_flops == 2 * made.steps[5].full_flops


def test_a_last_step_without_noise_is_full() -> None:
    """Pipelines of older versions of diffusers end with one."""
    pipe = z_image()
    with accelerated(pipe, schedule=[1, 1, 2, 2, 2], coarse="band-split"):
        found = run(pipe, sigmas=torch.linspace(1, 0, 5).tolist(), num_inference_steps=5)
        last = report(pipe).steps[-1]
    assert torch.isfinite(found).all()
    assert (last.sigma, last.multiple) == (0.0, 1) and "without noise" in last.note


def test_guidance_in_every_step() -> None:
    call = {"guidance_scale": 5.0, "cfg_truncation": 1.0}
    for change, guided in (({}, True), ({"cfg_truncation": None}, True), ({"cfg_truncation": 0.5}, False)):
        assert ZImage().is_guided(None, {**call, **change}) is guided
    assert not ZImage().is_guided(None, {**call, "guidance_scale": 0.0})


def test_calls_that_coarse_tokens_cannot_carry() -> None:
    caught = first()
    latent = caught.arguments["x"][0]
    for change, words in (
        ({"controlnet_block_samples": {0: latent}}, "one residual per full token"),
        ({"x": [[latent]]}, "lists of pictures per sample"),
        ({"x": [latent, latent[..., :4]]}, "latents of several sizes"),
        ({"patch_size": 4}, r"patches of \(side, frames\) \(4, 1\)"),
    ):
        with pytest.raises(NotCoarseError, match=words):
            caught.family.parse(caught.module, {**caught.arguments, **change})


@pytest.mark.parametrize("cls", [ZImageOmniPipeline, ZImageControlNetPipeline])
def test_pipelines_that_are_refused(cls: type) -> None:
    with pytest.raises(UnsupportedPipelineError, match=f"{cls.__name__} is not supported"):
        family_of(object.__new__(cls))


def test_of_several_patch_sizes_the_pipelines_is_taken() -> None:
    pipe = z_image(all_patch_size=[4, 2], all_f_patch_size=[1, 1])
    plain = run(pipe)
    with accelerated(pipe, schedule=[1, 1, 2, 4, 2, 0, 2, 1], coarse="naive"):
        assert not torch.equal(run(pipe), plain)
    with pytest.raises(UnsupportedPipelineError, match=r"\[\(4, 1\)\]; coarse patches are defined for \(2, 1\)"):
        family_of(z_image(all_patch_size=[4], all_f_patch_size=[1]))


def test_inpainting() -> None:
    pipe = z_image(ZImageInpaintPipeline)
    given = {"image": picture(128, 128), "mask_image": (picture(128, 128, 1) > 0.5).float(), "strength": 0.5}

    def inpaint() -> torch.Tensor:
        return run(pipe, **given, generator=torch.Generator().manual_seed(1), num_inference_steps=16)

    plain = inpaint()
    with accelerated(pipe, threshold=0):
        assert torch.equal(inpaint(), plain)
    with accelerated(pipe, schedule=[1, 1, 2, 4, 1, 0, 2, 1]):
        assert torch.isfinite(inpaint()).all()
        assert report(pipe).schedule == [1, 1, 2, 4, 1, 0, 2, 1]


@pytest.mark.parametrize("multiple", [1, 2])
def test_flops_of_the_published_model(multiple: int) -> None:
    with torch.device("meta"):
        module = ZImageTransformer2DModel()  # its defaults are the 6B model's
        side = 128 // multiple
        given = {"x": [torch.empty(16, 1, side, side)], "t": torch.empty(1), "cap_feats": [torch.empty(77, 2560)]}
    found = ZImage().flops(module, Geometry(16, 1, 128, 128, 2), multiple, 77)
    assert found == pytest.approx(counted_flops(lambda: module(**given)), rel=0.01)


def prompted() -> tuple[Any, dict[str, Any]]:
    """A pipeline that takes prompts, whose captions are as long as they are."""
    pipe = z_image()

    def encoded(prompt: str | list[str], **_: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        embeds = [torch.full((len(text), 12), float(len(text))).cos() for text in texts]
        return embeds, [-one[:2] for one in embeds]

    pipe.encode_prompt = encoded
    return pipe, {**SIZE, "num_inference_steps": 6, "guidance_scale": 3.0}


def test_a_recorded_run_goes_on_where_it_was() -> None:
    pipe, call = prompted()
    trajectory = record_trajectory(pipe, 3, prompt="a pear", **call)
    assert trajectory.canonical(trajectory.outputs[0]).shape == (1, 4, 1, 16, 16)
    last = last_latent_with_error(pipe, trajectory, 2, torch.zeros_like(trajectory.outputs[2]))
    assert torch.equal(last, trajectory.latents[-1])


def test_recordings_keep_each_samples_caption(tmp_path: Any) -> None:
    pipe, call = prompted()
    family = family_of(pipe)
    texts = ["a pear", "three apples on a plate that is blue"]
    arguments = {**call, "prompt": texts, "output_type": "latent"}
    recording = record(pipe, family, lambda: pipe(**arguments), texts)
    assert recording.latents.shape[:2] == (6, 4)  # both prompts, then both negative ones
    library = Library(tmp_path, lambda index: recording, 1, 0, {}, torch.float16)
    shard = library.shard(0)
    assert [len(shard.arguments(0, i, frozenset())["cap_feats"]) for i in range(4)] == [*map(len, texts), 2, 2]
    config = DistillConfig(batch=3, multiples=(2,))
    batch = draw(library, [0], family, 2, config, torch.Generator().manual_seed(0))
    moved = batch.to(torch.device("cpu"), torch.bfloat16).call.arguments
    assert {caption.dtype for caption in moved["cap_feats"]} == {torch.bfloat16} and moved["t"].dtype == torch.float32
    adapter = fresh_adapter(family, pipe.transformer, multiples=(2,), rank=2)
    student = Student(adapter, family, pipe.transformer)
    with student.coarse(2):
        loss = student(batch.to(torch.device("cpu"), torch.float32))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_guidance_that_ends_in_mid_run_cannot_be_distilled() -> None:
    pipe, call = prompted()
    arguments = {**call, "prompt": "a pear", "output_type": "latent", "cfg_truncation": 0.3}
    with pytest.raises(UnsupportedPipelineError, match="gives the transformer 1 samples, step 0 did 2"):
        record(pipe, family_of(pipe), lambda: pipe(**arguments), ["a pear"])
