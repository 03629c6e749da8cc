"""What only a clip has: flicker, warping error, growth of the error, smoothness of motion, consistency of its subject.

The last two and flicker follow VBench (Huang et al. 2024, arXiv 2311.17982). Its own package wants weights from the net
(DINO, AMT) and versions of numpy and transformers that diffusers no longer runs with, so what it computes with them is
computed here with what is at hand, and each function says with what.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ..errors import ConfigError
from ..schedule import PSNR_LIMIT
from .adherence import SIDE, load_reader
from .optical_flow import Motion, find_flow, warp

ClipMetric = Callable[[Tensor, Tensor], float]
"""(clips, base clips), both (B, F, 3, H, W) float in [0, 1] -> value, the mean over B."""

_MOST = 100.0  # of a ratio whose denominator may be 0


def psnr_of_frames(clips: Tensor, base: Tensor) -> list[float]:
    """PSNR of every frame to the base clip's.

    Args:
        clips, base: (B, F, 3, H, W) float in [0, 1].

    Returns:
        F values in dB, each from the mean squared error over a frame's values, the mean over B; 100 at most.
    """
    _check(clips, 1)
    batch, count = clips.shape[:2]
    each = peak_signal_noise_ratio(
        clips.flatten(0, 1), base.flatten(0, 1), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return [float(value) for value in each.clamp(max=PSNR_LIMIT).view(batch, count).mean(0)]


def error_growth(clips: Tensor, base: Tensor) -> float:
    """By how much the error grows along the clip: what the line of best fit through the frames' PSNR falls.

    Args:
        clips, base: (B, F, 3, H, W) float in [0, 1], F at least 2.

    Returns:
        dB from the first frame to the last; below 0 where later frames are nearer.
    """
    _check(clips, 2)
    return growth_of(psnr_of_frames(clips, base))


def growth_of(decibels: list[float]) -> float:
    """What :func:`error_growth` makes of the PSNR of F frames in dB."""
    values = torch.tensor(decibels, dtype=torch.float64)
    places = torch.linspace(-0.5, 0.5, len(values), dtype=torch.float64)
    return -float((places * values).sum() / places.square().sum())


def temporal_difference(clips: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, which VBench's temporal flickering is one less than 1 of.

    Args:
        clips: (B, F, 3, H, W) float in [0, 1], F at least 2.

    Returns:
        0 for a still picture, 1 at most.
    """
    _check(clips, 2)
    return float((clips[:, 1:] - clips[:, :-1]).abs().mean())


def flicker(clips: Tensor, base: Tensor) -> float:
    """:func:`temporal_difference` over the base clip's: above 1 the frames change more than the base's do.

    VBench's own number counts a moving thing as flicker; the base clip shows the same motion.

    Args:
        clips, base: (B, F, 3, H, W) float in [0, 1], F at least 2.

    Returns:
        A ratio, 100 at most; 1 where neither changes.
    """
    own, other = temporal_difference(clips), temporal_difference(base)
    if own == other:
        return 1.0
    return min(own / max(other, 1e-12), _MOST)


def warping() -> ClipMetric:
    """Loads the warping error beyond the base clip's own (Lai et al. 2018, arXiv 1808.00449, equation 11).

    The base clip says how things move (:mod:`.optical_flow`). Along its motion neighbouring frames should look alike;
    the error is the mean square of what they differ by, over what both show.

    Returns:
        (clips, base), F at least 2 -> difference of the two errors, squares of values in [0, 1]; 0 for the base clip,
        and below 0 for one that changes less along the base's motion than the base itself.

    Raises:
        MetricUnavailableError: OpenCV is missing.
    """
    find = find_flow()

    def score(clips: Tensor, base: Tensor) -> float:
        _check(clips, 2)
        found = []
        for clip, own in zip(clips.float(), base.float()):
            motion = find(own[:-1], own[1:])
            found.append(warping_error(clip, motion) - warping_error(own, motion))
        return sum(found) / len(found)

    return score


