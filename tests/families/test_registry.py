from types import SimpleNamespace

import pytest
import torch
from calls import caught
from diffusers import FluxPipeline
from tiny import flux, flux_transformer, wan, wan_image, wan_transformer

from ddit_rt import UnsupportedPipelineError
from ddit_rt.families import NotCoarseError, family_of
from ddit_rt.granularity import swapped


@pytest.mark.parametrize(
    "make, name",
    [
        (flux, "flux"),
        (lambda: flux("image"), "flux"),
        (lambda: flux("inpaint"), "flux"),
        (wan, "wan"),
        (wan_image, "wan"),
        (lambda: wan(two=True), "wan"),
    ],
)
def test_every_supported_pipeline_has_a_family(make, name):
    assert family_of(make()).name == name


class StableDiffusionPipeline:
    pass


@pytest.mark.parametrize("pipe", [StableDiffusionPipeline(), object(), None, 3, SimpleNamespace(transformer=1)])
def test_any_other_object_is_refused_with_the_list_of_those_supported(pipe):
    with pytest.raises(UnsupportedPipelineError, match=f"{type(pipe).__name__}.*FluxPipeline.*WanPipeline"):
        family_of(pipe)


def test_a_pipeline_without_its_transformer_is_refused():
    pipe = flux()
    pipe.transformer = None
    with pytest.raises(UnsupportedPipelineError, match="no transformer loaded"):
        family_of(pipe)


def test_another_transformer_class_is_refused():
    pipe = wan()
    pipe.transformer = flux_transformer()
    with pytest.raises(UnsupportedPipelineError, match=r"FluxTransformer2DModel.*WanTransformer3DModel"):
        family_of(pipe)


def test_wan_with_patches_in_time_is_refused():
    pipe = wan()
    pipe.transformer.register_to_config(patch_size=(2, 2, 2))
    with pytest.raises(UnsupportedPipelineError, match=r"\(2, 2, 2\)"):
        family_of(pipe)


def test_subclasses_of_a_pipeline_are_supported():
    class Mine(FluxPipeline):
        pass

    plain = flux()
    assert family_of(Mine(**plain.components)).name == "flux"


def test_wan_with_the_second_transformer_alone():
    pipe = wan(two=True)
    pipe.transformer = None
    assert family_of(pipe).geometry(pipe, 64, 96, 5).tokens(1) == 2 * 4 * 6


@pytest.mark.parametrize("name", ["flux", "flux-odd", "wan", "wan-odd", "wan-image"])
def test_the_geometry_of_a_size_is_that_of_the_calls(name):
    pipe, module, arguments = caught(name)
    family = family_of(pipe)
    parsed = family.parse(module, arguments).geometry
    height, width = (8 * n for n in parsed.grid(1)) if family.name == "flux" else (8 * parsed.height, 8 * parsed.width)
    assert family.geometry(pipe, height, width, 5) == parsed
    assert family.geometry(pipe, height + 7, width + 7, 5) == parsed  # what does not fill a patch is cut off


def test_flux_calls_whose_tokens_lie_on_no_grid_run_fine():
    pipe, module, arguments = caught("flux")
    family = family_of(pipe)
    with pytest.raises(NotCoarseError, match="no plain grid"):
        family.parse(module, {**arguments, "img_ids": arguments["img_ids"].flip(0)})


def test_arguments_bind_by_position():
    family = family_of(wan())
    bound = family.bind((1, 2), {"return_dict": False})
    assert bound == {"hidden_states": 1, "timestep": 2, "return_dict": False}


def test_swapped_forwards_are_put_back_also_after_an_exception():
    module = wan_transformer()
    own = module.proj_out.forward
    with pytest.raises(ZeroDivisionError), swapped(module, proj_out=lambda x: 1 / 0):
        module.proj_out(torch.zeros(1))
    assert module.proj_out.forward == own and "forward" not in module.proj_out.__dict__
    module.proj_out.forward = patched = lambda x: x
    with swapped(module, proj_out=lambda x: x + 1):
        assert module.proj_out(torch.zeros(1)).item() == 1
    assert module.proj_out.forward is patched
