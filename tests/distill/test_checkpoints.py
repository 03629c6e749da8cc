"""A run can be interrupted anywhere, and goes on as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distill_models import SMALL, equal, pipeline, trainer
from safetensors.torch import load_file, save_file

import ddit_rt
from ddit_rt.distill.config import differences
from ddit_rt.distill.tracking import last_entry


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Shared by the tests of this file."""
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take most of the time of so short a run, and change nothing of it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ddit_rt.distill.trainer.pictures", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, recordings):
    """The average after SMALL's eight steps."""
    return trainer(tmp_path_factory.mktemp("whole"), recordings).train().state_dict()


def read(run):
    """The newest checkpoint of a run, every file of it: step, adapter, average, optimizer."""
    folder = max((run / "checkpoints").glob("step-*"))
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)
    torch.load(folder / "scheduler.bin", weights_only=True)
    step = json.loads((folder / "run.json").read_text())["step"]
    return step, load_file(folder / "model.safetensors"), load_file(folder / "model_1.safetensors"), optimizer


@pytest.mark.parametrize(
    ("optimizer", "shared", "ema"), [("adamw", False, 0.9), ("prodigy", False, 0.9), ("adamw", True, 0.0)]
)
def test_resumed_is_uninterrupted(tmp_path, recordings, optimizer, shared, ema):
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    config = replace(SMALL, optimizer=optimizer, shared=shared, ema=ema, lr=None, objective="both")
    whole = trainer(tmp_path / "whole", recordings, config).train()
    trainer(tmp_path / "parts", recordings, config).train(stop_after=3)
    trainer(tmp_path / "parts", recordings, replace(config, checkpoint_every=1)).train(resume=True, stop_after=5)
    parts = trainer(tmp_path / "parts", recordings, config).train(resume=True)
    assert equal(whole.state_dict(), parts.state_dict())
    states = [read(tmp_path / name) for name in ("whole", "parts")]
    assert states[0][0] == states[1][0] == SMALL.steps
    assert equal(states[0][1], states[1][1]) and equal(states[0][2], states[1][2])
    names = [path.name for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())]
    assert names == ["step-000000006", "step-000000008"]


def test_one_trainer_goes_on_too(tmp_path, recordings, uninterrupted):
    run = trainer(tmp_path, recordings)
    run.train(stop_after=4)
    with pytest.raises(ddit_rt.ConfigError, match="pass --resume"):
        run.train()
    assert equal(run.train(resume=True).state_dict(), uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 8]  # the loss of either part, and the validation


@pytest.mark.parametrize("moment", ["written", "renamed"])
def test_interrupted_while_it_saves(tmp_path, recordings, uninterrupted, monkeypatch, moment):
    run = trainer(tmp_path, recordings)
    save_state, rename = run.accelerator.save_state, Path.rename

    def half(folder):
        save_state(folder)
        if len(run.checkpoints.folders()) == 1:
            (Path(folder) / "optimizer.bin").write_bytes(b"half an optim")
            raise KeyboardInterrupt

    def not_renamed(path, target):
        if run.checkpoints.folders() and path.name == "unfinished":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if moment == "written":
            patched.setattr(run.accelerator, "save_state", half)
        else:
            patched.setattr(Path, "rename", not_renamed)
        run.train()
    assert (tmp_path / "checkpoints" / "unfinished").exists() and read(tmp_path)[0] == 3
    again = trainer(tmp_path, recordings)
    assert equal(again.train(resume=True).state_dict(), uninterrupted)
    assert not (tmp_path / "checkpoints" / "unfinished").exists()


def test_interrupted_before_the_first_checkpoint(tmp_path, recordings, uninterrupted, monkeypatch):
    run = trainer(tmp_path, recordings)
    batch = run.batch

    def interrupted(step, micro):
        if (step, micro) == (1, 1):
            raise KeyboardInterrupt
        return batch(step, micro)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "batch", interrupted)
        run.train()
    with pytest.raises(ddit_rt.ConfigError, match=r"step=1: .* Make a new Trainer"):
        run.train(resume=True)
    assert equal(trainer(tmp_path, recordings).train(resume=True).state_dict(), uninterrupted)


