"""The description of a scene that the training's auxiliary loss reads."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from ddit_rt.evaluate.adherence import SHAPES
from examples.demo_model.latents import draw_shard
from examples.demo_model.maps import CLASSES, MapReader, draw_maps, scene_map
from examples.demo_model.scenes import render, sample_scene
from examples.demo_model.sizes import Sizes


def _one(shape, fence=False):
    rng = Random(0)
    while True:
        scene = sample_scene(rng)
        if len(scene.things) == 1 and scene.things[0].shape == shape and (scene.fence is not None) == fence:
            background = replace(scene.background, kind="plain", colour=(0, 0, 255))
            return replace(scene, background=background)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_covers_what_the_painter_paints(shape):
    scene = _one(shape)
    painted = (np.abs(render(scene, 32).astype(int) - np.array([0, 0, 255])).sum(-1) > 60).astype(int)
    covered = scene_map(scene, (32, 16))[0][0] != 0
    # Antialiased edges may fall on either side.
    assert (painted != covered).mean() < 0.06
    assert set(np.unique(scene_map(scene, (32,))[0][0])) == {0, 1 + list(SHAPES).index(shape)}


def test_coordinates_are_those_of_the_things_own_frame():
    scene = _one("square")
    thing = replace(scene.things[0], x=0.5, y=0.5, radius=0.4, angle=0.0)
    _, x, y = scene_map(replace(scene, things=(thing,)), (32,))[0]
    assert x[16, 8] < -20 < 20 < x[16, 23] and y[8, 16] < -20 < 20 < y[23, 16]
    turned = replace(thing, angle=np.pi / 2)
    _, x, y = scene_map(replace(scene, things=(turned,)), (32,))[0]
    assert y[16, 8] > 20 and x[8, 16] < -20


def test_a_fence_covers_the_things_behind_it():
    classes = scene_map(_one("zebra", fence=True), (32,))[0][0]
    assert (classes == CLASSES - 1).mean() > 0.15


def test_maps_belong_to_the_scenes_of_their_shard():
    sizes = replace(Sizes.tiny(), shard_scenes=24)
    pictures = draw_shard(7, 1, sizes)[0][0].astype(float)
    maps = draw_maps(7, 1, sizes)[0].numpy()
    assert pictures.shape == (24, 32, 32, 3) and maps.shape == (24, 3, 8, 8)

    def separation(maps):
        inside = (maps[:, :1].repeat(4, 2).repeat(4, 3) > 0).transpose(0, 2, 3, 1)
        of = [abs(picture[i[..., 0]].mean(0) - picture[~i[..., 0]].mean(0)) for picture, i in zip(pictures, inside)]
        return np.sum(of)

    assert separation(maps) > 1.5 * separation(np.roll(maps, 1, axis=0))


def test_a_perfect_reader_has_no_loss_and_a_blind_one_does():
    torch.manual_seed(0)
    maps = torch.stack([torch.from_numpy(m) for m in [scene_map(_one("ball"), (8,))[0]] * 2])
    reader, hidden = MapReader(16), torch.randn(2, 16, 16)
    before = reader.loss(hidden, maps)
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = reader.loss(hidden, maps)
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * before
