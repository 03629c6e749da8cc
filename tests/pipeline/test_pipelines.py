"""Whole pipelines: plain outputs bit for bit, coarse runs everywhere, nothing leaks, nothing is left behind."""

import threading
from types import SimpleNamespace

import pytest
import torch
from cases import ALL
from tiny import flux, flux_inputs, latents_of, negative, smooth, wan, wan_inputs

import ddit_rt
from ddit_rt.pipeline import accelerated_pipeline
from ddit_rt.schedule import EvolutionHistory


def mixed(index, patch_std):
    """Two full steps, then coarse ones of both sizes between full ones."""
    return (1, 1, 2, 4, 1, 4, 2, 2)[index % 8]


def attributes(pipe):
    """What every object of a pipeline holds in its ``__dict__``: the place where a patch or a hook would stay."""
    found = {"pipe": dict(pipe.__dict__), "scheduler": sorted(pipe.scheduler.__dict__)}
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        for path, child in module.named_modules() if module is not None else ():
            held = {key: value for key, value in child.__dict__.items() if key != "_diffusers_hook"}
            found[f"{name}.{path}"] = {key: (dict(v) if isinstance(v, dict) else v) for key, v in held.items()}
    return found


class Recorder:
    """A ``callback_on_step_end`` that keeps the latents after every step."""

    def __init__(self):
        self.latents = []

    def __call__(self, pipe, index, timestep, tensors):
        self.latents.append(tensors["latents"].clone())
        return {}


def failing_at(step):
    def callback(pipe, index, timestep, tensors):
        if index == step:
            raise RuntimeError("stop here")
        return {}

    return callback


# -- the plain output -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_without_coarse_steps_and_after_restore_the_output_is_the_plain_one(name):
    pipe, inputs = ALL[name]()
    plain = latents_of(pipe, inputs)
    before = attributes(pipe)
    for settings in ({"threshold": 0}, {"multiples": (1,)}, {"schedule": lambda index, patch_std: 1}):
        with ddit_rt.accelerated(pipe, **settings):
            assert torch.equal(latents_of(pipe, inputs), plain), settings
            assert ddit_rt.report(pipe).complete
    with ddit_rt.accelerated(pipe, schedule=mixed):
        assert not torch.equal(latents_of(pipe, inputs), plain)
    assert attributes(pipe) == before
    assert torch.equal(latents_of(pipe, inputs), plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (flux(dtype=torch.bfloat16), flux_inputs(dtype=torch.bfloat16)),
        lambda: (wan(torch.bfloat16), wan_inputs(dtype=torch.bfloat16)),
        lambda: (wan(torch.bfloat16, euler=True), wan_inputs(dtype=torch.bfloat16)),
    ],
    ids=["flux-euler", "wan-unipc", "wan-euler"],
)
def test_bfloat16_output_without_coarse_steps_is_the_plain_one(make):
    pipe, inputs = make()
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, threshold=0):
        accelerated = latents_of(pipe, inputs)
    assert accelerated.dtype == plain.dtype
    assert torch.equal(accelerated, plain)


def test_two_transformers_both_run():
    pipe, inputs = ALL["wan-two"]()
    with ddit_rt.accelerated(pipe, schedule=mixed):
        latents_of(pipe, inputs)
        steps = ddit_rt.report(pipe).steps
    ratio = pipe.config.boundary_ratio
    assert any(s.sigma >= ratio for s in steps) and any(s.sigma < ratio for s in steps)


def test_after_a_change_of_transformer_the_policy_starts_with_a_fine_step():
    pipe, inputs = ALL["wan-two"]()
    with ddit_rt.accelerated(pipe, threshold=1e9, order=1, max_consecutive_coarse=None):
        latents_of(pipe, inputs)
        steps = ddit_rt.report(pipe).steps
    second = next(s.index for s in steps if s.timestep < 600)
    assert [s.multiple for s in steps] == [1 if s.index in (0, second) else 4 for s in steps]
    assert steps[second].note


