"""Adapters trained beside reference pictures: recorded with the run, and there again in every sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distill_models import SMALL
from PIL import Image
from specimens import SPECIMENS

import ddit_rt
from ddit_rt.distill import Trainer, estimate
from ddit_rt.distill.recordings import Library
from ddit_rt.distill.samples import draw
from ddit_rt.families import family_of
from ddit_rt.families.testing import run
from ddit_rt.families.testing.specimen import first_call
from ddit_rt.trajectories import record

KINDS = ["flux-kontext", "flux2-klein-reference", "qwen-image-edit", "longcat-image-edit"]
CONFIG = replace(SMALL, steps=2, held_out=1, multiples=(2,), checkpoint_every=100)


class Embedded:
    """Prompts of a pipeline without text encoders; references are what the specimen has, or the call."""

    captions = tuple(map(str, range(3)))

    def __init__(self, specimen, **options):
        self.specimen, self.options = specimen, options

    def describe(self):
        return {"kind": "prompts", "items": len(self.captions)}

    def record(self, pipe, family, call, items, seed, max_steps=None):
        def run_items():
            pipe(**{**self.specimen.arguments(steps=6, **self.options), **call})

        return record(pipe, family, run_items, [self.captions[items[0]]], max_steps)


def library(specimen, folder, *, shards=1, calls=({},), **options):
    pipe, source = specimen.make(), Embedded(specimen, **options)
    family = family_of(pipe)

    def make(index):
        return source.record(pipe, family, calls[index % len(calls)], [0], 0)

    return Library(folder, make, shards, 0, {}, torch.float32), family, pipe


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_sample_is_the_call_that_was_recorded(name, native, tmp_path):
    specimen = SPECIMENS[name]
    recorded, family, _ = library(specimen, tmp_path)
    caught = first_call(specimen, steps=6)
    batch = draw(recorded, (0,), family, 2, CONFIG, torch.Generator().manual_seed(0))
    batch = batch.to(torch.device("cpu"), torch.float32)
    assert batch.call.references.shape == (2, *caught.call.references.shape[1:])
    assert batch.call.text_tokens == caught.call.text_tokens
    module = caught.module
    embedding = family.patch_embedding(module, 2)
    latent, sigma = batch.target.latent, batch.target.sigma

    def predicted(call, latent, sigma):
        with torch.no_grad():
            return family.run_patches(module, module.forward, call, latent, sigma, embedding, 2, native)

    found = predicted(batch.call, latent, sigma)
    for i in range(2):
        wanted = predicted(caught.call, latent[i : i + 1], sigma[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-5, atol=1e-5)
    other = replace(batch.call, references=-3 * batch.call.references)
    assert not torch.allclose(predicted(other, latent, sigma), found, rtol=1e-4, atol=1e-4)


def test_guidance_keeps_the_references_of_either_stream(tmp_path):
    recorded, _, _ = library(SPECIMENS["flux-kontext"], tmp_path, guided=True)
    shard = recorded.shard(0)
    assert shard.streams == 2 and torch.equal(shard.references(0, 0), shard.references(1, 0))


@pytest.mark.parametrize("name", ["flux-kontext", "flux2-klein-reference"])
def test_a_dry_run_measures_and_a_short_one_trains(name, tmp_path):
    specimen, pipe = SPECIMENS[name], SPECIMENS[name].make()
    found = estimate(pipe, Embedded(specimen), {}, CONFIG)
    assert found.parameters > 0 and found.hours > 0 and found.recording_bytes > 0
    trainer = Trainer(pipe, Embedded(specimen), {}, CONFIG, tmp_path, log=lambda _: None)
    trainer._validate = lambda: None  # pictures need text encoders
    trainer.train()
    with ddit_rt.accelerated(pipe, adapter=tmp_path, multiples=(1, 2), schedule=[1, 1, 2, 2, 1, 2, 2, 1]):
        assert bool(torch.isfinite(run(pipe, specimen.arguments())).all())


def test_pictures_in_a_call_are_told_by_what_they_hold(tmp_path):
    specimen = SPECIMENS["flux2-klein-reference"]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    calls = [{"image": picture} for picture in pictures]
    config = replace(CONFIG, held_out=1)
    trainer = Trainer(specimen.make(), Embedded(specimen), calls, config, tmp_path, log=lambda _: None)
    told = [call["image"] for call in trainer.recorded.calls]
    assert told[0] != told[1] and all(text.startswith("picture 64x64 ") for text in told)
    with pytest.raises(ddit_rt.ConfigError, match="another model, scheduler, call or data"):
        Trainer(specimen.make(), Embedded(specimen), calls[:1], config, tmp_path, log=lambda _: None)


def test_references_of_several_sizes_share_no_batch(tmp_path):
    calls = [{"image": torch.randn(1, 4, *size)} for size in ((12, 20), (20, 12), (12, 16))]
    recorded, family, _ = library(SPECIMENS["flux-kontext"], tmp_path, shards=3, calls=calls)

    def drawn(shards, batch):
        config = replace(CONFIG, batch=batch)
        for seed in range(8):
            draw(recorded, shards, family, 2, config, torch.Generator().manual_seed(seed))

    drawn((0, 1, 2), 1)
    with pytest.raises(ddit_rt.ConfigError, match="batch=1"):
        drawn((0, 2), 2)
    # as many tokens, at other places
    with pytest.raises(ddit_rt.ConfigError, match="img_ids: recordings differ"):
        drawn((0, 1), 2)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("flux-controlnet", "controlnet_block_samples"), ("flux-ip-adapter", "joint_attention_kwargs")],
)
def test_what_changes_from_step_to_step_or_is_not_kept_is_refused(name, argument, tmp_path):
    pipe = SPECIMENS[name].make()
    with pytest.raises(ddit_rt.UnsupportedPipelineError, match=f"cannot be distilled: {argument}"):
        Embedded(SPECIMENS[name]).record(pipe, family_of(pipe), {}, [0], 0)
