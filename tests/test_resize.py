"""PI-resize is exact on bilinear upsamplings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ddit_rt import ConfigError
from ddit_rt.resize import bilinear_matrix, pi_resize_deembed, pi_resize_embed

patch_sizes = st.integers(1, 4)
multiples = st.integers(1, 4)


def upsampled(patches, multiple):
    """(B, C, p, p) -> (B, C, kp, kp), each patch by itself."""
    return F.interpolate(patches, scale_factor=multiple, mode="bilinear", align_corners=False)


@given(patch_sizes, multiples)
def test_the_matrix_is_bilinear_upsampling(patch, multiple):
    patches = torch.randn(2, 3, patch, patch, dtype=torch.float64)
    by_matrix = patches.flatten(2) @ bilinear_matrix(patch, multiple).T
    torch.testing.assert_close(by_matrix.reshape(2, 3, multiple * patch, -1), upsampled(patches, multiple))


@given(patch_sizes, multiples, st.integers(1, 4), st.integers(1, 6))
def test_an_upsampled_patch_gives_the_token_of_the_patch(patch, multiple, channels, width):
    weight, patches = torch.randn(width, channels, patch, patch), torch.randn(5, channels, patch, patch)
    resized = pi_resize_embed(weight, multiple)
    assert resized.shape == (width, channels, multiple * patch, multiple * patch)
    tokens = torch.einsum("dcij,bcij->bd", resized, upsampled(patches, multiple))
    torch.testing.assert_close(tokens, torch.einsum("dcij,bcij->bd", weight, patches), rtol=1e-4, atol=1e-4)


@given(patch_sizes, multiples, st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_the_deembedding_gives_the_upsampling_of_the_base_output(patch, multiple, channels, width, biased):
    weight = torch.randn(patch**2 * channels, width)
    bias = torch.randn(patch**2 * channels) if biased else None
    tokens = torch.randn(5, width)

    def patches(weight, bias, side):
        return F.linear(tokens, weight, bias).reshape(5, side, side, channels).permute(0, 3, 1, 2)

    large, large_bias = pi_resize_deembed(weight, bias, multiple, patch_size=patch)
    assert (large_bias is None) == (bias is None)
    base = upsampled(patches(weight, bias, patch), multiple)
    torch.testing.assert_close(patches(large, large_bias, multiple * patch), base, rtol=1e-4, atol=1e-4)


def test_multiple_one_changes_nothing_and_dtypes_stay():
    weight, rows = torch.randn(4, 3, 2, 2).bfloat16(), torch.randn(12, 4).bfloat16()
    assert torch.equal(pi_resize_embed(weight, 1), weight)
    resized, bias = pi_resize_deembed(rows, rows[:, 0], 1)
    assert torch.equal(resized, rows) and torch.equal(bias, rows[:, 0])
    assert pi_resize_embed(weight, 2).dtype == torch.bfloat16


@pytest.mark.parametrize("k", [0, -1, 1.5, "2"])
def test_a_bad_multiple_is_named(k):
    for resize in (
        lambda: pi_resize_embed(torch.ones(1, 1, 2, 2), k),
        lambda: pi_resize_deembed(torch.ones(4, 1), None, k),
    ):
        with pytest.raises(ConfigError, match=f"k={k!r}"):
            resize()


def test_bad_shapes_are_named():
    with pytest.raises(ConfigError, match=r"\(3, 2, 2\)"):
        pi_resize_embed(torch.ones(3, 2, 2), 2)
    with pytest.raises(ConfigError, match=r"\(1, 1, 2, 3\)"):
        pi_resize_embed(torch.ones(1, 1, 2, 3), 2)
    with pytest.raises(ConfigError, match=r"\(6, 4\)"):
        pi_resize_deembed(torch.ones(6, 4), None, 2)
