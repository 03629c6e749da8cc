"""Requests made from the server's own OpenAPI document, right and wrong: never a 500."""

from __future__ import annotations

import httpx
import pytest
from helpers.served import LocalServer
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


def test_no_body_is_answered_with_a_500(server: LocalServer) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    seen: dict[int, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        # for each operation
        @settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
        @_given(operation)
        def probe(case: object) -> None:
            answer = case.call(base_url=server.url, timeout=30)  # type: ignore[attr-defined]
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500 or answer.status_code == 504, answer.text  # its own time was too short
            if answer.status_code >= 400:
                assert {"message", "type", "param", "code"} == set(answer.json()["error"])

        probe()
    assert sum(seen.values()) >= 300 and seen.get(400, 0) >= 50, seen


def _given(operation: object) -> object:
    from hypothesis import given

    return given(case=operation.as_strategy())  # type: ignore[attr-defined]
