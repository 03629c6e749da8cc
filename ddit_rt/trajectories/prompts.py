"""A prompt of a run: a text, or the call's arguments that stand for it where there are no text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..errors import ConfigError

Prompt: TypeAlias = str | Mapping[str, Any]
"""A text, or arguments of a pipeline call such as ``prompt_embeds``, a negative prompt's and pictures."""

_OURS = ("generator", "output_type", "num_inference_steps")
"""What those who make runs set themselves."""


def call_with(prompt: Prompt, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call for one prompt.

    Args:
        prompt: Its own arguments go before the call's.
        call: What calls have in common.

    Raises:
        ConfigError: the prompt is neither a text nor a mapping, or holds what is not a prompt's to say.
    """
    if isinstance(prompt, str):
        return {**call, "prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise ConfigError(
            f"prompts hold a {type(prompt).__name__}: take texts, or mappings of a call's arguments, as in "
            "{'prompt_embeds': embeds}."
        )
    for name in _OURS:
        if name in prompt:
            raise ConfigError(f"a prompt holds {name!r}: seed= and the call's own arguments decide about it.")
    return {**call, **prompt}


def name_of(prompt: Prompt, index: int) -> str:
    """How to call the ``index``-th prompt in a line of text."""
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    return text if isinstance(text, str) else f"prompt {index}"
