"""Who may come."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ddit_rt.errors import ConfigError
from ddit_rt.serve.errors import ApiError
from ddit_rt.serve.keys import VARIABLE, Keys


def _line(name: str, key: str, rate: str = "") -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate}\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("# who may come\n" + _line("ada", "secret-a", "2") + "\n" + _line("bob", "secret-b"))
    return str(path)


def test_without_keys_everybody_may_come_and_is_known_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    keys = Keys(rate=3)
    assert not keys.wanted
    owner = keys.owner(None, "10.0.0.1")
    assert (owner.name, owner.rate) == ("10.0.0.1", 3)


def test_keys_of_the_file_and_of_the_environment(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "third, fourth, secret-a")
    keys = Keys(file, 9)
    assert keys.owner("Bearer secret-a", "x").name == "ada" and keys.owner("Bearer secret-a", "x").rate == 2
    assert keys.owner("bearer  secret-b", "x").rate == 9
    assert keys.owner("Bearer fourth", "x").name == "key-" + hashlib.sha256(b"fourth").hexdigest()[:12]


def test_a_key_that_is_withdrawn_gives_its_name_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(key: str) -> str:
        return Keys().owner(f"Bearer {key}", "x").name

    monkeypatch.setenv(VARIABLE, "alice-key,bob-key")
    alice, bob = name("alice-key"), name("bob-key")
    monkeypatch.setenv(VARIABLE, "bob-key")
    assert name("bob-key") == bob != alice


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "first, schl\u00fcssel")
    with pytest.raises(ConfigError, match="key 2 has letters beyond ASCII") as caught:
        Keys()
    assert "schl" not in str(caught.value)


def test_a_name_that_is_taken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(_line("ada", "old") + _line("bob", "b") + _line("ada", "new"))
    keys = Keys(str(path))  # one key replaces another
    assert keys.owner("Bearer old", "x").name == keys.owner("Bearer new", "x").name == "ada"
    monkeypatch.setenv(VARIABLE, "third")
    path.write_text(_line(Keys().owner("Bearer third", "x").name, "d"))
    with pytest.raises(ConfigError, match=r"line 1: 'key-.* is the name of a key in"):
        Keys(str(path))


@pytest.mark.parametrize(
    "header, code",
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("Basic secret-a", "missing_api_key"),
        ("Bearer secret-c", "invalid_api_key"),
        ("Bearer \udce9", "invalid_api_key"),
    ],
)
def test_others_are_refused(file: str, header: str | None, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        Keys(file).owner(header, "x")
    assert (caught.value.status, caught.value.code) == (401, code)


def test_who_asks_too_often_waits(file: str) -> None:
    keys = Keys(file)
    ada, bob = keys.owner("Bearer secret-a", "x"), keys.owner("Bearer secret-b", "x")
    keys.count(ada)
    keys.count(ada)
    with pytest.raises(ApiError) as caught:
        keys.count(ada)
    assert caught.value.status == 429 and 0 < (caught.value.retry_after or 0) <= 60
    for _ in range(50):
        keys.count(bob)


def test_a_line_that_is_none_is_refused_without_being_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("ada my-secret-in-plain\n")
    with pytest.raises(ConfigError, match="line 1") as caught:
        Keys(str(path))
    assert "my-secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        Keys(str(tmp_path / "none"))
