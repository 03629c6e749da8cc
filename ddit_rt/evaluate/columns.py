"""What a row of an evaluation may hold of metrics, and how tables and figures call it."""

from __future__ import annotations

from .metrics import PAIRED, TO_CONVERGED
from .video_metrics import CLIP, CLIP_PAIRED

MEASURED = (*PAIRED, *CLIP)
"""What a plan may ask for."""

TO_PLAIN = (*PAIRED, *CLIP_PAIRED)
"""Distances from the plain picture or clip, which that one itself has none of."""

COMPARED = (*PAIRED, *TO_CONVERGED.values(), *CLIP)
"""All that a row may hold of metrics."""

FRAMES = "psnr_frames"
"""What a row calls the PSNR of a clip's frames to the plain clip's, a list in dB."""

LOWER_IS_BETTER = ("lpips", TO_CONVERGED["lpips"], "growth", "flicker", "warping")

METRIC_NAMES = {
    "psnr": "PSNR to base, dB",
    "ssim": "SSIM to base",
    "lpips": "LPIPS to base",
    TO_CONVERGED["psnr"]: "PSNR to converged, dB",
    TO_CONVERGED["ssim"]: "SSIM to converged",
    TO_CONVERGED["lpips"]: "LPIPS to converged",
    "growth": "error's growth along the clip, dB",
    "flicker": "flicker over base's",
    "warping": "warping error less base's",
    "smoothness": "motion smoothness (VBench's, by optical flow)",
    "consistency": "subject consistency (VBench's, demo reader's features)",
    "fid": "FID to base",
    "clip": "CLIP score",
    "imagereward": "ImageReward",
    "adherence": "prompt adherence",
}
"""Metric -> its name in tables and figures, in their order."""