# -- coarse steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive", "extrapolate", "reuse"])
@pytest.mark.parametrize("name", ALL)
def test_every_coarse_path_runs_on_every_pipeline(name, coarse):
    pipe, inputs = ALL[name]()
    plain = latents_of(pipe, inputs)
    with ddit_rt.accelerated(pipe, schedule=mixed, coarse=coarse):
        result = latents_of(pipe, inputs)
        report = ddit_rt.report(pipe)
    assert result.shape == plain.shape and result.dtype == plain.dtype and torch.isfinite(result).all()
    assert report.complete
    for step in report.steps:  # a forecast starts full again where Wan 2.2 changes its transformer
        assert step.multiple == mixed(step.index, {}) or (name == "wan-two" and step.multiple == 1 and step.note)
    if coarse != "delta":  # its probes outweigh what the few coarse steps of a tiny model save
        assert report.speedup_estimate > 1


@pytest.mark.parametrize("coarse", ["delta", "band-split", "naive"])
@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("positions", ["native", "interpolated"])
@pytest.mark.parametrize("height, width", [(8, 8), (16, 16), (24, 56)])
def test_all_steps_coarse_also_on_pictures_smaller_than_a_coarse_patch(height, width, multiple, coarse, positions):
    pipe = flux()
    with ddit_rt.accelerated(pipe, schedule=[multiple] * 3, coarse=coarse, positions=positions):
        result = latents_of(pipe, flux_inputs(height=height, width=width, steps=3))
    assert result.shape[1] == (height // 8) * (width // 8)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("coarse", ["delta", "extrapolate"])
def test_two_fine_steps_at_one_noise_level_give_no_slope(coarse):
    pipe, inputs = ALL["wan-heun"]()  # Heun evaluates every noise level but the first and last twice
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 1, 2, 1, 1, 2], coarse=coarse):
        assert torch.isfinite(latents_of(pipe, inputs)).all()


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("positions", ["native", "interpolated"])
def test_all_steps_coarse_on_small_videos(multiple, positions):
    pipe = wan()
    for coarse in ("delta", "naive"):
        with ddit_rt.accelerated(pipe, schedule=[multiple] * 3, coarse=coarse, positions=positions):
            result = latents_of(pipe, wan_inputs(height=16, width=48, steps=3))
        assert torch.isfinite(result).all()


def test_tokens_follow_the_multiple():
    pipe = flux()
    with ddit_rt.accelerated(pipe, schedule=[1, 2, 4]):
        latents_of(pipe, flux_inputs(height=72, width=40, steps=3))
        assert [s.tokens for s in ddit_rt.report(pipe).steps] == [9 * 5, 5 * 3, 3 * 2]


def test_the_batch_runs_at_the_finest_size_any_sample_asks_for():
    def evolution(inputs):
        with ddit_rt.accelerated(pipe, threshold=0):
            latents_of(pipe, inputs)
            return [s.patch_std for s in ddit_rt.report(pipe).steps]

    pipe = flux()
    latents = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))
    inputs = flux_inputs(batch=2, latents=latents)
    parts = ("prompt_embeds", "pooled_prompt_embeds", "latents")
    single = [evolution({**inputs, **{name: inputs[name][i : i + 1] for name in parts}}) for i in range(2)]
    for both, first, second in zip(evolution(inputs), *single):
        assert both == pytest.approx({k: max(first[k], second[k]) for k in both}, rel=1e-3)


