"""One file of ours in a repository of the Hugging Face hub: finding it, and publishing it with a card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from .errors import DDiTError


def find_file(source: str | Path, file_name: str, revision: str | None, setting: str, error: type[DDiTError]) -> Path:
    """The local path of what a user named: a file, a directory that holds one, or a hub id ``owner/name``.

    Args:
        source: As the user wrote it. What exists here is never looked for on the hub.
        file_name: Of the file in a directory or a repository.
        revision: Of the hub repository.
        setting: Name of the argument, for the message.
        error: Raised where the hub does not have it.

    Returns:
        The path. There need not be a file where ``source`` can be no hub id: whoever reads it says so.

    Raises:
        DDiTError: of the kind ``error``.
    """
    path = Path(source)
    if path.is_dir():
        return path / file_name
    could_be_id = isinstance(source, str) and source.count("/") == 1 and not path.is_absolute()
    if path.is_file() or not could_be_id or path.suffix == Path(file_name).suffix:
        return path
    try:
        return Path(hf_hub_download(str(source), file_name, revision=revision))
    except (OSError, ValueError) as reason:  # an id that cannot be one is a ValueError
        raise error(
            f"{setting}={source!r}: neither a local path nor {file_name} of a reachable hub repository ({reason})."
        ) from reason


def push_file(
    repo_id: str, save: Callable[[Path], object], card: str, message: str, private: bool, token: str | None
) -> str:
    """Uploads a file with a card, creating the repository if need be.

    Args:
        repo_id: ``owner/name``.
        save: Writes the file into an empty directory.
        card: The repository's README, in Markdown.
        message: Of the commit.
        private: For a new repository.
        token: Of the hub; None takes the one logged in with.

    Returns:
        The commit's address.
    """
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        (Path(directory) / "README.md").write_text(card, encoding="utf-8")
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message))
