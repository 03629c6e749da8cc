"""A seconds-long training of a tiny video model: every stage, resume, export."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from examples.demo_video.clips import ClipStore
from examples.demo_video.dit import sample_sigmas, train_dit
from examples.demo_video.export import PROMPTS, call_defaults, load_pipeline
from examples.demo_video.sizes import Bucket, Sizes
from examples.demo_video.text import build_tokenizer, embed, load_encoder, tokenize
from examples.demo_video.train import main
from examples.demo_video.vae import encode, load_vae
from examples.training.loop import Budget, RunLog, load_state

COMMON = ["--tiny", "--steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    main([*COMMON, "--out", str(path), "--stage", "vae", "--stage", "text", "--stage", "clips"])
    return path


@pytest.fixture(scope="module")
def model(run):
    main([*COMMON, "--out", str(run), *(word for stage in ("dit", "decoder", "export") for word in ("--stage", stage))])
    return run / "model"


def test_a_resumed_run_equals_an_uninterrupted_one(run):
    log, sizes, budget = RunLog(run / "training_log.jsonl"), Sizes.tiny(), Budget(steps=6)
    train_dit(run, sizes, budget, log, 0, "cpu", resume=False)
    whole = load_state(run / "dit.pt", "")
    train_dit(run, sizes, budget, log, 0, "cpu", resume=False, stop_after=3)
    assert load_state(run / "dit.pt", "")["step"] == 3
    train_dit(run, sizes, budget, log, 0, "cpu", resume=True)
    resumed = load_state(run / "dit.pt", "")
    assert whole["step"] == resumed["step"] == 6
    for part in ("module", "averaged"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name


_TOGETHER = """
import sys
import torch.distributed as dist
from examples.demo_video import train
from examples.training import denoiser
kept = denoiser.train
def checked(trained, loss, *rest):
    seen = []
    kept(trained, lambda step, progress: seen.append(value := loss(step, progress)) or value, *rest)
    ends = [None, None]
    dist.all_gather_object(ends, (float(seen[0]), float(sum(p.double().sum() for p in trained.parameters()))))
    assert ends[0][0] != ends[1][0], "both saw the same batch"
    assert ends[0][1] == ends[1][1], "they went apart"
denoiser.train = checked
train.main(sys.argv[1:])
"""


def test_two_processes_train_one_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("dit.pt", "training_log.jsonl"))
    script = tmp_path / "together.py"
    script.write_text(_TOGETHER)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    launch += [*COMMON, "--out", str(tmp_path / "run"), "--stage", "dit"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_state(tmp_path / "run" / "dit.pt", "")["step"] == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert sum("seed" in line for line in log) == 1  # one of them writes it
    main(["--tiny", "--steps", "3", "--threads", "1", "--out", str(tmp_path / "run"), "--stage", "dit", "--resume"])
    assert load_state(tmp_path / "run" / "dit.pt", "")["step"] == 3


def test_several_processes_train_the_transformer_alone(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="give them --stage dit alone"):
        main([*COMMON, "--out", str(run), "--stage", "dit", "--stage", "export"])


def test_the_first_latents_are_those_of_a_shorter_clip(run):
    vae = load_vae(run, Sizes.tiny())
    frames = np.random.default_rng(0).integers(0, 255, (1, 5, 16, 16, 3), dtype=np.uint8)
    torch.testing.assert_close(encode(vae, frames)[:, :, :1], encode(vae, frames[:, :1]))


def test_batches_have_the_bucket_s_shape(run):
    store = ClipStore.load(run, Sizes.tiny())
    clean, ids, maps = store.batch(Bucket(32, 1, 3), torch.Generator().manual_seed(0))
    assert clean.shape == (3, 4, 1, 8, 8) and ids.shape == (3, 32) and maps.shape == (3, 3, 1, 8, 8)
    # the smaller resolution has the shards without the largest too
    assert len(store.latents[16]) > len(store.latents[32])


def test_export_is_a_pipeline_that_generates(model):
    pipe = load_pipeline(model)
    assert isinstance(pipe, WanPipeline)
    frames = pipe(PROMPTS["plain"], **{**call_defaults(Sizes.tiny()), "num_inference_steps": 2, "output_type": "np"})
    assert frames.frames.shape == (1, 5, 32, 32, 3) and np.isfinite(frames.frames).all()
    demo = json.loads((model / "demo.json").read_text())
    assert demo["prompts"] == PROMPTS and demo["call"]["num_frames"] == 5


def test_the_training_text_is_the_pipeline_s(run, model):
    pipe = load_pipeline(model)
    ids = tokenize(build_tokenizer(Sizes.tiny()), [PROMPTS["detailed"]], Sizes.tiny())
    ours = embed(load_encoder(run, Sizes.tiny()), ids)
    theirs, _ = pipe.encode_prompt(PROMPTS["detailed"], do_classifier_free_guidance=False, max_sequence_length=32)
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)  # the export is float16


def test_a_run_can_begin_from_an_exported_pipeline(model, tmp_path):
    exported = load_pipeline(model).transformer.state_dict()
    start = [*COMMON, "--out", str(tmp_path / "run"), "--start-from", str(model)]
    main([*start, "--steps", "1", "--stage", "clips", "--stage", "dit"])
    trained = load_state(tmp_path / "run" / "dit.pt", "")["module"]
    for name, tensor in exported.items():
        # one step at a warm-up's first rate
        assert (trained[f"transformer.{name}"] - tensor).abs().max() < 1e-3, name
    with pytest.raises(FileExistsError, match="empty run folder"):
        main([*start, "--stage", "dit"])


def test_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage clips"):
        main([*COMMON, "--out", str(tmp_path), "--stage", "dit"])


def test_check_writes_a_sheet_of_frames(model):
    main([*COMMON, "--out", str(model.parent), "--stage", "check"])
    assert (model.parent / "check.png").stat().st_size > 0
    last = json.loads((model.parent / "training_log.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "check" and last["mean_psnr_db"] > 0


def test_tokenizer_lowers_pads_and_marks_unknown_words():
    tokenizer = build_tokenizer(Sizes())
    ids = tokenize(tokenizer, ["A Ball bounces behind a spaceship"], Sizes())[0].tolist()
    assert len(ids) == 24
    assert ids[5] == tokenizer.unk_token_id and ids[6] == tokenizer.eos_token_id and ids[7] == tokenizer.pad_token_id


def test_sigmas_are_noise_levels():
    sigmas = sample_sigmas(4096, torch.Generator().manual_seed(0))
    assert sigmas.min() >= 0 and sigmas.max() <= 1
    assert 0.5 < sigmas.mean() < 0.75