# -- the decision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["flux-true-cfg", "flux-odd", "wan", "wan-odd"])
def test_patch_std_is_that_of_the_finite_difference_of_the_latents(name, order):
    pipe, inputs = ALL[name]()
    seen = Recorder()
    first = torch.randn(latents_of(pipe, inputs).shape, generator=torch.Generator().manual_seed(4))
    with ddit_rt.accelerated(pipe, threshold=0, order=order):
        latents_of(pipe, {**inputs, "latents": first, "callback_on_step_end": seen})
        steps = ddit_rt.report(pipe).steps
    assert all(not s.patch_std for s in steps[:order])
    latents = [first, *seen.latents]
    for step in steps[order:]:
        newest_first = latents[step.index : step.index - order - 1 : -1] if step.index > order else latents[order::-1]
        z = [_pixels(latent, inputs) for latent in newest_first]
        difference = {
            1: lambda z: z[0] - z[1],
            2: lambda z: z[0] - 2 * z[1] + z[2],
            3: lambda z: z[0] - 3 * z[1] + 3 * z[2] - z[3],
        }[order](z)
        assert step.patch_std == pytest.approx({k: _quantile(difference, 2 * k) for k in (1, 2, 4)}, rel=1e-3)


def _pixels(latent, inputs):
    """(B, C, F, H, W) of either layout."""
    if latent.ndim == 5:
        return latent
    rows, columns = inputs["height"] // 8, inputs["width"] // 8
    blocks = latent.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).unsqueeze(2)


def _quantile(latent, side):
    """The 0.4-quantile over patches of their standard deviation, for one sample, by loops."""
    stds = [
        latent[0, :, frame, y : y + side, x : x + side].std(correction=0)
        for frame in range(latent.shape[2])
        for y in range(0, latent.shape[3], side)
        for x in range(0, latent.shape[4], side)
    ]
    return torch.stack(stds).quantile(0.4).item()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_first_order_steps_are_fine_whatever_the_threshold(order):
    pipe = flux()
    with ddit_rt.accelerated(pipe, threshold=1e9, order=order, max_consecutive_coarse=None):
        latents_of(pipe, flux_inputs())
        assert ddit_rt.report(pipe).schedule == [1] * order + [4] * (8 - order)


@pytest.mark.parametrize("name", ["flux-true-cfg", "wan"])
def test_guidance_makes_one_record_and_one_increment_per_step(name, monkeypatch):
    pushes = []
    monkeypatch.setattr(EvolutionHistory, "push", lambda self, increment: pushes.append(increment))
    pipe, inputs = ALL[name]()
    with ddit_rt.accelerated(pipe):
        latents_of(pipe, inputs)
        assert len(pushes) == len(ddit_rt.report(pipe).steps) == inputs["num_inference_steps"]


KINKED = [1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.44, 0.37, 0.30, 0.23, 0.16, 0.14, 0.12, 0.10, 0.08]


def _schedule(dtype, threshold):
    pipe = smooth(flux(dtype=dtype))
    with ddit_rt.accelerated(pipe, threshold=threshold, coarse="reuse"):
        latents_of(pipe, flux_inputs(steps=16, sigmas=KINKED, dtype=dtype))
        report = ddit_rt.report(pipe)
    return report.schedule, {s.index: s.patch_std for s in report.steps if s.patch_std}


def _rounded(step, scheduler, model_output, timestep, sample, *args, **kwargs):
    """Increments of latents that are rounded already."""
    result = step(model_output, timestep, sample, *args, **kwargs)
    return result, result[0].float() - sample.float()


def test_bfloat16_chooses_the_schedule_of_float32(monkeypatch):
    threshold = 1e-3
    full = [_schedule(dtype, 0)[1] for dtype in (torch.float32, torch.bfloat16)]
    for index, exact in full[0].items():
        assert all(abs(sigma / threshold - 1) > 0.3 for sigma in exact.values()), (index, exact)
        assert full[1][index] == pytest.approx(exact, rel=0.35), index
    wanted = _schedule(torch.float32, threshold)[0]
    assert 1 in wanted[4:] and 4 in wanted
    assert _schedule(torch.bfloat16, threshold)[0] == wanted

    # the same test notices increments taken from rounded latents
    monkeypatch.setattr(accelerated_pipeline, "step_with_increment", _rounded)
    assert _schedule(torch.float32, threshold)[0] == wanted
    assert _schedule(torch.bfloat16, threshold)[0] != wanted


