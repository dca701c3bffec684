"""Every variant against the official implementation: key names and shapes, parameter counts, stored outputs. 60 s.

The goldens hold what the official code makes of weights and images that are functions of names and shapes; see
`golden.py`.
"""

import inspect

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import families
from zoo.checkpoints import remap
from zoo.kernels import implementation
from zoo.key_maps import is_counter

from . import golden

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6  # of the output's standard deviation; another GELU or epsilon shows as 2e-5
OFFICIAL = golden.official()


def shapes(name):
    return {key: tuple(shape) for key, shape in OFFICIAL[name]["keys"].items()}


def load(name, record, **kwargs):
    overlay = {"state_dict": golden.official_weights(name, record)}
    kwargs |= {"pretrained": True, "pretrained_cfg_overlay": overlay, "dtype": torch.float64}
    return timm.create_model(name, **kwargs).eval()


def multiply_adds(name):
    """Billions of multiply-adds for an image of 224 x 224."""
    model = timm.create_model(name, device="meta").eval()
    with implementation("reference"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


def deviation(outputs, wanted):
    return max(golden.difference(*pair) for pair in zip(outputs, wanted, strict=True))


def inputs(record):
    return [prefix for prefix in ("", "second_") if f"{prefix}input" in record]


def test_every_family_is_here():
    assert {path.name.partition(".")[0] for path in golden.FOLDER.glob("official/*.xz")} == set(zoo.FAMILIES)
    assert {families.family_of(name) for name in golden.classifiers()} == {*map(families.load, zoo.FAMILIES)}
    assert {families.family_of(name) for name in OFFICIAL} == {*map(families.load, zoo.FAMILIES)}


@pytest.mark.parametrize("name", OFFICIAL)
def test_key_map_covers_every_official_key_once(name):
    """And the official number of parameters. Building the model takes most of the time."""
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes(name).items()}
    model = timm.create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(OFFICIAL[name]["params_M"], abs=6e-4)
    dropped = [key for key in official if not remap({key: official[key]}, families.family_of(name).KEY_MAP)]
    constants = ("relative_position_index", "RoPE.angle", "rope.angle", "Relpos.angle", "attn_mask")
    assert all(key.endswith(constants) for key in dropped)
    assert len(remap(official, families.family_of(name).KEY_MAP)) == len(official) - len(dropped)
    converted = families.family_of(name).checkpoint_filter_fn(official, model)
    # torch fills in the counters of batch norm, which TensorFlow's files lack
    ours = {key: value for key, value in model.state_dict().items() if key in converted or not is_counter(key)}
    assert {key: value.shape for key, value in converted.items()} == {key: value.shape for key, value in ours.items()}
    own = model.state_dict()
    assert list(remap(own, families.family_of(name).KEY_MAP)) == list(own)  # our own keys stay as they are


@torch.no_grad()
@pytest.mark.parametrize("name", golden.classifiers())
def test_classifier_matches_official(name):
    record = golden.read(name)
    model = load(name, record)
    raw = {}
    if model.stages[0].norm.__class__ is not torch.nn.Identity:  # VAN: the record holds the inputs of the stages' norms
        for i, stage in enumerate(model.stages):
            stage.norm.register_forward_pre_hook(lambda _, args, i=i: raw.update({i: args[0]}))
    for prefix in inputs(record):
        x = golden.image(**record[f"{prefix}input"])
        last, features = model.forward_intermediates(x)
        features = [raw.get(i, feature) for i, feature in enumerate(features)]
        assert deviation(features, record[f"{prefix}features"]) < TOLERANCE
        if f"{prefix}logits" in record:
            assert golden.difference(model.forward_head(last), record[f"{prefix}logits"]) < TOLERANCE
    images = golden.image(2, record["input"]["height"], record["input"]["width"])
    assert golden.difference(model(images), record["batch2_logits"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(("name", "task"), golden.backbones())
def test_dense_backbone_matches_official(name, task):
    record, kwargs = golden.read(name, task), families.dense_kwargs(name, task)
    normed = "output_norm" in inspect.signature(type(timm.create_model(name, device="meta"))).parameters
    backbone = load(name, record, features_only=True, **{"output_norm": True} if normed else {}, **kwargs)
    for prefix in inputs(record):
        features = backbone(golden.image(**record[f"{prefix}input"]))
        assert deviation(features, record[f"{prefix}outputs"]) < TOLERANCE
    if normed:
        raw = load(name, record, features_only=True, **kwargs)
        assert deviation(raw(golden.image(**record["input"])), record["features"]) < TOLERANCE


@pytest.fixture(scope="module", params=golden.classifiers())
def official_file(request, tmp_path_factory):
    """A model, and a file as its authors publish it."""
    path = tmp_path_factory.mktemp("official") / f"{request.param}.pth"
    record = {"gain": golden.read(request.param).get("gain", {})}  # without it, some models overflow float32
    weights = {key: value.float() for key, value in golden.official_weights(request.param, record).items()}
    torch.save({"model": weights}, path)
    yield request.param, path
    path.unlink()


def load_file(official_file, **kwargs):
    name, path = official_file
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs).eval()


@torch.no_grad()
def test_official_file_gives_features(official_file):
    image = golden.image(1, 64, 64).float()
    want = load_file(official_file).forward_intermediates(image, intermediates_only=True)
    features = load_file(official_file, features_only=True, num_classes=10)(image)
    assert all(torch.equal(*pair) for pair in zip(features, want, strict=True))


@torch.no_grad()
def test_official_file_gives_features_of_gray_images(official_file):
    image = golden.image(1, 64, 64).float()[:, :1]
    colour, gray = (load_file(official_file, features_only=True, in_chans=channels) for channels in (3, 1))
    for feature, want in zip(gray(image), colour(image.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(feature, want, rtol=1e-3, atol=1e-3 * want.std().item())


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, 10])
def test_official_file_takes_other_classes(official_file, num_classes):
    image = golden.image(1, 64, 64).float()
    model = load_file(official_file, num_classes=num_classes)
    assert model(image).shape == (1, num_classes or model.head_hidden_size)
    (want,) = load_file(official_file, features_only=True, out_indices=(3,))(image)
    (got,) = model.forward_intermediates(image, indices=[3], intermediates_only=True)
    assert torch.equal(got, want)
