"""The transformers' own ends as kernels take them, computed in PyTorch: the model's own output, and band-split's."""

import pytest
import torch
from specimens import SPECIMENS

from ddit_rt.families.testing.specimen import first_call
from ddit_rt.granularity import Models, NotFusedError, PathOptions, PlainEnds, PredictionHistory, make_path
from ddit_rt.pipeline.fusing import Fusing

# family -> what it says where its ends stay in PyTorch
IN_PYTORCH = {"z-image": "in PyTorch", "ltx2": "in PyTorch", "wan": "without noise"}


def ends_of(name):
    """The first call, and the ends of its transformer; skips where the family says why there are none."""
    found = first_call(SPECIMENS[name])
    try:
        return found, found.family.own_ends(found.module, found.call)
    except NotFusedError as error:
        family = found.family.name
        assert family in IN_PYTORCH and IN_PYTORCH[family] in str(error), f"{family}: {error}"
        pytest.skip(str(error))


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found.float() - wanted.float()).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", SPECIMENS)
@torch.no_grad()
def test_a_full_run_between_them_is_the_models_own(name):
    found, own = ends_of(name)
    family, module, call = found.family, found.module, found.call
    assert own.embed.data_ptr() == module.get_submodule(family.projection_names[0]).weight.data_ptr()
    assert own.deembed.data_ptr() == module.get_submodule(family.projection_names[1]).weight.data_ptr()
    ends = PlainEnds(own, call.geometry, "torch")
    prediction = family.run_patches(module, module.forward, call, call.latent, None, ends, 1, True)
    assert_close(prediction, family.output(module, call, module(**call.fresh_arguments())))


@pytest.mark.parametrize("name", SPECIMENS)
@torch.no_grad()
def test_band_split_between_them_is_band_split_around_the_model(name):
    found, _ = ends_of(name)
    specimen, family, module, call = SPECIMENS[name], found.family, found.module, found.call
    multiple, native = specimen.multiples[-1], True
    level = torch.tensor(found.sigma if not family.variance_preserving else 0.9, dtype=torch.float64)

    def low(latent, sigma, multiple):
        return family.run_low(module, module.forward, call, latent, sigma, multiple, native).float()

    fused = Fusing(family, "torch").bands(module, call, lambda _: module.forward, native)
    path = make_path("band-split", PathOptions())
    wanted, result = (
        path.predict(PredictionHistory(), call.latent, level, multiple, call.geometry, Models(low, low, bands))
        for bands in (None, fused)
    )
    assert_close(result, wanted)
