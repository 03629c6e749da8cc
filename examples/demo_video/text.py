"""The text side: a word-level tokenizer and a small UMT5 encoder, pre-trained to read clips out of captions.

Wan's cross-attention gives words no position, so the encoder has to put into every word of a noun phrase all that the
phrase says of its thing, its motion included.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ddit_rt.evaluate.adherence import COLOURS
from examples.demo_model.scenes import Span
from examples.training.loop import Budget, Loop, RunLog, load_state, save_atomic
from examples.training.words import SPECIAL, padded_ids, word_tokenizer

from .scenes import BACKGROUNDS, MOTIONS, SHAPES, TEXTURES, VOCABULARY, Clip, caption_spans, sample_clip
from .sizes import Sizes

_COLOURS, _MOTIONS = list(COLOURS), list(MOTIONS)
_FIELDS = {
    "about": 4,
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "texture": len(TEXTURES) + 1,
    "motion": len(MOTIONS) + 1,
    "kind": len(BACKGROUNDS) + 1,
    "drift": 2,
    "rank": 3,
}
"""Classes of one word's labels; 0 means "not said"."""


def build_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """A tokenizer over `scenes.VOCABULARY`."""
    return word_tokenizer(VOCABULARY, sizes.text_tokens)


def build_encoder(sizes: Sizes) -> UMT5EncoderModel:
    """An untrained encoder: (B, tokens) -> (B, tokens, width)."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(SPECIAL) + len(VOCABULARY), d_model=sizes.text_width, d_kv=16,
            d_ff=2 * sizes.text_width, num_layers=sizes.text_layers, num_heads=sizes.text_width // 16 or 1,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, relative_attention_num_buckets=16,
            relative_attention_max_distance=24, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], sizes: Sizes) -> Tensor:
    """Token ids, int64 (B, text_tokens), padded with 0 as `WanPipeline` pads."""
    return padded_ids(tokenizer, captions, sizes.text_tokens)


def embed(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """What `WanPipeline` gives its transformer: hidden states (B, tokens, width), zeros at the padding."""
    mask = (ids > 0).long()
    hidden: Tensor = encoder(ids, mask).last_hidden_state
    return hidden * mask[..., None]


class _Reader(nn.Module):
    """The encoder and the linear heads that read a caption's content out of it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.encoder = build_encoder(sizes)
        self.heads = nn.ModuleDict({name: nn.Linear(sizes.text_width, count) for name, count in _FIELDS.items()})


def _said(clip: Clip, span: Span, rank: int) -> dict[str, int]:
    """What a span says (a plain texture, a still thing and an omitted colour are said by silence)."""
    if isinstance(span.about, int):
        noun, motion = clip.nouns[span.about], clip.actors[span.about].motion
        return {
            "about": 1,
            "shape": 1 + SHAPES.index(noun.shape),
            "colour": 1 + _COLOURS.index(noun.colour) if noun.colour in span.words else 0,
            "texture": 1 + TEXTURES.index(noun.texture),
            "motion": 1 + _MOTIONS.index(motion),
            "rank": 1 + rank if clip.behind else 0,
        }
    if span.about == "background":
        background = clip.background
        named = background.colour_name in span.words
        return {
            "about": 3,
            "kind": 1 + BACKGROUNDS.index(background.kind),
            "colour": 1 + _COLOURS.index(background.colour_name) if named else 0,
            "drift": int(clip.drift != 0),
        }
    return {"about": 2} if span.about == "fence" else {}


def _labels(clip: Clip, spans: list[Span], tokens: int) -> dict[str, list[int]]:
    labels: dict[str, list[int]] = {name: [0] * tokens for name in _FIELDS}
    at = rank = 0
    for span in spans:
        said = _said(clip, span, rank)
        rank += isinstance(span.about, int)
        for offset in range(len(span.words)):
            for name, value in said.items():
                labels[name][at + offset] = value
        at += len(span.words)
    return labels


def train_text(run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool) -> None:
    """Pre-train the encoder and write `text_final.pt`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(sizes)
    reader = _Reader(sizes).to(device)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    accuracy = 0.0

    def loss(step: int, _progress: float) -> Tensor:
        nonlocal accuracy
        rng = Random(f"{seed} text {step}")
        captions, labels = [], []
        for _ in range(sizes.text_batch):
            clip = sample_clip(rng)
            spans = caption_spans(clip, rng)
            captions.append(" ".join(word for span in spans for word in span.words))
            labels.append(_labels(clip, spans, sizes.text_tokens))
        ids = tokenize(tokenizer, captions, sizes).to(device)
        hidden = embed(reader.encoder, ids)
        right = torch.ones_like(ids, dtype=torch.bool)
        total = torch.zeros((), device=device)
        for name, head in reader.heads.items():
            truth = torch.tensor([row[name] for row in labels], device=device)
            logits = head(hidden)
            total = total + F.cross_entropy(logits.flatten(0, 1), truth.flatten())
            right &= logits.argmax(-1) == truth
        accuracy = right[ids > 0].float().mean().item()
        return total

    Loop("text", reader, [optimizer], budget, run / "text.pt", log, decay_from=0.3).run(loss, resume)
    log.write("text", accuracy_per_word=accuracy)
    save_atomic(run / "text_final.pt", reader.encoder.state_dict())


def load_encoder(run: Path, sizes: Sizes) -> UMT5EncoderModel:
    """The trained encoder of a run, frozen, in evaluation mode."""
    encoder = build_encoder(sizes)
    encoder.load_state_dict(load_state(run / "text_final.pt", "run --stage text first"))
    return encoder.eval().requires_grad_(False)
