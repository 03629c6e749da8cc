"""What a user names as a file, a directory or a hub id, and what of it is asked of the hub."""

from pathlib import Path

import pytest

from ddit_rt import AdapterMismatchError, ConfigError, hub


@pytest.fixture
def asked(monkeypatch):
    """The repositories that the hub is asked for; it has none of them."""
    ids = []

    def download(repo_id, name, revision=None):
        ids.append(repo_id)
        raise OSError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return ids


def find(source, error=ConfigError):
    return hub.find_file(source, "a.json", None, "thing", error)


def test_what_exists_here_is_never_looked_for_on_the_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("owner/name")
    folder.mkdir(parents=True)
    assert find("owner/name") == folder / "a.json"  # not there: for whoever reads it to say
    (folder / "b").write_text("")
    assert find("owner/name/b") == folder / "b" and find(folder) == folder / "a.json"
    assert not asked


@pytest.mark.parametrize("source", ["none", "a/b/c", "folder/none.json", "/none/here", Path("owner/other")])
def test_what_can_be_no_id_stays_a_path(asked, source):
    assert find(source) == Path(source) and not asked


@pytest.mark.parametrize("error", [ConfigError, AdapterMismatchError])
def test_an_id_that_the_hub_does_not_have(asked, error):
    message = r"thing='owner/other': neither a local path nor a.json of a reachable hub repository \(offline\)"
    with pytest.raises(error, match=message):
        find("owner/other", error)
    assert asked == ["owner/other"]


def test_an_id_that_cannot_be_one_is_refused_without_a_network():
    with pytest.raises(ConfigError, match=r"thing='owner/two words': neither a local path"):
        find("owner/two words")
