"""Trains the reader on freshly painted scenes and writes its weights and what it is worth."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ddit_rt.evaluate.adherence import ReaderNet
from examples.training.loop import Budget, Loop, RunLog, step_generator

from ..scenes import sample_scene
from ..sizes import Sizes
from .assessment import held_out
from .labels import IGNORED, Labelled, label, roughen


def _loss(logits: dict[str, Tensor], truth: Labelled) -> Tensor:
    def entropy(values: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(values, classes, ignore_index=IGNORED)

    shape, colour, texture = truth.places.unbind(1)
    fence, kind, background = truth.wholes.unbind(1)
    places = entropy(logits["shape"], shape) + 0.5 * entropy(logits["colour"], colour)
    places = places + 0.5 * entropy(logits["texture"], texture)
    wholes = F.binary_cross_entropy_with_logits(logits["fence"][:, 0], fence.float())
    wholes = wholes + entropy(logits["kind"], kind) + entropy(logits["background"], background)
    return places + 0.3 * wholes


def train_reader(
    run: Path, sizes: Sizes, budget: Budget, log: RunLog, seed: int, device: str, resume: bool, weights: Path
) -> None:
    """Train and write `weights` in float16, and beside them what share of held-out statements is read rightly."""
    torch.manual_seed(seed)
    net = ReaderNet(sizes.reader_channels).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)

    @cache  # painting costs as much as learning, and a scene roughened anew teaches about as much as a new one
    def painted(index: int) -> Labelled:
        return label([sample_scene(Random(f"{seed} reader {index}"))])

    def loss(step: int, _progress: float) -> Tensor:
        generator = step_generator(seed, step)
        chosen = torch.randint(sizes.reader_scenes, (sizes.reader_batch,), generator=generator).tolist()
        truth = Labelled.joined([painted(index) for index in chosen])
        pictures = roughen(truth.pictures.float() / 255, generator).to(device)
        moved = Labelled(pictures, truth.places.to(device), truth.wholes.to(device))
        with torch.autocast(device, torch.bfloat16):
            logits = net(pictures.contiguous(memory_format=torch.channels_last))
        return _loss({name: values.float() for name, values in logits.items()}, moved)

    Loop("reader", net, [optimizer], budget, run / "reader.pt", log, decay_from=0.4).run(loss, resume)
    net.cpu().eval().half()
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, weights)
    weights.chmod(0o644)  # written readable by the owner alone, which an installed package must not be
    net.float()  # as it is loaded: with the rounded values
    clean, rough = (held_out(net, sizes.reader_held_out, seed, rough) for rough in (False, True))
    log.write("reader", clean=clean, rough=rough)
    content = {"scenes": sizes.reader_held_out, "clean": clean, "rough": rough}
    weights.with_name("accuracy.json").write_text(json.dumps(content, indent=1) + "\n")
