"""What is found out before Ray and the models are started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.served import free_port

from ddit_rt.errors import ConfigError
from ddit_rt.serve import ModelConfig, ServeConfig, launch
from ddit_rt.serve.keys import VARIABLE


def _config(**settings: Any) -> ServeConfig:
    return ServeConfig(models=(ModelConfig(name="demo", model="demo"),), **settings)


@pytest.fixture
def listening() -> Iterator[tuple[str, int]]:
    """An address at which somebody listens, of IPv6."""
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        yield server.getsockname()[:2]


def test_addresses_of_both_kinds_are_probed(listening: tuple[str, int]) -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "::1", "::"):
        launch._check_port(_config(host=host, port=free_port()))
    host, port = listening
    with pytest.raises(ConfigError, match=f"port={port} at host='::1' cannot be listened at"):
        launch._check_port(_config(host=host, port=port))
    with pytest.raises(ConfigError, match=r"host='no\.such\.host\.invalid'"):
        launch._check_port(_config(host="no.such.host.invalid", port=port))


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("a.example", "http://a.example:80"),
    ],
)
def test_the_address_that_is_told_can_be_called(host: str, url: str) -> None:
    assert launch._url(_config(host=host, port=80)) == url


def test_keys_that_cannot_be_read_are_found_before_ray_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="the extra 'serve' is not installed")
    begun: list[Any] = []

    def init(address: str, **_: Any) -> None:
        begun.append(address)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv(VARIABLE, raising=False)
    config = _config(port=free_port(), keys_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"keys_file=.*no such file"):
        launch.run(config)
    assert not begun
    with pytest.raises(ConnectionError):  # the file may lie on the cluster's machines
        launch.run(config, "ray://elsewhere:10001")
    assert begun == ["ray://elsewhere:10001"]
