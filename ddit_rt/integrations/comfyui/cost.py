"""An estimate of what a model run costs, from the shapes of a diffusion model's weights alone.

ComfyUI's modules are none that :mod:`ddit_rt.families` knows, quantised ones hide their arithmetic, and counting while
they run would get in the way of compiled ones. So: 2·tokens per number in the weight matrices of the blocks, and
4·tokens²·width per block for attention, tokens being those of picture and text. Matrices that act on the noise level
run once and are left out. So are the text's own: where there are some, the picture's counterparts do not see the text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

_LEFT_OUT = ("mod", "norm", "ada", "txt", "context", "add_")


@dataclass(frozen=True)
class Cost:
    """Of one model.

    Attributes:
        weights: Numbers in the weight matrices that a token meets.
        width: Of a token.
        blocks: Where tokens meet each other.
    """

    weights: int
    width: int
    blocks: int

    @classmethod
    def of(cls, module: nn.Module) -> Cost:
        """Of a diffusion model; of one without lists of blocks, nothing."""
        weights, widths = 0, Counter[int]()
        blocks = _blocks(module)
        for block in blocks:
            for name, weight in block.named_parameters():
                if weight.ndim == 2 and not any(word in name for word in _LEFT_OUT):
                    weights += weight.numel()
                    widths[min(weight.shape)] += 1
        return cls(weights, widths.most_common(1)[0][0] if widths else 0, len(blocks))

    def flops(self, tokens: int, text_tokens: int, samples: int) -> float:
        """Floating-point operations of one run.

        Args:
            tokens, text_tokens: Per sample.
            samples: In the batch.
        """
        sequence = tokens + text_tokens
        return samples * (2.0 * self.weights * sequence + 4.0 * sequence**2 * self.width * self.blocks)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found