def warping_error(clip: Tensor, motion: Motion) -> float:
    """Mean square of the difference of every frame and the next one brought back to it, over visible pixels.

    Args:
        clip: (F, 3, H, W) float in [0, 1].
        motion: Of F - 1 frames to the next.

    Returns:
        Between 0 and 1; 0 where nothing is visible.
    """
    differences = (clip[:-1] - warp(clip[1:], motion.there)).square().mean(1, keepdim=True)
    return float((differences * motion.visible).sum() / motion.visible.sum().clamp_min(1))


def smoothness() -> ClipMetric:
    """Loads the smoothness of motion, as VBench defines it, with frames interpolated along optical flow.

    Every second frame is left out and made again from its neighbours; the score is 1 less the mean absolute difference.
    VBench makes it with the network AMT-S; here both neighbours are brought half the way by their flow (Jiang et al.
    2018, arXiv 1712.00080, equation 4) and averaged. Scores of the two do not compare.

    Returns:
        (clips, any), F at least 3 -> score, 1 the best.

    Raises:
        MetricUnavailableError: OpenCV is missing.
    """
    find = find_flow()

    def score(clips: Tensor, base: Tensor) -> float:
        _check(clips, 3)
        found = []
        for clip in clips.float():
            before, after = clip[:-2:2], clip[2::2]
            left_out = clip[1 : 2 * len(after) : 2]
            found.append(1 - float((left_out - _between(before, after, find(before, after))).abs().mean()))
        return sum(found) / len(found)

    return score


def _between(before: Tensor, after: Tensor, motion: Motion) -> Tensor:
    """(N, 3, H, W): the frames in the middle."""
    towards = (motion.there - motion.back) / 4
    return (warp(before, -towards) + warp(after, towards)) / 2


def consistency() -> ClipMetric:
    """Loads the consistency of the subject, as VBench defines it, in features of the network that reads demo pictures.

    The mean over all frames but the first of the cosines between a frame's features and those of the frame before it
    and of the first frame, halved and added, none below 0. VBench takes the features of DINO ViT-B/16; here they are
    the last ones of the demo's reader (:class:`~ddit_rt.evaluate.adherence.ReaderNet`), averaged over the picture.
    Scores of the two do not compare, and the reader knows the demo models' drawings alone.

    Returns:
        (clips, any), F at least 2 -> score in [0, 1], 1 the best.
    """
    reader = load_reader()

    @torch.no_grad()
    def score(clips: Tensor, base: Tensor) -> float:
        _check(clips, 2)
        small = F.interpolate(clips.float().flatten(0, 1), (SIDE, SIDE), mode="area")
        features = reader.features(small).mean((2, 3)).unflatten(0, clips.shape[:2])
        before = F.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1).clamp_min(0)
        first = F.cosine_similarity(features[:, 1:], features[:, :1], dim=-1).clamp_min(0)
        return float((before + first).mean() / 2)

    return score


CLIP_PAIRED: dict[str, Callable[[], ClipMetric]] = {
    "growth": lambda: error_growth,
    "flicker": lambda: flicker,
    "warping": warping,
}
"""Metrics of a clip and the plain clip: name -> loader."""

CLIP_OWN: dict[str, Callable[[], ClipMetric]] = {"smoothness": smoothness, "consistency": consistency}
"""Metrics of a clip alone, the plain one among them: name -> loader."""

CLIP = CLIP_PAIRED | CLIP_OWN


def _check(clips: Tensor, least: int) -> None:
    """Refuses what has too few frames.

    Raises:
        ConfigError: with the shape.
    """
    if clips.ndim != 5 or clips.shape[1] < least:
        raise ConfigError(
            f"clips of shape {tuple(clips.shape)}: this metric takes (B, F, 3, H, W) with at least {least} frames."
        )
