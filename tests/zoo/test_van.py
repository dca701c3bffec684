"""VAN against the official implementation (goldens, key names, parameter counts) and its own arguments. About 15 s."""

import hashlib

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.checkpoints import remap
from zoo.van import KEY_MAP, VAN, VARIANTS

from . import golden

TOLERANCE = 1e-6  # of the output's standard deviation; another GELU or epsilon shows as 2e-5

# Counted on the official models, and the first 16 digits of the SHA-256 of their sorted "key shape" lines.
OFFICIAL = {
    "van_b0": (4_105_800, "bbf0be0bc09aef0d"),
    "van_b1": (13_861_800, "1dfaa1ae0b89803e"),
    "van_b2": (26_578_472, "64a2b8401b0aad33"),
    "van_b3": (44_765_608, "eb03a970c4d1a7f5"),
    "van_b4": (60_283_176, "33725734bac9ce41"),
    "van_b5": (89_967_688, "29eed7cca22b370e"),
    "van_b6": (199_829_416, "5e5205eb9cfecda5"),
}


def official_shapes(embed_dims, depths, mlp_ratios=(8, 8, 4, 4), num_classes=1000) -> golden.Shapes:
    """Keys and shapes of the official model's state dict; `OFFICIAL` holds the digests that prove it."""
    shapes: golden.Shapes = {}

    def affine(name, out, *kernel):
        shapes[f"{name}.weight"] = (out, *kernel)
        shapes[f"{name}.bias"] = (out,)

    def batch_norm(name, dim):
        affine(name, dim)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (dim,)
        shapes[f"{name}.num_batches_tracked"] = ()

    in_chans = 3
    for i, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True), start=1):
        kernel_size = 7 if i == 1 else 3
        affine(f"patch_embed{i}.proj", dim, in_chans, kernel_size, kernel_size)
        batch_norm(f"patch_embed{i}.norm", dim)
        for j in range(depth):
            block = f"block{i}.{j}"
            shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (dim,)
            batch_norm(f"{block}.norm1", dim)
            batch_norm(f"{block}.norm2", dim)
            affine(f"{block}.attn.proj_1", dim, dim, 1, 1)
            affine(f"{block}.attn.spatial_gating_unit.conv0", dim, 1, 5, 5)
            affine(f"{block}.attn.spatial_gating_unit.conv_spatial", dim, 1, 7, 7)
            affine(f"{block}.attn.spatial_gating_unit.conv1", dim, dim, 1, 1)
            affine(f"{block}.attn.proj_2", dim, dim, 1, 1)
            affine(f"{block}.mlp.fc1", dim * ratio, dim, 1, 1)
            affine(f"{block}.mlp.dwconv.dwconv", dim * ratio, 1, 3, 3)
            affine(f"{block}.mlp.fc2", dim, dim * ratio, 1, 1)
        affine(f"norm{i}", dim)
        in_chans = dim
    affine("head", num_classes, in_chans)
    return shapes


def official_weights(name: str, record: dict) -> dict[str, torch.Tensor]:
    return golden.weights(official_shapes(**VARIANTS[name]), record["gain"])


def load(name: str, state_dict: dict[str, torch.Tensor], **kwargs) -> nn.Module:
    overlay = {"state_dict": state_dict}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **kwargs
    ).eval()


@pytest.fixture(scope="module")
def record() -> dict:
    return golden.read("van_b0")


@pytest.fixture(scope="module")
def van_b0(record) -> nn.Module:
    return load("van_b0", official_weights("van_b0", record))


@pytest.fixture(scope="module")
def segmentation_record() -> dict:
    return golden.read("van_b0_seg")


@pytest.fixture(scope="module")
def segmentation_backbone(segmentation_record) -> nn.Module:
    state_dict = official_weights("van_b0", segmentation_record)
    headless = {key: value for key, value in state_dict.items() if not key.startswith("head.")}
    return load("van_b0", headless, features_only=True, norm_eps=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "second_"], ids=["224x224", "198x262"])
def test_logits_match_official(van_b0, record, prefix):
    logits = van_b0(golden.image(**record[f"{prefix}input"]))
    assert golden.difference(logits, record[f"{prefix}logits"]) < TOLERANCE


@torch.no_grad()
def test_logits_of_a_batch_match_official(van_b0, record):
    assert golden.difference(van_b0(golden.image(2, 224, 224)), record["batch2_logits"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "second_"], ids=["224x224", "198x262"])
def test_features_before_the_norm_match_official(van_b0, record, prefix):
    raw = []
    hooks = [stage.norm.register_forward_pre_hook(lambda _, args: raw.append(args[0])) for stage in van_b0.stages]
    van_b0(golden.image(**record[f"{prefix}input"]))
    for hook in hooks:
        hook.remove()
    deviations = [golden.difference(*pair) for pair in zip(raw, record[f"{prefix}features"], strict=True)]
    assert max(deviations) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "second_"], ids=["224x224", "198x262"])
def test_segmentation_outputs_match_official(segmentation_backbone, segmentation_record, prefix):
    features = segmentation_backbone(golden.image(**segmentation_record[f"{prefix}input"]))
    want = segmentation_record[f"{prefix}outputs"]
    assert max(golden.difference(*pair) for pair in zip(features, want, strict=True)) < TOLERANCE


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_count_is_official(name):
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == OFFICIAL[name][0]


@pytest.mark.parametrize("name", OFFICIAL)
def test_key_map_covers_every_official_key_once(name):
    shapes = official_shapes(**VARIANTS[name])
    lines = sorted(f"{key} {shape}" for key, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(OFFICIAL[name][1])

    renamed = remap({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, KEY_MAP)
    ours = timm.create_model(name, device="meta").state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_key_map_leaves_our_own_keys_alone(name):
    ours = timm.create_model(name, device="meta").state_dict()
    assert list(remap(ours, KEY_MAP)) == list(ours)


def test_the_tiny_model_is_tiny():
    model = timm.create_model("test_van", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_every_variant_is_registered():
    assert set(timm.list_models(module="van")) == set(VARIANTS)
    assert zoo.van.VAN is VAN


def test_drop_path_grows_linearly_over_all_blocks():
    model = timm.create_model("test_van", drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


def test_initialisation_is_official():
    torch.manual_seed(0)
    model = timm.create_model("van_b0")
    block = model.stages[2].blocks[0]
    assert block.layer_scale1.eq(0.01).all()
    assert block.mlp.fc1.weight.std().item() == pytest.approx((2 / 640) ** 0.5, rel=0.02)  # fan out: 640 channels
    assert block.mlp.dw_conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)  # fan out: 3 x 3
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_norm_eps_reaches_every_stage():
    model = timm.create_model("test_van", norm_eps=1e-5)
    assert [stage.norm.eps for stage in model.stages] == [1e-5] * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dims": (16, 32)}, r"2 embed_dims=\(16, 32\).*one value per stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\).*at least one channel and one block"),
        ({"global_pool": "max"}, r"global_pool='max'.*'avg'"),
        ({"num_classes": -1}, r"num_classes=-1.*at least 0"),
    ],
    ids=["lengths", "depth", "global_pool", "num_classes"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_van", **kwargs)


def test_classifier_without_pooling_is_refused():
    model = timm.create_model("test_van", global_pool="").eval()
    with pytest.raises(ValueError, match="num_classes=0"):
        model(torch.zeros(1, 3, 32, 32))
