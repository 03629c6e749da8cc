"""Metrics against independent implementations."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ddit_rt.evaluate.judges import fid, read_pictures
from ddit_rt.evaluate.unavailable import MetricUnavailableError, unavailable
from ddit_rt.trajectories.fidelity import psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(2, 3, 40, 52, generator=generator)
    base = torch.nn.functional.avg_pool2d(base, 5, 1, 2)  # structure, not noise alone
    return (base + 0.05 * torch.randn(base.shape, generator=generator)).clamp(0, 1), base


def test_psnr_against_scikit_image(pair):
    images, base = pair
    assert psnr(images, base) == pytest.approx(peak_signal_noise_ratio(base.numpy(), images.numpy(), data_range=1.0))
    assert psnr(base, base) == float("inf")


def test_ssim_against_scikit_image(pair):
    images, base = pair
    expected = [
        structural_similarity(
            b.numpy(), i.numpy(), data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, win_size=11,
        )
        for i, b in zip(images, base)
    ]  # fmt: skip
    assert ssim(images, base) == pytest.approx(np.mean(expected), abs=1e-5)
    assert ssim(base, base) == pytest.approx(1.0)


def test_videos_are_compared_frame_by_frame(pair):
    images, base = pair
    assert ssim(images[None], base[None]) == pytest.approx(ssim(images, base))
    assert psnr(images[None], base[None]) == pytest.approx(psnr(images, base))


class MeanColour(torch.nn.Module):
    """(N, 3, H, W) -> its mean colours: features that need no weights."""

    num_features = 3

    def forward(self, pictures):
        return pictures.float().mean((-2, -1)) / 255


def test_fid_on_fixed_features(tmp_path):
    generator = torch.Generator().manual_seed(1)
    sets = []
    for name, scale in (("base", 120), ("fast", 200)):
        pixels = (torch.rand(12, 8, 8, 3, generator=generator) * scale).to(torch.uint8)
        sets.append([tmp_path / f"{name}-{i}.png" for i in range(len(pixels))])
        for path, picture in zip(sets[-1], pixels):
            Image.fromarray(picture.numpy()).save(path)
    base, fast = (MeanColour()(read_pictures(paths)).double().numpy() for paths in sets)
    mean = np.square(base.mean(0) - fast.mean(0)).sum()
    covariances = np.cov(base.T), np.cov(fast.T)
    expected = mean + np.trace(covariances[0] + covariances[1] - 2 * linalg.sqrtm(covariances[0] @ covariances[1]).real)
    assert fid(MeanColour(), batch=5)(sets[1], sets[0], []) == [pytest.approx(expected, rel=1e-4)]
    assert fid(MeanColour())(sets[1][:1], sets[0][:1], []) == []


def test_unavailable_metrics_say_what_is_missing():
    error = unavailable("LPIPS", "weights", OSError("no route\nto the host"))
    assert isinstance(error, MetricUnavailableError)
    assert "ddit-rt[eval]" in str(error) and "no route" in str(error) and "host" not in str(error)
