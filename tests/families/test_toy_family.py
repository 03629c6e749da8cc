"""A model of one's own, as the guide adds it: a family, its pipeline, and everything that follows from them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from adapters import trained
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from tiny import randomise
from torch import nn

import ddit_rt
from ddit_rt import families
from ddit_rt.families import Family, ModelInputs, family_of, register_family
from ddit_rt.granularity import Geometry, PatchProjections, bands, swapped, unpatchify
from ddit_rt.runtime import TeaCacheDefaults, Trunk

WIDTH, CHANNELS, PATCH = 16, 3, 2


class ToyTransformer(ModelMixin, ConfigMixin):
    """Convolution in, one attention block, linear layer out; no positions."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True)])
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)

    def forward(self, hidden_states, timestep):
        embedded = self.embed(hidden_states)
        rows, columns = embedded.shape[-2:]
        tokens = embedded.flatten(2).transpose(1, 2) + self.time(timestep[:, None] / 1000)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        patches = self.out(self.norm(tokens)).unflatten(-1, (PATCH, PATCH, CHANNELS)).movedim(-1, 2).flatten(2)
        return (unpatchify(patches, PATCH, 1, rows, columns)[:, :, 0],)


class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents, num_inference_steps=8):
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                velocity = self.transformer(latents, t.expand(len(latents)))[0]
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                bar.update()
        return latents


class Toy(Family):
    name = "toy"
    transformer_class = ToyTransformer
    pipelines = (ToyPipeline,)
    projection_names = ("embed", "out")
    time_scale = 1000.0
    layer_groups: ClassVar[dict[str, str]] = {"feed-forward": r"blocks\.\d+\.linear[12]"}

    def text_tokens(self, arguments):
        return 0

    def is_guided(self, pipe, call):
        return False

    def parse(self, module, arguments):
        latent = arguments["hidden_states"].unsqueeze(2)
        geometry = Geometry(CHANNELS, 1, latent.shape[3], latent.shape[4], PATCH)
        return ModelInputs(arguments, latent, None, geometry, 0)

    def output(self, module, call, raw):
        return raw[0].unsqueeze(2)

    def wrap(self, module, call, prediction):
        return (prediction[:, :, 0],)

    def low_arguments(self, call, low, sigma, multiple, native):
        time = bands.noise_level(call.arguments["timestep"], sigma * self.time_scale)
        return {"hidden_states": low[:, :, 0].to(call.latent.dtype), "timestep": time}

    def low_output(self, module, call, raw, multiple):
        return raw[0].unsqueeze(2)

    def projections(self, module):
        return PatchProjections(module.embed.weight, module.embed.bias, module.out.weight, module.out.bias)

    def run_patches(self, module, forward, call, latent, sigma, ends, multiple, native):
        (rows, columns), kept = call.geometry.grid(multiple), []

        def embed(_):
            return ends.read(latent).transpose(1, 2).unflatten(2, (rows, columns))

        def out(tokens):
            kept.append(ends.write(tokens, (1, rows, columns)))
            return tokens.new_zeros(*tokens.shape[:2], PATCH * PATCH * CHANNELS)

        with swapped(module, embed=embed, out=out):
            forward(**self.low_arguments(call, latent, sigma, multiple, native))
        return kept[0]

    def trunk(self, module):
        published = TeaCacheDefaults("toy", 0.1, (1.0, 0.0))
        return Trunk(
            published,
            module.embed,
            ("blocks",),
            module.norm,
            lambda grid: grid.flatten(2).mT,
            lambda arguments, _: module.time(arguments["timestep"][:, None] / 1000),
        )

    def flops(self, module, geometry, multiple, text_tokens):
        tokens = geometry.tokens(multiple)
        return 2.0 * tokens * (4 * WIDTH**2 + 64 * WIDTH + 2 * tokens * WIDTH + 2 * PATCH**2 * CHANNELS * WIDTH)

    def geometry(self, pipe, height, width, frames=1):
        return Geometry(CHANNELS, 1, height, width, PATCH)


@dataclass
class Case:
    pipe: ToyPipeline
    latents: torch.Tensor

    def __call__(self, **settings):
        with ddit_rt.accelerated(self.pipe, **settings):
            return self.pipe(self.latents), ddit_rt.report(self.pipe)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    register_family(Toy())
    pipe = ToyPipeline(randomise(ToyTransformer()), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    # 18 x 10 does not divide by 4p
    return Case(pipe, torch.randn(2, CHANNELS, 18, 10, generator=torch.Generator().manual_seed(0)))


def test_a_registered_family_runs_its_pipeline(toy):
    plain = toy.pipe(toy.latents)
    assert family_of(toy.pipe).name == "toy"
    assert torch.equal(toy(threshold=0)[0], plain)
    schedule = [1, 1, 2, 4, 1, 0, 2, 1]
    for coarse in ("delta", "band-split", "naive", "extrapolate"):
        result, report = toy(schedule=schedule, coarse=coarse)
        assert report.schedule == schedule and report.complete and torch.isfinite(result).all()
        assert not torch.equal(result, plain) and report.speedup_estimate > 1
    result, report = toy(schedule=schedule, adapter=trained(toy.pipe))
    assert report.schedule == schedule and torch.isfinite(result).all()
    cache = ddit_rt.TeaCacheConfig(threshold=1e9)
    assert "cached" in {step.executed for step in toy(threshold=0, cache=cache)[1].steps}
    assert torch.equal(toy.pipe(toy.latents), plain)


def test_a_coarse_step_is_the_models_own_run_on_a_smaller_latent(toy):
    """On an upsampled latent band-split sees all of it: at the first step nothing is left to estimate."""
    family, module = Toy(), toy.pipe.transformer
    small = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([500.0])
    call = family.parse(module, {"hidden_states": bands.up(small.unsqueeze(2), 2)[:, :, 0], "timestep": time})
    low = family.run_low(module, module.forward, call, small.unsqueeze(2), 0.5, 2, True)
    assert torch.equal(low[:, :, 0], module(small, time)[0])


def test_a_name_is_taken_once(toy):
    with pytest.raises(ValueError, match="'toy' already"):
        register_family(Toy())