def test_bfloat16_chooses_the_schedule_of_float32_for_wan(monkeypatch):
    def schedule(dtype, threshold):
        pipe = smooth(wan(dtype, euler=True))
        with ddit_rt.accelerated(pipe, threshold=threshold, coarse="reuse", max_consecutive_coarse=None):
            latents_of(pipe, wan_inputs(steps=16, dtype=dtype))
            report = ddit_rt.report(pipe)
        return report.schedule, sorted(sigma for step in report.steps for sigma in step.patch_std.values())

    values = schedule(torch.float32, 0)[1]
    # a threshold that no σ lies near, with as many as can be on either side
    inner = range(len(values) // 4, 3 * len(values) // 4)
    place = max(inner, key=lambda i: values[i + 1] / values[i])
    threshold = (values[place] * values[place + 1]) ** 0.5
    assert values[place + 1] / values[place] > 1.1
    wanted = schedule(torch.float32, threshold)[0]
    assert len(set(wanted)) > 1 and 1 in wanted[4:]
    assert schedule(torch.bfloat16, threshold)[0] == wanted
    monkeypatch.setattr(accelerated_pipeline, "step_with_increment", _rounded)
    assert schedule(torch.bfloat16, threshold)[0] != wanted


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux-true-cfg", "wan-two"])
def test_a_call_does_not_depend_on_the_calls_before_it(name):
    pipe, inputs = ALL[name]()
    other = {**inputs, "height": 48, "width": 32, "num_inference_steps": 5}
    with ddit_rt.accelerated(pipe, threshold=0.2, order=2, max_consecutive_coarse=2):
        first = latents_of(pipe, inputs)
        schedule = ddit_rt.report(pipe).schedule
        assert max(schedule) > 1
        latents_of(pipe, other)
        assert len(ddit_rt.report(pipe).steps) == 5
        with pytest.raises(RuntimeError, match="stop here"):
            pipe(**inputs, callback_on_step_end=failing_at(5))
        assert torch.equal(latents_of(pipe, inputs), first)
        assert ddit_rt.report(pipe).schedule == schedule


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_call_that_fails_leaves_an_incomplete_report_and_can_be_restored(name):
    pipe, inputs = ALL[name]()
    plain = latents_of(pipe, inputs)
    ddit_rt.accelerate(pipe, schedule=mixed)
    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**inputs, callback_on_step_end=failing_at(4))
    report = ddit_rt.report(pipe)
    assert not report.complete and len(report.steps) == 5 and "did not finish" in str(report)
    ddit_rt.restore(pipe)
    assert torch.equal(latents_of(pipe, inputs), plain)


def test_an_exception_inside_the_transformer_does_not_reach_the_next_call(monkeypatch):
    pipe, inputs = flux(), flux_inputs()
    with ddit_rt.accelerated(pipe, schedule=mixed):
        whole = latents_of(pipe, inputs)
        block = pipe.transformer.transformer_blocks[0]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(block, "forward", failing)
            latents_of(pipe, inputs)
        assert not ddit_rt.report(pipe).complete
        assert torch.equal(latents_of(pipe, inputs), whole)


def failing(*args, **kwargs):
    raise RuntimeError("broken")


def test_an_interrupted_call_is_incomplete():
    def interrupt(pipe, index, timestep, tensors):
        pipe._interrupt = index == 2
        return {}

    pipe = flux()
    with ddit_rt.accelerated(pipe):
        latents_of(pipe, flux_inputs(callback_on_step_end=interrupt))
        assert not ddit_rt.report(pipe).complete
        assert len(ddit_rt.report(pipe).steps) == 3
        assert getattr(pipe._ddit_pipeline._local, "call", None) is None  # nor does it hold on to its latents


