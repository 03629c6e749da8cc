"""TeaCache: the published rule against a hand computation, streams that never mix, and safe switches of patch size."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from tiny import flux, flux_inputs, latents_of, negative, wan, wan_inputs
from torch import nn

import ddit_rt
from ddit_rt import ConfigError, TeaCacheConfig
from ddit_rt.families.flux import TEACACHE
from ddit_rt.runtime.teacache import CacheState, TeaCache, TeaCacheDefaults, Trunk, polynomial, relative_change

SWITCHING = [1, 1, 1, 2, 2, 2, 1, 4, 4, 4, 1, 1]


class Toy(nn.Module):
    """x -> 2x per block, then + 1; counts the block runs."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Identity(), nn.Identity()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.runs = 0

    def forward(self, hidden, watched=None):
        hidden = self.embed(hidden)
        for _ in self.blocks:
            hidden, self.runs = 2 * hidden, self.runs + 1
        return self.norm(hidden) + 1


def toy(threshold, coefficients=(1.0, 0.0), retention=False):
    module = Toy()
    trunk = Trunk(
        TeaCacheDefaults("toy", 0.4, (1.0, 0.0)),
        module.embed,
        ("blocks",),
        module.norm,
        lambda x: x,
        lambda arguments, _: arguments["watched"],
    )
    return module, TeaCache(
        TeaCacheConfig(threshold, coefficients, retention), trunk, module, lambda args, kwargs: kwargs
    )


def directly(part, function, inputs):
    return function(inputs)


def call(cache, state, step, steps, module, given):
    """One run of the toy, with nothing around its forward."""
    return cache.call(state, step, steps, module, lambda forward, inputs: forward(**inputs), given, directly)


def decisions(cache, module, signals):
    state = CacheState()
    arguments = [{"hidden": torch.ones(len(signal), 2), "watched": signal} for signal in signals]
    return [call(cache, state, i, len(signals), module, given)[1] for i, given in enumerate(arguments)]


def by_hand(changes, coefficients, threshold, steps):
    """The published loop: skip while the accumulated, rescaled change stays below the threshold."""
    skipped, total = [], 0.0
    for step in range(steps):
        if step in (0, steps - 1):
            skipped.append(False)
            total = 0.0
            continue
        total += np.poly1d(coefficients)(changes[step - 1])
        skipped.append(bool(total < threshold))
        if not skipped[-1]:
            total = 0.0
    return skipped


