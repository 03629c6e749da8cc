"""Runs that start coarse, judged: which features, which rival, which line."""

import few_steps
import pytest
import torch
from few_steps import few_steps_table
from PIL import Image

from ddit_rt.evaluate.judges import fid


def entry(name, cost, adherence, schedule=None, steps=4):
    settings = None if schedule is None else {"schedule": schedule}
    kind = "base" if name == "base@4" else "fewer steps" if schedule is None else "started coarse"
    return {
        "name": name, "kind": kind, "steps": steps, "reference": 4, "settings": settings, "cost": cost,
        "frechet": 1.0, "adherence": adherence,
    }  # fmt: skip


def test_a_coarse_run_stands_beside_the_most_adherent_full_run_of_its_cost():
    methods = [
        entry("base@4", 4.0, [1.0, 1.0, 1.0]),
        entry("3-steps@4", 3.0, [0.5, 0.5, 0.0], steps=3),
        entry("2-steps@4", 2.0, [0.5, 1.0, 0.5], steps=2),
        entry("coarse@4", 2.8, [1.0, 1.0, 0.0], [2, 1, 1, 1]),
        entry("cheap@4", 0.5, [0.0, 0.0, 0.0], [4, 4, 4, 4]),
    ]
    table = few_steps_table({"pictures": 3, "floor": 0.1, "drawn": 8, "call": {}, "methods": methods})
    lines = {line.split(" | ")[1]: line for line in table.splitlines() if line.startswith("| 4")}
    # the plain run costs too much; of the two others the one with two steps sees more
    assert "+0.000 (fewer steps: 2)" in lines["started coarse: 1 2p, 3 p"]
    assert lines["started coarse: 4 4p"].endswith("|  |  |")
    assert next(iter(lines)) == "plain"


def test_the_distance_is_nothing_to_itself_and_grows_with_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "DRAWN", 48)
    paths = few_steps.draw(tmp_path, few_steps.SEED)
    distance = fid(few_steps.Features())
    assert distance(paths, paths, [])[0] == pytest.approx(0, abs=1e-3)
    noisy = []
    for path in paths:
        picture = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).reshape(128, 128, 3)
        broken = torch.randint(0, 256, picture.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        mixed = (picture // 2 + broken // 2).numpy()
        noisy.append(tmp_path / f"noisy-{path.name}")
        Image.fromarray(mixed).save(noisy[-1])
    assert distance(noisy, paths, [])[0] > 1
