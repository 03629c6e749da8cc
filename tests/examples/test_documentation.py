"""The Python that README and quickstarts show runs, on pipelines of a few thousand random weights."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FluxPipeline, WanPipeline
from tiny import flux, randomise, smooth, wan

ROOT = Path(__file__).parents[2]
SMALLER = {"num_inference_steps=50": "num_inference_steps=10", "num_inference_steps=28": "num_inference_steps=10"} | {
    '"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50': (
        '"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 10'
    )
}


def small_flux(*args, **kwargs):
    pipe = smooth(flux())
    pipe.default_sample_size = 16
    embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(7))
    pipe.encode_prompt = lambda *args, **kwargs: (embeds, embeds[:, 0, :12], torch.zeros(5, 3))
    pipe.to = lambda device: pipe
    return pipe


def small_wan(*args, **kwargs):
    pipe = smooth(wan())
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe.register_modules(vae=randomise(vae))
    embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(7))
    pipe.encode_prompt = lambda *args, **kwargs: (embeds, -embeds)
    pipe.to = lambda device: pipe
    return pipe


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart-flux.md", "docs/quickstart-wan.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", small_flux)
    monkeypatch.setattr(WanPipeline, "from_pretrained", small_wan)
    names: dict = {}
    for block in blocks:
        for shown, run in SMALLER.items():
            block = block.replace(shown, run)
        exec(compile(block, page, "exec"), names)
    assert "x fewer FLOP" in capsys.readouterr().out
    if page.endswith("flux.md"):
        assert (tmp_path / "schedule.json").is_file()
