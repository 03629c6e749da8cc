"""The demo's text side: one word-level tokenizer and two small encoders, pre-trained to read scenes out of captions.

FLUX gives text tokens no position, so which colour belongs to which object must be in the T5 encoder's output: it is
trained to tell, at every word of a noun phrase, all that the phrase says of its object. The CLIP encoder's pooled
output is trained to tell what the whole caption names.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ddit_rt.evaluate.adherence import BACKGROUNDS, COLOURS, SHAPES, TEXTURES
from examples.training.loop import Budget, Loop, RunLog, load_state, save_atomic
from examples.training.words import SPECIAL, padded_ids, word_tokenizer

from .scenes import VOCABULARY, Noun, Scene, Span, caption_spans, sample_scene
from .sizes import Sizes

_SHAPES, _COLOURS = list(SHAPES), list(COLOURS)
# Classes of one word's labels; 0 means "not said".
_FIELDS = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "texture": len(TEXTURES) + 1,
    "many": 3,
    "kind": len(BACKGROUNDS) + 1,
    "about": 4,
}
_POOLED = len(SHAPES) * (len(COLOURS) + 1) + len(SHAPES) * len(TEXTURES) + len(SHAPES) + len(BACKGROUNDS)
_POOLED_LABELS = _POOLED + len(COLOURS) + 1


def build_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """A tokenizer over `scenes.VOCABULARY`."""
    return word_tokenizer(VOCABULARY, sizes.text_tokens)


def build_encoders(sizes: Sizes) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Untrained encoders: pooled (B, width) and per-word (B, tokens, width) outputs."""
    vocabulary = len(SPECIAL) + len(VOCABULARY)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=sizes.text_width, intermediate_size=2 * sizes.text_width,
            num_hidden_layers=sizes.text_layers, num_attention_heads=sizes.text_width // 16 or 1,
            max_position_embeddings=sizes.text_tokens, projection_dim=sizes.text_width, pad_token_id=0, bos_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=sizes.text_width, d_kv=16, d_ff=2 * sizes.text_width,
            num_layers=sizes.text_layers, num_heads=sizes.text_width // 16 or 1, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1, relative_attention_num_buckets=16, relative_attention_max_distance=24,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    return clip, t5


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], sizes: Sizes) -> torch.Tensor:
    """Token ids, int64 (B, text_tokens), padded as `FluxPipeline` pads."""
    return padded_ids(tokenizer, captions, sizes.text_tokens)


class _Readers(nn.Module):
    """Both encoders and the linear heads that read the caption's content out of them."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.clip, self.t5 = build_encoders(sizes)
        self.heads = nn.ModuleDict({name: nn.Linear(sizes.text_width, count) for name, count in _FIELDS.items()})
        self.pooled = nn.Linear(sizes.text_width, _POOLED_LABELS)


def _said(words: tuple[str, ...], noun: Noun) -> dict[str, int]:
    """What a noun phrase says of its noun (a plain texture and an omitted colour are said by silence)."""
    return {
        "shape": 1 + _SHAPES.index(noun.shape),
        "colour": 1 + _COLOURS.index(noun.colour) if noun.colour in words else 0,
        "texture": 1 + TEXTURES.index(noun.texture),
        "many": 1 + noun.many,
        "about": 1,
    }


def _labels(spans: list[Span], scene: Scene, tokens: int) -> tuple[dict[str, list[int]], list[float]]:
    per_word: dict[str, list[int]] = {name: [0] * tokens for name in _FIELDS}
    pooled = [0.0] * _POOLED_LABELS
    shapes, colours, textures = len(SHAPES), len(COLOURS), len(TEXTURES)
    at = 0
    for span in spans:
        said: dict[str, int] = {}
        if isinstance(span.about, int):
            said = _said(span.words, scene.nouns[span.about])
            shape = said["shape"] - 1
            pooled[shape * (colours + 1) + said["colour"]] = 1
            pooled[shapes * (colours + 1) + shape * textures + said["texture"] - 1] = 1
            pooled[shapes * (colours + 1 + textures) + shape] = said["many"] - 1
        elif span.about == "fence":
            said = {"about": 2}
            pooled[-1] = 1
        elif span.about == "background":
            background = scene.background
            said = {"about": 3, "kind": 1 + BACKGROUNDS.index(background.kind)}
            pooled[_POOLED - len(BACKGROUNDS) + said["kind"] - 1] = 1
            if background.colour_name in span.words:
                said["colour"] = 1 + _COLOURS.index(background.colour_name)
                pooled[_POOLED + said["colour"] - 1] = 1
        for offset in range(len(span.words)):
            for name, value in said.items():
                per_word[name][at + offset] = value
        at += len(span.words)
    return per_word, pooled


def train_text(run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool) -> None:
    """Pre-train both encoders and write `text_final.pt`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(sizes)
    readers = _Readers(sizes).to(device)
    optimizer = torch.optim.AdamW(readers.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    accuracy = 0.0

    def loss(step: int, _progress: float) -> torch.Tensor:
        nonlocal accuracy
        rng = Random(f"{seed} text {step}")
        captions, words, wholes = [], [], []
        for _ in range(sizes.text_batch):
            scene = sample_scene(rng)
            spans = caption_spans(scene, rng)
            captions.append(" ".join(word for span in spans for word in span.words))
            word_labels, pooled = _labels(spans, scene, sizes.text_tokens)
            words.append(word_labels)
            wholes.append(pooled)
        ids = tokenize(tokenizer, captions, sizes).to(device)
        hidden = readers.t5(ids)[0]
        # Weighted up: a class is mostly absent, and absence is learned at once.
        total = 20 * F.binary_cross_entropy_with_logits(
            readers.pooled(readers.clip(ids).pooler_output), torch.tensor(wholes, device=device)
        )
        right = torch.ones_like(ids, dtype=torch.bool)
        for name, head in readers.heads.items():
            truth = torch.tensor([labels[name] for labels in words], device=device)
            logits = head(hidden)
            total = total + F.cross_entropy(logits.flatten(0, 1), truth.flatten())
            right &= logits.argmax(-1) == truth
        accuracy = right.float().mean().item()
        return total

    loop = Loop("text", readers, [optimizer], budget, run / "text.pt", log, decay_from=0.3)
    loop.run(loss, resume)
    log.write("text", accuracy_per_word=accuracy)
    state: dict[str, Any] = {"clip": readers.clip.state_dict(), "t5": readers.t5.state_dict()}
    save_atomic(run / "text_final.pt", state)


def load_encoders(run: Path, sizes: Sizes) -> tuple[CLIPTextModel, T5EncoderModel]:
    """The trained encoders of a run, frozen, in evaluation mode."""
    state = load_state(run / "text_final.pt", "run --stage text first")
    clip, t5 = build_encoders(sizes)
    clip.load_state_dict(state["clip"])
    t5.load_state_dict(state["t5"])
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)