@pytest.mark.parametrize("moment", ["save_adapter", "evaluate", "pictures"])
def test_interrupted_after_the_last_checkpoint(tmp_path, recordings, uninterrupted, monkeypatch, moment):
    def interrupted(*_):
        raise KeyboardInterrupt

    trainer(tmp_path, recordings).train(stop_after=6)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        run = trainer(tmp_path, recordings)
        run._make_up = lambda: None  # of step 6
        patched.setattr(f"ddit_rt.distill.trainer.{moment}", interrupted)
        run.train(resume=True)
    assert read(tmp_path)[0] == SMALL.steps
    for _ in range(2):  # the second time nothing is left to do
        assert equal(trainer(tmp_path, recordings).train(resume=True).state_dict(), uninterrupted)
        adapter = ddit_rt.load_adapter(tmp_path)
        assert adapter.spec.training["step"] == SMALL.steps
        assert equal(adapter.state_dict(), {name: tensor.half() for name, tensor in uninterrupted.items()})
        entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [(entry["step"], "held_out/2p" in entry) for entry in entries] == [(6, False), (8, False), (8, True)]


def test_a_validation_of_an_earlier_run_is_none_of_this_one(tmp_path, recordings):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 8, "held_out/2p": 1.0}\n{"step": 8, "loss": 1.0}\n{"step": 9, "held')
    assert "loss" in last_entry(log, 8) and last_entry(log, 9) == last_entry(tmp_path / "none.jsonl", 8) == {}


def other(what):
    """The pipeline of these tests with one thing changed, that the embedding does not show."""
    pipe = pipeline()
    if what == "scheduler":
        pipe.scheduler.set_shift(9.0)
    else:
        with torch.no_grad():
            for parameter in pipe.transformer.transformer_blocks.parameters():
                parameter.mul_(1.5)
    return pipe


@pytest.mark.parametrize("what", ["weights", "scheduler"])
def test_another_model_or_scheduler_is_refused(tmp_path, recordings, what):
    trainer(tmp_path / "run", recordings).train(stop_after=1)
    match = f"recordings of another model, scheduler, call or data .{what}: .*, .*: "
    for out in ("run", "new"):
        with pytest.raises(ddit_rt.ConfigError, match=f"{recordings} holds {match}choose another directory"):
            trainer(tmp_path / out, recordings, pipe=other(what))
    # with recordings of its own
    run = trainer(tmp_path / "run", tmp_path / "recordings", pipe=other(what))
    with pytest.raises(ddit_rt.ConfigError, match=f"step-000000001 was trained on {match}repeat them"):
        run.train(resume=True)


def test_runs_and_recordings_of_earlier_versions_go_on(tmp_path, recordings, uninterrupted):
    old = tmp_path / "recordings"
    shutil.copytree(recordings, old)
    trainer(tmp_path / "run", old).train(stop_after=3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000003" / "run.json"
    for path, names in ((old / "manifest.json", ("weights", "scheduler")), (checkpoint, ("recordings",))):
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in kept.items() if name not in names}))
    assert equal(trainer(tmp_path / "run", old).train(resume=True).state_dict(), uninterrupted)
    another = pipeline()
    with torch.no_grad():
        another.transformer.x_embedder.weight.mul_(2)
    with pytest.raises(ddit_rt.ConfigError, match=r"another model, scheduler, call or data \(model: "):
        trainer(tmp_path / "run", old, pipe=another)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"calls": [')
    with pytest.raises(ddit_rt.ConfigError, match=r"manifest\.json cannot be read .*: choose another directory"):
        trainer(tmp_path / "run", tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model_1.safetensors", "optimizer.bin", "scheduler.bin", "run.json"]
)
def test_damaged_checkpoint(tmp_path, recordings, uninterrupted, name):
    trainer(tmp_path, recordings).train(stop_after=7)
    newest = tmp_path / "checkpoints" / "step-000000007"
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ddit_rt.ConfigError, match=r"step-000000007 cannot be read .*: delete it to go on from step-0{8}6"
    ):
        trainer(tmp_path, recordings).train(resume=True)
    shutil.rmtree(newest)
    assert equal(trainer(tmp_path, recordings).train(resume=True).state_dict(), uninterrupted)


