"""The adapter file: written whole, read without executing anything, refused by name where it does not fit."""

import json
import pickle

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter import fresh, run, trained

import ddit_rt
from ddit_rt import hub
from ddit_rt.granularity.adapter.file import FILE_NAME, model_card, push_to_hub


@pytest.fixture
def path(tmp_path):
    return ddit_rt.save_adapter(trained(tiny.flux()), tmp_path / "a.safetensors")


def rewrite(path, change_state=None, change_description=None):
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["ddit_adapter"])
    state = load_file(path)
    if change_state:
        change_state(state)
    if change_description:
        change_description(description)
    save_file(state, path, metadata={"ddit_adapter": json.dumps(description)})


def refused(path, match):
    with pytest.raises(ddit_rt.AdapterMismatchError, match=match) as caught:
        ddit_rt.load_adapter(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"shared": True, "memory": False, "multiples": (2,)}])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_saved_and_loaded_adapters_give_the_same_pictures(tmp_path, kind, options):
    pipe, inputs = (tiny.flux(), tiny.flux_inputs()) if kind == "flux" else (tiny.wan(), tiny.wan_inputs())
    adapter = trained(pipe, **options)
    schedule = [1, 1, 2, 2, 1, 2, 2, 2]
    settings = {"schedule": schedule, "multiples": (1, *adapter.spec.multiples)}
    expected = run(pipe, inputs, adapter=adapter, **settings)
    file = ddit_rt.save_adapter(adapter, tmp_path)
    assert file == tmp_path / FILE_NAME
    loaded = ddit_rt.load_adapter(file)
    assert loaded.spec == adapter.spec
    for source in (file, str(file), tmp_path, loaded):
        assert torch.equal(run(pipe, inputs, adapter=source, **settings), expected)
    assert not list(tmp_path.glob("*.tmp"))


def test_half_precision_file(tmp_path):
    pipe = tiny.flux()
    file = ddit_rt.save_adapter(trained(pipe), tmp_path, dtype=torch.float16)
    assert next(ddit_rt.load_adapter(file).parameters()).dtype == torch.float16
    ddit_rt.accelerate(pipe, adapter=file)  # fits by rounding's measure


def test_lora_has_pefts_names(path):
    assert "loras.2.transformer_blocks.0.ff.net.0.proj.lora_A.weight" in load_file(path)


def test_loading_executes_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code of the file was executed",))

    file = tmp_path / "evil.safetensors"
    file.write_bytes(pickle.dumps(Evil()))
    refused(file, "cannot be read as safetensors")


def test_cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cut short")


def test_no_adapter(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    refused(file, "no ddit_rt adapter")
    with pytest.raises(ddit_rt.AdapterMismatchError, match="no such file"):
        ddit_rt.load_adapter(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("source", [5, {"a": 1}, torch.nn.Linear(2, 2)], ids=["number", "mapping", "another module"])
def test_what_can_be_no_adapter_is_refused_by_its_value(source):
    with pytest.raises(ddit_rt.ConfigError, match=r"adapter=.*(5|'a'|Linear).*: a file, a directory, a hub id"):
        ddit_rt.accelerate(tiny.flux(), adapter=source)


def test_wrong_tensors(path):
    name = "sizes.2.embedding.embed"
    rewrite(path, lambda state: state.update({name: state[name][:, :-1].contiguous(), "more": torch.zeros(1)}))
    refused(path, r"more is unknown; sizes.2.embedding.embed is \(32, \d+\), expected \(32, \d+\)")
    rewrite(path, lambda state: state.pop(name))
    refused(path, "sizes.2.embedding.embed is missing")


def test_not_finite(path):
    rewrite(path, lambda state: state["sizes.4.embedding.deembed"].fill_(float("nan")))
    refused(path, "sizes.4.embedding.deembed holds values that are not finite")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 99}, "format 99"),
        ({"multiples": [3]}, "description cannot be used"),
        ({"rank": -1}, "description cannot be used"),
        ({"rank": "many"}, "description cannot be used"),
        ({"layers": 7}, "description cannot be used"),
    ],
)
def test_wrong_description(path, change, match):
    rewrite(path, change_description=lambda description: description.update(change))
    refused(path, match)


def test_other_models(path):
    for pipe, match in (
        (tiny.wan(), "for flux models, transformer is wan"),
        (other_width(), "width=32, transformer has width=64"),
        (other_blocks(), "blocks=2, transformer has blocks=1"),
        (other_weights(), "other weights"),
    ):
        with pytest.raises(ddit_rt.AdapterMismatchError, match=match):
            ddit_rt.accelerate(pipe, adapter=path)
        assert "_ddit_pipeline" not in pipe.__dict__


def other_width():
    pipe = tiny.flux()
    config = {**pipe.transformer.config, "num_attention_heads": 4}
    pipe.transformer = type(pipe.transformer).from_config(config)
    return pipe


def other_blocks():
    pipe = tiny.flux()
    del pipe.transformer.single_transformer_blocks[0]
    return pipe


def other_weights():
    pipe = tiny.flux()
    pipe.transformer = tiny.flux_transformer(seed=9)
    return pipe


def test_same_model_in_another_precision(path):
    for dtype in (torch.bfloat16, torch.float16):
        ddit_rt.accelerate(tiny.flux(dtype=dtype), adapter=path)


def test_hub(monkeypatch, tmp_path, path):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            uploaded["repo"] = repo_id

        def upload_folder(self, folder_path, **options):
            from pathlib import Path

            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return "address"

    def download(repo_id, name, revision=None):
        if repo_id != "someone/adapter":
            raise OSError("not found")
        file = tmp_path / f"hub-{name}"
        file.write_bytes(uploaded[name])
        return str(file)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    adapter = ddit_rt.load_adapter(path)
    assert push_to_hub(adapter, "someone/adapter") == "address"
    assert set(uploaded) == {"repo", FILE_NAME, "README.md"}
    assert b'adapter="someone/adapter"' in uploaded["README.md"]
    assert ddit_rt.load_adapter("someone/adapter").spec == adapter.spec
    with pytest.raises(ddit_rt.AdapterMismatchError, match="neither a local path"):
        ddit_rt.load_adapter("nobody/nothing")


def test_model_card_names_the_base_model():
    adapter = fresh(tiny.flux(), base_model="black-forest-labs/FLUX.1-dev")
    assert "base_model: black-forest-labs/FLUX.1-dev" in model_card(adapter, "a/b")
    assert "base_model" not in model_card(fresh(tiny.flux(), base_model="demo"), "a/b")
