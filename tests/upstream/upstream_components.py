"""Local stand-ins for the tiny text models that diffusers' tests load from the hub."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, T5Config, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = "a an the painting of squirrel eating burger different prompt dance monkey negative very long bad quality"


def clip(folder: Path) -> None:
    """A byte-level tokenizer of 514 entries; the end token has the highest id, where CLIP looks for it."""
    letters = list(bytes_to_unicode().values())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)


def t5(folder: Path) -> None:
    """A tokenizer of words and characters, and the configuration of an encoder of width 32."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS.split()]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    T5Tokenizer(vocab=pieces).save_pretrained(folder)
    T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=5,
        num_heads=4,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        dropout_rate=0.0,  # some tests leave the encoder in training mode
    ).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-clip": clip,
    "hf-internal-testing/tiny-random-t5": t5,
}


class LocalHub:
    """Answers ``from_pretrained`` of the ids in :data:`BUILDERS` from a temporary folder, made at first use."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="upstream-components-")
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> LocalHub:
        for owner in (AutoConfig, AutoTokenizer, PreTrainedTokenizerBase):
            self._patch.setattr(owner, "from_pretrained", self._answering(owner.__dict__["from_pretrained"].__func__))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()
        self._folder.cleanup()

    def folder(self, name: str) -> str:
        """Where the stand-in of the hub id ``name`` lies; any other name is given back."""
        build = BUILDERS.get(name)
        if build is None:
            return name
        folder = Path(self._folder.name) / name.rsplit("/", 1)[-1]
        if not folder.exists():
            build(folder)
        return str(folder)

    def _answering(self, original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
            return original(cls, self.folder(name) if isinstance(name, str) else name, *args, **kwargs)

        return classmethod(from_pretrained)