def test_the_only_checkpoint_is_damaged(tmp_path, recordings):
    trainer(tmp_path, recordings).train(stop_after=1)
    (tmp_path / "checkpoints" / "step-000000001" / "optimizer.bin").unlink()
    with pytest.raises(ddit_rt.ConfigError, match=r"step-000000001 cannot be read .*: delete it to start anew"):
        trainer(tmp_path, recordings).train(resume=True)


def environment():
    """Of a process that imports what these tests do."""
    here = Path(__file__).parent
    tests, own = here.parent, os.environ.get("PYTHONPATH")
    paths = [str(here), str(tests / "helpers"), str(tests.parent), *([own] if own else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


_KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from distill_models import SMALL, trainer
config = replace(SMALL, steps=100000, batch=1, accumulate=1, checkpoint_every=1)
trainer(Path(sys.argv[1]), Path(sys.argv[2]), config).train(resume=True)
"""


def test_kill_9_leaves_a_whole_checkpoint(tmp_path, recordings):
    arguments = [sys.executable, "-c", _KILLED, str(tmp_path), str(recordings)]
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not (tmp_path / "adapter.safetensors").exists():
        assert process.poll() is None and time.monotonic() - began < 300
        time.sleep(0.02)
    seen = set()
    while len(seen) < 10:  # whatever moment one looks at: whole
        assert process.poll() is None and time.monotonic() - began < 300
        try:
            seen.add(read(tmp_path)[0])
        except OSError:
            # while this reads, two newer ones may replace the one it reads
            assert max((tmp_path / "checkpoints").glob("step-*")).name > f"step-{max(seen, default=0):09d}"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = read(tmp_path)[0]
    assert step >= max(seen)
    ddit_rt.load_adapter(tmp_path)
    config = replace(SMALL, steps=100_000, batch=1, accumulate=1, checkpoint_every=1)
    again = trainer(tmp_path, recordings, config)
    again.train(resume=True, stop_after=step + 1)
    assert again.step == step + 1


_TWO_PROCESSES = """
import sys
from pathlib import Path
from distill_models import SMALL, trainer
run = trainer(Path(sys.argv[1]), Path(sys.argv[2]))
assert run.accelerator.num_processes == 2
run.train(stop_after=3)
"""


def test_goes_on_with_another_number_of_processes(tmp_path, recordings):
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*launch, str(tmp_path), str(recordings)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step, adapter, average, _ = read(tmp_path)
    assert step == 3 and not any(name.startswith("module.") for name in adapter)
    assert len(list((tmp_path / "checkpoints" / "step-000000003").glob("random_states_*.pkl"))) == 2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1  # one process writes it
    again = trainer(tmp_path, recordings)
    again.train(resume=True, stop_after=3)  # loads it, and takes no step
    assert equal({f"adapter.{name}": tensor for name, tensor in again.adapter.state_dict().items()}, adapter)
    assert int(average.pop("n_averaged")) == 3
    assert equal({f"module.{name}": tensor for name, tensor in again.average.state_dict().items()}, average)
    again.train(resume=True)
    assert again.step == SMALL.steps


def test_loss_that_is_not_finite_stops_the_run(tmp_path, recordings):
    config = replace(SMALL, steps=5, checkpoint_every=1)
    trainer(tmp_path, recordings, config).train(stop_after=1)
    path = tmp_path / "checkpoints" / "step-000000001" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ddit_rt.ConfigError, match=r"not finite at step 1"):
        trainer(tmp_path, recordings, config).train(resume=True)
    ddit_rt.load_adapter(tmp_path)


def test_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b: 2, 3"]
