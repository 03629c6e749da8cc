"""Who may come, and how often."""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from ..errors import ConfigError
from ..settings import read_text
from .errors import ApiError

VARIABLE = "DDIT_RT_API_KEYS"
"""Environment variable with keys as they are, separated by commas."""

_LINE = re.compile(r"(?P<name>[\w.@-]{1,100})\s+(?P<digest>[0-9a-fA-F]{64})(\s+(?P<rate>[1-9]\d{0,5}))?")


@dataclass(frozen=True)
class Owner:
    """Of a request.

    Attributes:
        name: Of the key, or the address; stands in logs, and with what is stored.
        rate: Requests per minute, None for no limit.
    """

    name: str
    rate: int | None


class Keys:
    """Knows keys by their SHA-256, and counts the requests of each.

    Args:
        file: With a line ``NAME SHA256 [REQUESTS-PER-MINUTE]`` per key; ``#`` begins a comment. Keys of one name are
            one owner's, as while one replaces another. None for none.
        rate: Requests per minute of keys whose line names none, and of addresses where there are no keys.

    Raises:
        ConfigError: the file cannot be read, a line has the name of a key of the environment, or a key is not of ASCII.
    """

    def __init__(self, file: str | None = None, rate: int | None = None) -> None:
        self._rate = rate
        self._owners: dict[str, Owner] = {}
        given = [key for key in map(str.strip, os.environ.get(VARIABLE, "").split(",")) if key]
        for number, key in enumerate(given, 1):
            if not key.isascii():  # what a header holds beyond it is read as another encoding
                raise ConfigError(f"{VARIABLE}: key {number} has letters beyond ASCII and cannot match: take another.")
        # not by their place, which changes with the list: what is stored under a name would be another key's then
        named = {f"key-{digest(key)[:12]}": digest(key) for key in given}
        for number, line in enumerate(read_text(Path(file), "keys_file").splitlines() if file else (), 1):
            content = line.partition("#")[0].strip()
            found = _LINE.fullmatch(content)
            if found is None and content:
                # the line is not shown: it may hold a key
                raise ConfigError(f"keys_file={file!r}, line {number}: NAME SHA256 [REQUESTS-PER-MINUTE] is wanted.")
            if found is not None:
                if found["name"] in named:
                    message = f"{found['name']!r} is the name of a key in {VARIABLE}; take another."
                    raise ConfigError(f"keys_file={file!r}, line {number}: {message}")
                own = int(found["rate"]) if found["rate"] else rate
                self._owners[found["digest"].lower()] = Owner(found["name"], own)
        for name, hashed in named.items():
            self._owners.setdefault(hashed, Owner(name, rate))  # a key of both has what its line says
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    @property
    def wanted(self) -> bool:
        """Whether requests need one."""
        return bool(self._owners)

    def owner(self, authorization: str | None, address: str) -> Owner:
        """Whose a request is.

        Args:
            authorization: The header, or None.
            address: Of the client.

        Raises:
            ApiError: 401, without a key or with one that is not known.
        """
        if not self._owners:
            return Owner(address, self._rate)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "missing_api_key", "send an API key: 'Authorization: Bearer KEY'.")
        found = self._owners.get(digest(key.strip()))
        if found is None:
            raise ApiError(401, "invalid_api_key", "this API key is not known.")
        return found

    def count(self, owner: Owner) -> None:
        """Raises:
        ApiError: 429, where the owner has asked too often in the last minute.
        """
        if owner.rate is None:
            return
        limit = RateLimitItemPerMinute(owner.rate)
        if not self._limiter.hit(limit, owner.name):
            wait = self._limiter.get_window_stats(limit, owner.name).reset_time - time.time()
            message = f"{owner.rate} requests a minute are allowed."
            raise ApiError(429, "rate_limit_exceeded", message, retry_after=max(wait, 1.0))


def digest(key: str) -> str:
    """What a key file holds of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
