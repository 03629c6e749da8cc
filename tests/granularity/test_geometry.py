import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt.granularity import Geometry, coarse_centres, crop_to_latent, pad_to_grid, patchify, unpatchify

multiples = st.sampled_from([1, 2, 4])
sides = st.integers(1, 9)


@st.composite
def latents(draw):
    """A latent of whole p x p patches, and its geometry."""
    batch, channels, frames = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)))
    patch = draw(st.sampled_from([1, 2]))
    height, width = draw(sides) * patch, draw(sides) * patch
    latent = torch.randn(batch, channels, frames, height, width)
    return latent, Geometry(channels, frames, height, width, patch)


@given(latents(), multiples)
def test_padding_reaches_the_next_coarse_grid_and_cropping_undoes_it(case, multiple):
    latent, geometry = case
    padded = pad_to_grid(latent, geometry, multiple)
    side = multiple * geometry.patch
    for size, padded_size in zip(latent.shape[3:], padded.shape[3:]):
        assert padded_size % side == 0 and 0 <= padded_size - size < side
    assert geometry.tokens(multiple) * side**2 == geometry.frames * padded.shape[3] * padded.shape[4]
    assert torch.equal(crop_to_latent(padded, geometry), latent)


@given(latents(), multiples)
def test_padding_repeats_the_edge(case, multiple):
    latent, geometry = case
    padded = pad_to_grid(latent, geometry, multiple)
    rows = torch.arange(padded.shape[3]).clamp(max=geometry.height - 1)
    columns = torch.arange(padded.shape[4]).clamp(max=geometry.width - 1)
    assert torch.equal(padded, latent[..., rows[:, None], columns[None, :]])


@given(latents(), multiples)
def test_unpatchify_inverts_patchify(case, multiple):
    latent, geometry = case
    padded = pad_to_grid(latent, geometry, multiple)
    side = multiple * geometry.patch
    tokens = patchify(padded, side)
    assert tokens.shape == (latent.shape[0], geometry.tokens(multiple), geometry.channels * side**2)
    assert torch.equal(unpatchify(tokens, side, geometry.frames, *geometry.grid(multiple)), padded)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patches_of_two_are_fluxs_own_packing(rows, columns, channels):
    latent = torch.randn(2, channels, 2 * rows, 2 * columns)
    packed = FluxPipeline._pack_latents(latent, 2, channels, 2 * rows, 2 * columns)
    assert torch.equal(patchify(latent.unsqueeze(2), 2), packed)


def test_a_compiled_model_packs_in_one_graph():
    def packed_and_back(latent):
        tokens = patchify(latent, 2)
        return tokens, unpatchify(tokens, 2, latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2)

    compiled = torch.compile(packed_and_back, fullgraph=True, backend="aot_eager")
    for shape in ((1, 4, 1, 8, 8), (2, 4, 3, 16, 8)):
        latent = torch.randn(shape)
        for found, expected in zip(compiled(latent), packed_and_back(latent)):
            assert torch.equal(found, expected)


@given(st.integers(1, 12), multiples)
def test_coarse_centres_are_the_means_of_the_fine_coordinates_they_cover(count, multiple):
    full = torch.arange(count * multiple, dtype=torch.float32)
    assert torch.equal(coarse_centres(count, multiple), full.reshape(count, multiple).mean(1))


def test_coarse_grids_are_padded_to_divide_among_ranks():
    wan = Geometry(16, 21, 60, 104, 2, ranks=4)
    assert wan.tokens(1) == 21 * 30 * 52  # as the model has it
    assert wan.grid(2) == (16, 26)  # 15 x 26 would be 8190 tokens
    assert wan.padding(2) == (4, 0)
    for ranks in (2, 3, 4, 8):
        geometry = Geometry(4, 1, 36, 20, 2, ranks)
        for multiple in (2, 4):
            rows, columns = geometry.grid(multiple)
            assert geometry.tokens(multiple) % ranks == 0
            assert rows * 2 * multiple >= 36
            assert columns * 2 * multiple >= 20
