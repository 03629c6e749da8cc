"""What the operations refuse: a ValueError that names the value and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from ddit_rt import DDiTError, ops

Z = torch.zeros(2, 4, 8, 8)
W = torch.zeros(6, 4, 2, 2)
T = torch.zeros(2, 16, 6)
V = torch.zeros(16, 6)

REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "no increments": ("non-empty list", lambda: ops.latent_evolution([], (4,), 0.4)),
    "one tensor": (r"\[increment\]", lambda: ops.latent_evolution(Z, (4,), 0.4)),  # type: ignore[arg-type]
    "shapes": ("reset the history", lambda: ops.latent_evolution([Z, Z[:1]], (4,), 0.4)),
    "integers": ("torch.int64", lambda: ops.latent_evolution([Z.long()], (4,), 0.4)),
    "rank": (r"\(B, C, H, W\)", lambda: ops.latent_evolution([Z[0]], (4,), 0.4)),
    "empty": ("empty axis", lambda: ops.latent_evolution([Z[..., :0]], (4,), 0.4)),
    "sizes": (r"\[4, 4\]", lambda: ops.latent_evolution([Z], (4, 4), 0.4)),
    "size 0": (r"\[0\]", lambda: ops.latent_evolution([Z], (0,), 0.4)),
    "quantile": ("1.5", lambda: ops.latent_evolution([Z], (4,), 1.5)),
    "quantile NaN": ("nan", lambda: ops.latent_evolution([Z], (4,), math.nan)),
    "packed grid": (r"packed=\(3, 5\)", lambda: ops.latent_evolution([T[..., :4]], (4,), 0.4, packed=(3, 5))),
    "threshold": ("-1", lambda: ops.select_multiple([Z], (4,), 0.4, -1.0)),
    "out dtype": ("int32", lambda: ops.select_multiple([Z], (4,), 0.4, 1.0, out=torch.zeros(2))),
    "weight": (r"\(d, 4, 4, 4\)", lambda: ops.patch_embed(Z, W, None, 4)),
    "bias": (r"\(6,\)", lambda: ops.patch_embed(Z, W, torch.zeros(5), 2)),
    "extra": ("broadcast", lambda: ops.patch_embed(Z, W, None, 2, extra=torch.zeros(15, 6))),
    "mean_over": ("mean_over=0", lambda: ops.patch_embed(Z, W, None, 2, mean_over=0)),
    "scale": ("inf", lambda: ops.patch_embed(Z, W, None, 2, scale=math.inf)),
    "scales": (r"\(3,\)", lambda: ops.patch_embed(Z, W, None, 2, scale=torch.ones(3))),
    "device": ("meta", lambda: ops.patch_embed(Z, W.to("meta"), None, 2)),
    "grid": (r"grid=\(3, 5\)", lambda: ops.patch_deembed(T, V, None, 2, (3, 5))),
    "rows": (r"\(9\*C, 6\)", lambda: ops.patch_deembed(T, V, None, 3, (4, 4))),
    "residual": (r"\(2, 4, 8, 8\)", lambda: ops.patch_deembed(T, V, None, 2, (4, 4), residual=Z[:1])),
    "crop": ("does not fit", lambda: ops.patch_deembed(T, V, None, 2, (4, 4), size=(9, 8))),
    "packed video": ("grid", lambda: ops.patch_deembed(T, V, None, 2, (1, 4, 4), packed=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_value(name: str) -> None:
    pattern, call = REFUSED[name]
    with pytest.raises(ops.OpArgumentError, match=pattern) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DDiTError)


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='cuda'"):
        ops.latent_evolution([Z], (4,), 0.4, backend="cuda")
    monkeypatch.setenv("DDIT_BACKEND", "fast")
    with pytest.raises(ValueError, match=re.escape("DDIT_BACKEND='fast'")):
        ops.latent_evolution([Z], (4,), 0.4)
    monkeypatch.setenv("DDIT_BACKEND", "torch")
    assert ops.latent_evolution([Z], (4,), 0.4).shape == (2, 1)


def test_empty_batch() -> None:
    assert ops.select_multiple([Z[:0]], (4,), 0.4, 1.0).shape == (0,)
    assert ops.patch_embed(Z[:0], W, None, 2).shape == (0, 16, 6)
    assert ops.patch_deembed(T[:0], V, None, 2, (4, 4)).shape == (0, 4, 8, 8)
