"""What the reader is worth: true and false statements about scenes that it never saw."""

from __future__ import annotations

from random import Random

import numpy as np

from ddit_rt.evaluate.adherence import BACKGROUNDS, COLOURS, FIELDS, SHAPES, TEXTURES, ReaderNet, Statement, read
from examples.training.loop import step_generator

from ..scenes import Scene, sample_scene
from .labels import colour_name, label, roughen

_BATCH = 32


def truths(scene: Scene) -> list[Statement]:
    """All that a caption could truly state of a scene."""
    said = []
    for noun in scene.nouns:
        said.append(Statement("shape", noun.shape))
        if noun.colour is not None:
            said += [Statement("colour", noun.colour, noun.shape), Statement("texture", noun.texture, noun.shape)]
    if scene.fence is not None:
        said.append(Statement("fence", "fence"))
    said.append(Statement("background kind", scene.background.kind))
    if scene.background.kind != "gradient":
        said.append(Statement("background colour", scene.background.colour_name))
    return said


def untruth(scene: Scene, field: str, rng: Random) -> Statement | None:
    """A statement of this field that the scene contradicts; None where it can contradict none."""
    things = scene.things
    if field == "shape":
        return Statement("shape", rng.choice([s for s in SHAPES if s not in {thing.shape for thing in things}]))
    if field in ("colour", "texture"):
        shapes = [noun.shape for noun in scene.nouns if noun.colour is not None]
        if not shapes:
            return None
        shape = rng.choice(shapes)
        own = {(colour_name(t.colour), t.texture)[field == "texture"] for t in things if t.shape == shape}
        return Statement(field, rng.choice([v for v in (COLOURS, TEXTURES)[field == "texture"] if v not in own]), shape)
    if field == "fence":
        return Statement("fence", "fence") if scene.fence is None else None
    if field == "background kind":
        return Statement(field, rng.choice([kind for kind in BACKGROUNDS if kind != scene.background.kind]))
    if scene.background.kind == "gradient":
        return None
    return Statement(field, rng.choice([name for name in COLOURS if name != scene.background.colour_name]))


def held_out(net: ReaderNet, count: int, seed: int, rough: bool) -> dict[str, dict[str, float]]:
    """Per field, the share of true statements found and of false ones refused, on scenes that training never saw."""
    rng = Random(f"{seed} reader held out")
    generator = step_generator(seed, -1)
    found: dict[str, list[bool]] = {field: [] for field in FIELDS}
    refused: dict[str, list[bool]] = {field: [] for field in FIELDS}
    for start in range(0, count, _BATCH):
        scenes = [sample_scene(rng) for _ in range(min(_BATCH, count - start))]
        pictures = label(scenes).pictures.float() / 255
        for scene, reading in zip(scenes, read(roughen(pictures, generator) if rough else pictures, net)):
            for statement in truths(scene):
                found[statement.field].append(reading.finds(statement))
            for field in FIELDS:
                if (false := untruth(scene, field, rng)) is not None:
                    refused[field].append(not reading.finds(false))
    return {
        field: {
            name: round(float(np.mean(list_)), 4)
            for name, list_ in (("found", found[field]), ("refused", refused[field]))
            if list_
        }
        for field in FIELDS
    }
