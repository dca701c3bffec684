"""Half precision: every family's smallest and largest model under autocast. All slow, 20 s; the largest 60 s."""

import pytest
import timm
import torch

from zoo import families

from . import golden

OFFICIAL = golden.official()


def extremes() -> list:
    """The smallest and the largest model of every family, among those that are made for 224 pixels."""
    models = [name for name in OFFICIAL if timm.is_model(name) and timm.get_pretrained_cfg(name).input_size[1] == 224]
    models.sort(key=lambda name: OFFICIAL[name]["params_M"])
    largest = {families.family_of(name): name for name in models}
    smallest = {families.family_of(name): name for name in reversed(models)}
    return [
        *(pytest.param(name, marks=pytest.mark.slow) for name in smallest.values()),
        *(pytest.param(name, marks=pytest.mark.long) for name in largest.values()),
    ]


@pytest.fixture(scope="module", params=extremes())
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_gives_finite_numbers(model, dtype):
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype):
        logits = model(images)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert logits.float().std() > 0.01
