"""A seconds-long training of a tiny model: every stage, resume, export."""

import hashlib
import json

import pytest
import torch

from ddit_rt.demo import CALL_DEFAULTS, DEMO_PROMPTS, MODEL_DIR, load_pipeline
from ddit_rt.evaluate.adherence import WEIGHTS
from examples.demo_model.dit import image_ids, pack, sample_sigmas, train_dit
from examples.demo_model.sizes import Sizes
from examples.demo_model.text import build_tokenizer, tokenize
from examples.demo_model.train import main
from examples.training.loop import Budget, RunLog, load_state

STAGES_AFTER = [word for stage in ("dit", "decoder", "reader", "export") for word in ("--stage", stage)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    stages = ["--stage", "vae", "--stage", "text", "--stage", "latents"]
    main(["--out", str(path), "--tiny", "--steps", "2", "--threads", "1", *stages])
    return path


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


def shipped():
    """Checksums of the model and the reader that ship with the package."""
    files = [
        *sorted(path for path in MODEL_DIR.rglob("*") if path.is_file()),
        *sorted(WEIGHTS.parent.glob("*.json")),
        WEIGHTS,
    ]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_writes_below_its_folder_alone(run):
    before = shipped()
    main(["--out", str(run), "--tiny", "--steps", "1", "--threads", "1", *STAGES_AFTER])
    assert (run / "model" / "model_index.json").is_file() and (run / "reader.safetensors").is_file()
    assert (run / "accuracy.json").is_file() and shipped() == before


def test_the_average_follows_the_weights(run):
    state = load_state(run / "dit.pt", "")
    assert state["averaged"].keys() == state["module"].keys()
    assert any(not torch.equal(state["averaged"][name], tensor) for name, tensor in state["module"].items())


def test_export_is_a_pipeline_that_generates(run, tmp_path):
    arguments = ["--out", str(run), "--tiny", "--steps", "2", "--threads", "1", "--export-to", str(tmp_path / "model")]
    main([*arguments, "--stage", "dit", "--stage", "decoder", "--stage", "export"])
    pipe = load_pipeline(path=tmp_path / "model")
    latents = pipe(
        "a red apple", height=32, width=32, max_sequence_length=24, num_inference_steps=2, output_type="latent"
    ).images
    assert latents.shape == (1, 16, 16)
    assert torch.isfinite(latents).all()
    assert [json.loads(line)["stage"] for line in (run / "training_log.jsonl").read_text().splitlines()]


def test_a_run_can_begin_from_an_exported_pipeline(run, tmp_path):
    common = ["--tiny", "--steps", "1", "--threads", "1"]
    main([*common, "--out", str(run), "--stage", "dit", "--stage", "export", "--export-to", str(tmp_path / "model")])
    exported = load_pipeline(path=tmp_path / "model").transformer.state_dict()
    start = [*common, "--out", str(tmp_path / "run"), "--start-from", str(tmp_path / "model")]
    main([*start, "--stage", "latents", "--stage", "dit"])
    trained = load_state(tmp_path / "run" / "dit.pt", "")["module"]
    for name, tensor in exported.items():
        # One step at a warm-up's first rate.
        assert (trained[f"transformer.{name}"] - tensor).abs().max() < 1e-3, name
    with pytest.raises(FileExistsError, match="empty run folder"):
        main([*start, "--stage", "dit"])


def test_the_shipped_model_fits_its_call_defaults():
    pipe = load_pipeline()
    arguments = {**CALL_DEFAULTS, "num_inference_steps": 2, "output_type": "latent"}
    latents = pipe(DEMO_PROMPTS["plain"], **arguments).images
    assert latents.shape == (1, 256, 16)
    assert torch.isfinite(latents).all()
    assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(" ".join(DEMO_PROMPTS.values())).input_ids


def test_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage latents"):
        main(["--out", str(tmp_path), "--tiny", "--steps", "1", "--stage", "dit"])


def test_a_budget_is_minutes_or_steps():
    with pytest.raises(ValueError, match="minutes or steps"):
        Budget()


def test_tokenizer_lowers_pads_and_marks_unknown_words():
    ids = tokenize(build_tokenizer(Sizes()), ["A Zebra behind a spaceship"], Sizes())[0].tolist()
    tokenizer = build_tokenizer(Sizes())
    assert len(ids) == 24
    assert ids[4] == tokenizer.unk_token_id and ids[5] == tokenizer.eos_token_id and ids[6] == tokenizer.pad_token_id


def test_packing_and_ids_follow_flux():
    z = torch.arange(4 * 4 * 4.0).view(1, 4, 4, 4)
    tokens = pack(z)
    assert tokens.shape == (1, 4, 16)
    assert tokens[0, 1, :4].tolist() == z[0, 0, :2, 2:].flatten().tolist()
    assert image_ids(2, 2, torch.device("cpu")).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_sigmas_are_noise_levels():
    sigmas = sample_sigmas(4096, torch.Generator().manual_seed(0))
    assert sigmas.min() >= 0 and sigmas.max() <= 1
    assert 0.4 < sigmas.mean() < 0.65