@pytest.mark.parametrize("schedule", [None, [1, 1, 1, 1, 2, 4, 2, 4]])
def test_a_latent_that_changes_its_size_starts_the_evolution_anew(schedule):
    def enlarge(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"].repeat(1, 1, 1, 1, 2)} if index == 4 else {}

    pipe = wan(euler=True)
    with ddit_rt.accelerated(pipe, threshold=1e9, order=1, max_consecutive_coarse=None, schedule=schedule):
        result = latents_of(pipe, wan_inputs(callback_on_step_end=enlarge))
        steps = ddit_rt.report(pipe).steps
    assert result.shape[-1] == 24 and torch.isfinite(result).all()
    assert not steps[5].patch_std
    if schedule is None:
        assert [s.multiple for s in steps] == [1, 4, 4, 4, 4, 1, 4, 4]


def test_guidance_that_begins_in_mid_run_starts_fine():
    def late_guidance(pipe, index, timestep, tensors):
        pipe._guidance_scale = 3.0 if index >= 3 else 1.0
        return {}

    for coarse in ("delta", "extrapolate"):
        pipe = wan()
        with ddit_rt.accelerated(pipe, threshold=1e9, order=1, coarse=coarse):
            inputs = wan_inputs(guidance_scale=1.0, callback_on_step_end=late_guidance)
            embeds = inputs["negative_prompt_embeds"]
            pipe.encode_prompt = lambda *args, embeds=embeds, **kwargs: (-embeds, embeds)
            assert torch.isfinite(latents_of(pipe, inputs)).all()


def test_two_pipelines_interleaved_give_what_each_gives_alone():
    first, second = flux(), wan()
    inputs, others = flux_inputs(), wan_inputs()
    settings = {"threshold": 0.2, "order": 2}
    with ddit_rt.accelerated(first, **settings), ddit_rt.accelerated(second, **settings):
        alone, other_alone = latents_of(first, inputs), latents_of(second, others)
        schedule = ddit_rt.report(first).schedule
        results = []

        def nested(pipe, index, timestep, tensors):
            if index in (2, 5):
                results.append(latents_of(second, others))
            return {}

        assert torch.equal(latents_of(first, {**inputs, "callback_on_step_end": nested}), alone)
        assert len(results) == 2 and all(torch.equal(result, other_alone) for result in results)
        assert ddit_rt.report(first).schedule == schedule


def test_two_pipelines_in_two_threads_give_what_each_gives_alone():
    settings = {"threshold": 0.2, "order": 2}
    pairs = [(ddit_rt.accelerate(flux(), **settings), flux_inputs(steps=12)) for _ in range(2)]
    pairs[1][0].transformer.proj_out.weight.data.mul_(0.5)
    alone = [latents_of(pipe, inputs) for pipe, inputs in pairs]
    schedules = [ddit_rt.report(pipe).schedule for pipe, _ in pairs]
    together = [None, None]

    def work(slot):
        together[slot] = latents_of(*pairs[slot])

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert [ddit_rt.report(pipe).schedule for pipe, _ in pairs] == schedules


# -- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux-true-cfg", "wan-odd", "flux-image"])
def test_the_schedule_of_a_report_repeats_the_run_bit_for_bit(name):
    pipe, inputs = ALL[name]()
    with ddit_rt.accelerated(pipe, threshold=0.3, order=1):
        chosen = latents_of(pipe, inputs)
        schedule = ddit_rt.report(pipe).schedule
    assert len(set(schedule)) > 1
    with ddit_rt.accelerated(pipe, schedule=schedule):
        assert torch.equal(latents_of(pipe, inputs), chosen)
        assert ddit_rt.report(pipe).schedule == schedule


def test_speedup_estimate_is_the_ratio_of_the_model_runs_flops():
    pipe = flux()
    with ddit_rt.accelerated(pipe, schedule=[1, 2, 4, 1], coarse="band-split"):
        latents_of(pipe, negative(flux_inputs(batch=2, steps=4)))
        report = ddit_rt.report(pipe)
        family, geometry = pipe._ddit_pipeline.family, pipe._ddit_pipeline.family.geometry(pipe, 64, 64)
    cost = {k: 4 * family.flops(pipe.transformer, geometry, k, 5) for k in (1, 2, 4)}  # batch 2, two calls a step
    assert [s.flops for s in report.steps] == [cost[1], cost[2], cost[4], cost[1]]
    assert [s.full_flops for s in report.steps] == [cost[1]] * 4
    assert report.speedup_estimate == pytest.approx(4 * cost[1] / (2 * cost[1] + cost[2] + cost[4]))


def test_delta_books_its_probes():
    pipe = flux()
    cost = {}
    for coarse in ("delta", "band-split"):
        with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 2], coarse=coarse):
            latents_of(pipe, flux_inputs(steps=4))
            cost[coarse] = [s.flops for s in ddit_rt.report(pipe).steps]
    run = cost["band-split"][2]
    assert cost["delta"] == [*cost["band-split"][:2], 3 * run, run]  # two anchors measured once each


