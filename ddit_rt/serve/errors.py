"""Errors of requests, as OpenAI's error object."""

from __future__ import annotations

from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
"""Status -> ``type`` of the error object; others are the server's."""


class ApiError(Exception):
    """A request that ends without a result.

    Args:
        status: Of HTTP.
        code: For programs, such as "model_not_found".
        message: For people; says which value and what would do.
        param: Field of the request.
        retry_after: Seconds after which it may work, for a header.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message, self.param, self.retry_after)

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A value of the request that cannot be served."""
    return ApiError(400, code, message, param)
