"""The page at ``/``: static files that talk to the server's HTTP interface and to nothing else."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Holds ``index.html``, to be served at ``/``, and its assets, to be served below ``/playground``."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The header under which the page works: no inline script or style, nothing of another origin, no text parsed as HTML.
Pictures and films are blobs, as they come with the request's key."""

__all__ = ["CONTENT_SECURITY_POLICY", "FOLDER"]
