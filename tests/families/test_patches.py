"""Embedding, de-embedding and positions of coarse tokens, against the transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from calls import caught
from tiny import flux, flux_inputs, latents_of

import ddit_rt
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.families.flux import Flux
from ddit_rt.families.packed import coarse_ids
from ddit_rt.families.wan import _rope
from ddit_rt.granularity import Geometry, patchify, unpatchify

NAMES = ["flux", "flux-guidance", "flux-odd", "wan", "wan-odd", "wan-image", "wan-image-embeds", "wan-batch"]


def upsampled_per_patch(latent, patch, multiple):
    """Every p x p patch of (B, C, F, H, W) upsampled bilinearly by itself."""
    batch, channels, frames, height, width = latent.shape
    rows, columns = height // patch, width // patch
    patches = patchify(latent, patch).reshape(-1, channels, patch, patch)
    large = F.interpolate(patches, scale_factor=multiple, mode="bilinear", align_corners=False)
    return unpatchify(large.reshape(batch, frames * rows * columns, -1), multiple * patch, frames, rows, columns)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_an_upsampled_latent_has_the_tokens_of_the_latent(name, multiple):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    call = family.parse(module, arguments)
    pixels = call.latent if call.condition is None else torch.cat([call.latent, call.condition], dim=1)
    if family.name == "flux":
        base = module.x_embedder(arguments["hidden_states"])
    else:
        base = module.patch_embedding(arguments["hidden_states"]).flatten(2).transpose(1, 2)
    large = upsampled_per_patch(pixels, 2, multiple)
    tokens = family.patch_embedding(module, multiple).tokens(patchify(large, 2 * multiple))
    torch.testing.assert_close(tokens, base, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_coarse_output_is_the_upsampled_output(name, multiple):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    geometry = family.parse(module, arguments).geometry
    rows, columns = geometry.grid(1)
    tokens = torch.randn(1, geometry.tokens(1), module.proj_out.in_features)
    if family.name == "flux":
        base = pipe._unpack_latents(module.proj_out(tokens), 8 * rows, 8 * columns, pipe.vae_scale_factor).unsqueeze(2)
    else:
        blocks = module.proj_out(tokens).reshape(1, geometry.frames, rows, columns, 1, 2, 2, -1)
        base = blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    patches = family.patch_embedding(module, multiple).patches(tokens)
    large = unpatchify(patches, 2 * multiple, geometry.frames, rows, columns)
    torch.testing.assert_close(large, upsampled_per_patch(base, 2, multiple), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_trunk_between_the_ends_of_multiple_one_is_the_transformer(name, native):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    call = family.parse(module, arguments)
    plain = family.output(module, call, module(**arguments))
    embedding = family.patch_embedding(module, 1)
    sigma = float(arguments["timestep"][0]) / family.time_scale
    result = family.run_patches(module, module.forward, call, call.latent, sigma, embedding, 1, native)
    torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)
    assert not [name for name, child in module.named_modules() if "forward" in child.__dict__]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_the_low_latent_is_the_transformer_on_a_small_picture(name):
    """With multiple 1, low_arguments and low_output are the identity around the transformer."""
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    call = family.parse(module, arguments)
    plain = family.output(module, call, module(**arguments))
    sigma = float(arguments["timestep"][0]) / family.time_scale
    low = family.low_arguments(call, call.latent, sigma, 1, True)
    torch.testing.assert_close(family.low_output(module, call, module(**low), 1), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_wrap_inverts_output_in_both_forms(name):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    for return_dict in (True, False):
        given = {**arguments, "return_dict": return_dict}
        call = family.parse(module, given)
        raw = module(**given)
        wrapped = family.wrap(module, call, family.output(module, call, raw))
        assert type(wrapped) is type(raw) and torch.equal(wrapped[0], raw[0])


@pytest.mark.parametrize("name", ["flux", "flux-odd"])
def test_flux_ids_at_multiple_one_are_the_pipelines(name):
    pipe, module, arguments = caught(name)
    full, geometry = arguments["img_ids"], family_of(pipe).parse(module, arguments).geometry
    for native in (True, False):
        ids = coarse_ids(full, geometry, 1, native)
        assert torch.equal(ids, full)
        assert ids.dtype == full.dtype


def test_ids_of_coarse_tokens_are_native_or_centres():
    grid = torch.cartesian_prod(torch.tensor([7.0]), torch.arange(8) + 2.0, torch.arange(8) + 3.0)
    reference = torch.tensor([[9.0, 1.0, 1.0]])
    geometry = Geometry(4, 1, 16, 16, 2)
    native = [[7, 2, 3], [7, 2, 4], [7, 3, 3], [7, 3, 4]]
    centres = [[7, 3.5, 4.5], [7, 3.5, 8.5], [7, 7.5, 4.5], [7, 7.5, 8.5]]
    full = torch.cat([grid, reference])
    assert coarse_ids(full, geometry, 4, True).tolist() == [*native, [9, 1, 1]]
    assert coarse_ids(full, geometry, 4, False).tolist() == [*centres, [9, 1, 1]]
    assert coarse_ids(full.long()[None], geometry, 4, True)[0].tolist() == [*native, [9, 1, 1]]


@pytest.mark.parametrize("name", ["wan", "wan-odd"])
def test_wan_tables_at_multiple_one_are_the_transformers_own(name):
    pipe, module, arguments = caught(name)
    geometry = family_of(pipe).parse(module, arguments).geometry
    for mine, own in zip(_rope(module, geometry, 1, torch.device("cpu")), module.rope(arguments["hidden_states"])):
        assert mine.shape == own.shape
        torch.testing.assert_close(mine, own.to(mine.dtype), rtol=1e-6, atol=1e-6)


def test_wan_tables_of_coarse_tokens_lie_at_the_centres():
    """Twice the angle at the centre is the sum of the angles at the first and the last patch covered."""
    module = caught("wan")[1]
    geometry, k = Geometry(4, 2, 16, 32, 2), 4
    cos, sin = _rope(module, geometry, k, torch.device("cpu"))
    fine_cos, fine_sin = (t.reshape(2, 8, 16, -1) for t in _rope(module, geometry, 1, torch.device("cpu")))
    corners = [(slice(None), slice(i, None, k), slice(i, None, k)) for i in (0, k - 1)]
    axes = slice(module.rope.t_dim, None)  # time is not coarsened
    first, last = ((fine_cos[c].flatten(0, 2)[:, axes], fine_sin[c].flatten(0, 2)[:, axes]) for c in corners)
    cos, sin = cos[0, :, 0, axes], sin[0, :, 0, axes]
    torch.testing.assert_close(cos**2 - sin**2, first[0] * last[0] - first[1] * last[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * sin * cos, first[0] * last[1] + first[1] * last[0], rtol=1e-5, atol=1e-5)


def test_patches_for_another_embedding_are_refused():
    from ddit_rt import AdapterMismatchError

    pipe, module, _ = caught("flux")
    with pytest.raises(AdapterMismatchError, match="patches of 16 values met an embedding made for 64"):
        family_of(pipe).patch_embedding(module, 2).tokens(torch.zeros(1, 4, 16))


@pytest.mark.parametrize("grid", [(2, 258), (300, 2), (1, 259), (516, 1)])
def test_ids_that_were_rounded_are_the_grid_that_they_were_made_of(grid):
    """diffusers makes FLUX's in the model's dtype, and bfloat16 has no 257."""
    rows, columns = grid
    exact = torch.zeros(rows, columns, 3)
    exact[..., 1] += torch.arange(rows)[:, None]
    exact[..., 2] += torch.arange(columns)
    exact = exact.flatten(0, 1)
    rounded, family = exact.to(torch.bfloat16), Flux()
    assert not torch.equal(rounded.float(), exact)
    tokens = torch.zeros(1, rows * columns, 16)
    for ids in (exact, rounded, torch.cat([rounded, rounded + torch.tensor([1, 0, 0])])):
        given = torch.cat([tokens] * (len(ids) // len(exact)), dim=1)
        assert family.grid({"img_ids": ids, "hidden_states": given}) == grid
    geometry = Geometry(4, 1, 2 * rows, 2 * columns, 2)
    for multiple in (2, 4):
        native = coarse_ids(rounded, geometry, multiple, True)
        assert torch.equal(native, coarse_ids(exact, geometry, multiple, True).to(torch.bfloat16))
        assert torch.equal(coarse_ids(rounded, geometry, multiple, False), coarse_ids(exact, geometry, multiple, False))
    moved = rounded.clone()
    moved[-1, 2] += 4
    with pytest.raises(NotCoarseError, match="no plain grid"):
        family.grid({"img_ids": moved, "hidden_states": tokens})


def test_a_wide_picture_in_bfloat16_is_accelerated():
    pipe, given = flux(dtype=torch.bfloat16), flux_inputs(height=16, width=2072, steps=4, dtype=torch.bfloat16)
    with ddit_rt.accelerated(pipe, schedule=[1, 1, 2, 1]):
        assert latents_of(pipe, given).isfinite().all()
        report = ddit_rt.report(pipe)
    assert report.schedule == [1, 1, 2, 1] and not any(step.note for step in report.steps)
