"""What may be asked of a schedule."""

from __future__ import annotations

from ..errors import ConfigError


def check_speedup(speedup: float) -> None:
    """Refuses a wanted speed-up that is none.

    Raises:
        ConfigError: it is not above 1.
    """
    if not speedup > 1:
        raise ConfigError(f"speedup={speedup!r}: ask for a ratio above 1, as in 2.0.")