def test_records_hold_what_the_scheduler_ran():
    pipe = flux()
    with ddit_rt.accelerated(pipe):
        latents_of(pipe, flux_inputs())
        steps = ddit_rt.report(pipe).steps
    assert [s.index for s in steps] == list(range(8))
    assert [s.timestep for s in steps] == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert [s.sigma for s in steps] == pytest.approx(pipe.scheduler.sigmas[:-1].tolist())
    assert all(s.seconds > 0 and s.executed == "eager" for s in steps)


def test_image_to_image_records_the_steps_it_runs():
    pipe, inputs = ALL["flux-image"]()
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 4, 1, 2]):
        latents_of(pipe, inputs)  # 8 steps at strength 0.75
        steps = ddit_rt.report(pipe).steps
    assert [s.timestep for s in steps] == pytest.approx(pipe.scheduler.timesteps[2:].tolist())


def test_steps_without_a_model_call_say_so():
    pipe = flux()
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 4], coarse="extrapolate"):
        latents_of(pipe, flux_inputs(steps=4))
        steps = ddit_rt.report(pipe).steps
    assert [s.executed for s in steps] == ["eager", "eager", "cached", "cached"]
    assert [s.flops > 0 for s in steps] == [True, True, False, False]


# -- odds and ends of the pipelines ---------------------------------------------------------------------------------


def test_outputs_come_in_the_shape_the_pipeline_asked_for():
    pipe = flux()
    arguments = pipe.transformer.forward
    with ddit_rt.accelerated(pipe, schedule=[1, 2]):
        images = latents_of(pipe, flux_inputs(steps=2, output_type="np"))
        assert images.shape == (1, 64, 64, 3)
        (latents,) = pipe(**flux_inputs(steps=2, return_dict=False))
        assert latents.shape == (1, 64, 16)
    assert pipe.transformer.forward == arguments


def test_outside_a_pipeline_call_the_transformer_is_the_plain_one():
    pipe = flux()
    arguments = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([0.5]),
        "img_ids": pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32),
        "txt_ids": torch.zeros(5, 3),
    }
    plain = pipe.transformer(**arguments).sample
    with ddit_rt.accelerated(pipe, schedule=lambda index, patch_std: 4, coarse="band-split"):
        latents_of(pipe, flux_inputs())
        assert torch.equal(pipe.transformer(**arguments).sample, plain)


def test_callbacks_see_and_change_the_latents():
    def zero(pipe, index, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 7 else {}

    pipe = flux()
    with ddit_rt.accelerated(pipe, schedule=mixed):
        assert not latents_of(pipe, flux_inputs(callback_on_step_end=zero)).any()


def test_pipelines_without_an_instance_dict_are_left_alone():
    assert ddit_rt.restore(3) == 3
    other = SimpleNamespace()
    assert ddit_rt.restore(other) is other