def test_polynomial_and_change():
    assert polynomial(TEACACHE.coefficients, 0.13) == pytest.approx(np.polyval(TEACACHE.coefficients, 0.13))
    now, before = torch.tensor([[1.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert relative_change(now, before) == pytest.approx([2 / 3, 2 / 3])


def test_rule_on_a_toy_by_hand():
    # changes 10 %, 10 %, 10 %, 50 %, 10 %: a threshold of 0.25 skips two, computes, computes, skips
    values = np.cumprod([1.0, 1.1, 1.1, 1.1, 1.5, 1.1, 1.1])
    signals = [torch.full((1, 3), value) for value in values]
    module, cache = toy(0.25)
    assert decisions(cache, module, signals) == [False, True, True, False, False, True, False]
    assert module.runs == 2 * 4


def test_skipped_output_adds_the_last_residual():
    module, cache = toy(1e9)
    state = CacheState()
    call(cache, state, 0, 5, module, {"hidden": torch.full((1, 2), 3.0), "watched": torch.ones(1, 1)})  # residual 9
    result, skipped = call(cache, state, 1, 5, module, {"hidden": torch.full((1, 2), 5.0), "watched": torch.ones(1, 1)})
    assert skipped and torch.equal(result, torch.full((1, 2), 5.0 + 9 + 1))
    assert len(module.blocks) == 2 and not module.embed._forward_hooks and not module.norm._forward_pre_hooks


def test_forced_steps():
    signals = [torch.ones(1, 1)] * 8
    assert decisions(*reversed(toy(1e9)), signals) == [False] + [True] * 6 + [False]
    assert decisions(*reversed(toy(1e9, retention=True)), signals) == [False] * 5 + [True] * 3


def test_batch_runs_when_any_sample_needs_it():
    quiet, loud = torch.ones(1, 2), torch.ones(1, 2) * torch.tensor([2.0])
    signals = [torch.cat([quiet, quiet * 1.5**i]) for i in range(5)]
    module, cache = toy(0.4)
    assert decisions(cache, module, signals) == [False] * 5
    assert decisions(cache, module, [torch.cat([loud, quiet])] * 5) == [False, True, True, True, False]


@pytest.mark.parametrize("changes", [[0.1, float("nan")], [float("nan"), 0.1], [0.1, float("inf")]])
def test_a_change_that_is_no_number_runs_the_blocks_wherever_it_is(changes):
    _, cache = toy(0.4)
    assert not cache.accumulate(CacheState(accumulated=[0.0, 0.0]), changes)


def test_state_that_sat_out_a_step_computes():
    module, cache = toy(1e9)
    state, given = CacheState(), {"hidden": torch.ones(1, 2), "watched": torch.ones(1, 1)}
    assert [call(cache, state, step, 9, module, given)[1] for step in (0, 1, 4, 5)] == [False, True, False, True]


@pytest.mark.parametrize("retention", [False, True])
def test_wan_decides_as_published(retention):
    """Wan's signal depends on the timestep alone, so the published rule can be run beside the pipeline."""
    pipe, steps = wan(), 14
    inputs = wan_inputs(steps=steps)
    embedder = pipe.transformer.condition_embedder
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        signals = [embedder.time_embedder(embedder.timesteps_proj(t[None])) for t in pipe.scheduler.timesteps]
        if retention:
            signals = [embedder.time_proj(torch.nn.functional.silu(signal)) for signal in signals]
    changes = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(signals)]
    coefficients = (2.0, 0.1, 0.0)
    threshold = 2.5 * float(np.polyval(coefficients, np.median(changes[5:])))
    with ddit_rt.accelerated(pipe, multiples=(1,), cache=TeaCacheConfig(threshold, coefficients, retention)):
        latents_of(pipe, inputs)
        executed = [step.executed == "cached" for step in ddit_rt.report(pipe).steps]
    expected = by_hand(changes, coefficients, threshold, steps)
    if retention:
        total, expected = 0.0, [False] * 5
        for change in changes[4:]:
            total += np.poly1d(coefficients)(change)
            expected.append(bool(total < threshold))
            total = total if expected[-1] else 0.0
    assert executed == expected
    assert any(executed) and not all(executed[1:-1])


@pytest.mark.parametrize("make, inputs", [(flux, negative(flux_inputs())), (wan, wan_inputs())], ids=["flux", "wan"])
def test_cond_and_uncond_keep_their_own_residual(make, inputs, monkeypatch):
    seen, original = {}, TeaCache.call

    def spy(self, state, *args):
        result = original(self, state, *args)
        seen.setdefault(id(state), state)
        return result

    monkeypatch.setattr(TeaCache, "call", spy)
    pipe = make()
    with ddit_rt.accelerated(pipe, multiples=(1,), cache=TeaCacheConfig(1e9)):
        latents_of(pipe, inputs)
        steps = ddit_rt.report(pipe).steps
    assert [step.executed for step in steps] == ["eager"] + ["cached"] * 6 + ["eager"]
    assert all(step.flops == 0 for step in steps[1:-1]) and all(step.full_flops > 0 for step in steps)
    first, second = seen.values()
    assert not torch.equal(first.residual, second.residual)


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive"])
@pytest.mark.parametrize("make, inputs", [(flux, flux_inputs), (wan, wan_inputs)], ids=["flux", "wan"])
def test_switches_never_mix_sizes(make, inputs, coarse):
    pipe, given = make(), inputs(steps=12)
    with ddit_rt.accelerated(pipe, schedule=SWITCHING, coarse=coarse, cache=TeaCacheConfig(1e9)):
        first = latents_of(pipe, given)
        executed = [step.executed for step in ddit_rt.report(pipe).steps]
        assert torch.equal(latents_of(pipe, given), first), "state of one call reached the next"
    # computed: the first step at a size, every return to one, and the last step
    computed = [0, 3, 6, 7, 10, 11]
    assert executed == ["eager" if i in computed else "cached" for i in range(12)]
    assert torch.isfinite(first).all()


def test_threshold_zero_is_the_plain_pipeline_bit_for_bit():
    pipe, inputs = flux(), flux_inputs()
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, multiples=(1,), cache=TeaCacheConfig(0.0)):
        assert torch.equal(latents_of(pipe, inputs), plain)
    assert torch.equal(latents_of(pipe, inputs), plain)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=0.5),
        TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True, taylor_factors_dtype=torch.float32),
        MagCacheConfig(mag_ratios=[1.0] * 12, num_inference_steps=12),
    ],
    ids=lambda cache: type(cache).__name__,
)
@pytest.mark.parametrize("make, inputs", [(flux, flux_inputs), (wan, wan_inputs)], ids=["flux", "wan"])
def test_caches_of_diffusers_across_switches(make, inputs, cache):
    pipe, given = make(), inputs(steps=12)
    plain = latents_of(pipe, given)
    with ddit_rt.accelerated(pipe, schedule=SWITCHING, cache=cache):
        first = latents_of(pipe, given)
        assert torch.equal(latents_of(pipe, given), first)
        assert torch.isfinite(first).all()
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(latents_of(pipe, given), plain)


def test_config_errors():
    for bad in ("teacash", 3, object()):
        with pytest.raises(ConfigError, match="cache="):
            ddit_rt.DDiTConfig(cache=bad)
    with pytest.raises(ConfigError, match="SeaCacheConfig"):
        ddit_rt.DDiTConfig(cache=SeaCacheConfig())
    assert ddit_rt.DDiTConfig(cache=SeaCacheConfig(), multiples=(1,)).cache is not None
    assert ddit_rt.DDiTConfig(cache="teacache").cache == TeaCacheConfig()
    for bad in ({"threshold": -1.0}, {"threshold": float("nan")}, {"coefficients": ()}, {"coefficients": ("a",)}):
        with pytest.raises(ConfigError):
            TeaCacheConfig(**bad)
    pipe = flux()
    with pytest.raises(ConfigError, match="retention"):
        ddit_rt.accelerate(pipe, cache=TeaCacheConfig(retention=True))
    assert "forward" not in pipe.transformer.__dict__
