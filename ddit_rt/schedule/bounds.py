"""What may be asked of a schedule."""

from __future__ import annotations

import math

from ..errors import ConfigError

PSNR_LIMIT = 100.0
"""dB of the very same picture: infinity has no place in JSON nor in a mean."""


def check_speedup(speedup: float) -> None:
    """Refuses a wanted speed-up that is none.

    Raises:
        ConfigError: it is not above 1.
    """
    if not speedup > 1:
        raise ConfigError(f"speedup={speedup!r}: ask for a ratio above 1, as in 2.0.")


def check_quality(quality: float) -> None:
    """Refuses a wanted quality that is none.

    Raises:
        ConfigError: it is no number of dB above 0.
    """
    if not 0 < quality < math.inf:
        raise ConfigError(f"quality={quality!r}: ask for a PSNR in dB, above 0, as in 40.0.")
