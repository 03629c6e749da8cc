"""The word-level tokenizer of the demo models' text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

_PAD, _EOS, _UNKNOWN = "[PAD]", "[EOS]", "[UNK]"
SPECIAL = (_PAD, _EOS, _UNKNOWN)
"""Tokens in front of the vocabulary: padding, end, unknown word."""


def word_tokenizer(vocabulary: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over `vocabulary` that appends [EOS]; unknown words are [UNK]."""
    words = {word: index for index, word in enumerate((*SPECIAL, *vocabulary))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=_UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {_EOS}", special_tokens=[(_EOS, words[_EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def padded_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> torch.Tensor:
    """Token ids, int64 (B, length), padded with 0 as the pipelines pad."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
