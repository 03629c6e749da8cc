"""Text between two markers of a Markdown file, such as ``<!-- results-table -->`` and ``<!-- /results-table -->``."""

from __future__ import annotations


def has(text: str, name: str) -> bool:
    """Whether ``text`` has the markers of ``name``."""
    return f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``.

    Raises:
        SystemExit: the markers are not there.
    """
    if not has(text, name):
        raise SystemExit(f"no <!-- {name} --> ... <!-- /{name} -->: add the two markers where the text belongs.")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"
