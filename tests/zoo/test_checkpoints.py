"""The manifest, and checkpoint files with every wrapping and mistake. About 10 s."""

import argparse
import os
import re
from copy import deepcopy
from urllib.parse import urlsplit

import pytest
import timm
import torch

import zoo
from zoo import checkpoints, facts
from zoo.key_maps import join_parts

CHECKPOINTS = [entry for family in zoo.FAMILIES for entry in checkpoints.manifest(family)]
IDS = [f"{entry['model']}.{entry['tag']}" for entry in CHECKPOINTS]
FIELDS = {"model", "tag", "dataset", "num_classes", "licence", "origin_url", "paper_ids", "paper_name"}
FIELDS |= {"input_size", "mean", "std", "crop_pct", "interpolation"}
OPTIONAL_FIELDS = {"url", "hf_hub_id", "also_at", "sha256", "sha256_prefix"}  # of a file, if it is published
OPTIONAL_FIELDS |= {"crop_mode", "licence_note", "top1", "note"}


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return timm.create_model("test_van").state_dict()


@pytest.fixture
def state_dict(original):
    torch.manual_seed(0)
    return deepcopy(original)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def load(name, source, **kwargs):
    overlay = {"file": str(source)} if isinstance(source, os.PathLike) else {"state_dict": source}
    overlay |= kwargs.pop("overlay", {})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def lightning(prefix, state_dict, **others):
    """A Lightning checkpoint of a module that holds the model under a prefix, beside other tensors."""
    named = {f"{prefix}{key}": value for key, value in state_dict.items()}
    return {
        "pytorch-lightning_version": "2.5",
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
        "state_dict": named | others,
    }


def headless(state_dict):
    return {key: value for key, value in state_dict.items() if not key.startswith("head.")}


def test_manifest_entries_are_unique():
    assert len(set(IDS)) == len(IDS)
    urls = [entry["url"] for entry in CHECKPOINTS if "url" in entry]
    assert len(set(urls)) == len(urls)


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=IDS)
def test_manifest_entry_is_complete(entry):
    assert entry.keys() >= FIELDS
    assert entry.keys() <= FIELDS | OPTIONAL_FIELDS
    assert all(value not in (None, "", []) for value in entry.values())
    if "url" not in entry:
        assert not entry.keys() & {"hf_hub_id", "also_at", "sha256", "sha256_prefix"}
    for url in (entry.get("url", entry["origin_url"]), entry["origin_url"], *entry.get("also_at", ())):
        assert urlsplit(url).scheme == "https"
        assert urlsplit(url).netloc
    assert re.fullmatch(r"[0-9a-f]{64}", entry.get("sha256", "0" * 64))
    prefix = entry.get("sha256_prefix")
    assert prefix is None or re.search(rf"-{prefix}\.pth$", entry["url"])  # as torch.hub checks it
    if "top1" in entry:
        assert entry["top1"].keys() == {"value", "source"}
        assert 50 < entry["top1"]["value"] < 100


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=IDS)
def test_pretrained_cfg_has_the_facts(entry):
    cfg = timm.get_pretrained_cfg(f"{entry['model']}.{entry['tag']}")
    assert cfg.url == entry.get("url", "")
    assert cfg.license
    assert cfg.origin_url
    assert cfg.paper_ids
    assert cfg.mean == tuple(entry["mean"])
    assert cfg.num_classes == entry["num_classes"]


@pytest.mark.parametrize("model", sorted({entry["model"] for entry in CHECKPOINTS}))
def test_first_entry_is_the_default(model):
    first = next(entry for entry in CHECKPOINTS if entry["model"] == model)
    assert timm.get_pretrained_cfg(model).tag == first["tag"]
    assert timm.is_model_pretrained(model) == ("url" in first)


def test_a_model_without_published_weights_says_so():
    without = {**CHECKPOINTS[0], "model": "test_van", "tag": "in1k"}
    del without["url"]
    cfg = facts.timm_cfg(without)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_van"):
        timm.create_model("test_van", pretrained=True, pretrained_cfg=cfg)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: sd,
        lambda sd: {"state_dict": sd, "epoch": 3},
        lambda sd: {"model": sd},
        lambda sd: {"model_ema": sd, "model": {}},
        lambda sd: {"state_dict_ema": sd, "state_dict": {}},
        lambda sd: {"state_dict": {"model": sd}},
        lambda sd: {f"module.{key}": value for key, value in sd.items()},
        lambda sd: {f"_orig_mod.module.{key}": value for key, value in sd.items()},
        lambda sd: {f"module._orig_mod.{key}": value for key, value in sd.items()},
        lambda sd: {"meta": {}, "state_dict": {f"module.{key}": value for key, value in sd.items()}},
        lambda sd: {"model_state_dict": sd, "optimizer_state_dict": {"state": {}}},
        lambda sd: {"net": sd, "acc": 91.2},
        lambda sd: {"state_dict": {}, "model": sd},
        lambda sd: {"model": {}, "ema": {"module": sd, "updates": 7}},
        lambda sd: lightning("model.", sd),
        lambda sd: lightning("net.", sd),
        lambda sd: lightning("model.net.", sd),
        lambda sd: lightning("module.model.", sd),
        lambda sd: lightning("network.", sd),
        lambda sd: lightning("model._orig_mod.", sd),
        lambda sd: lightning("model.backbone.", sd),
        lambda sd: lightning("model.", sd, criterion=torch.zeros(5), **{"val_metric.total": torch.zeros(())}),
        lambda sd: lightning("ema_model.module.", sd, **{"model.head.bias": torch.zeros(3)}),
        lambda sd: {"n_averaged": torch.tensor(4)} | {f"module.{key}": value for key, value in sd.items()},
    ],
    ids=["plain", "dict", "model", "model_ema", "dict_ema", "nested", "ddp", "compiled", "ddp-compiled", "mmengine",
         "tutorial", "net", "empty-dict", "ema", "lightning", "lightning-net", "lightning-model-net",
         "lightning-module-model", "lightning-network", "lightning-compiled", "lightning-backbone",
         "lightning-with-others", "lightning-average", "averaged-model"],
)  # fmt: skip
@pytest.mark.parametrize("source", ["dict", "file"])
def test_wrapped_checkpoint_loads(wrap, source, state_dict, images, tmp_path):
    wrapped = wrap(state_dict)
    if source == "file":
        torch.save(wrapped, tmp_path / "model.pth")
        wrapped = tmp_path / "model.pth"
    loaded = load("test_van", wrapped).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state_dict.items())


@pytest.mark.slow
def test_backbone_of_a_segmentor_loads(state_dict, images):
    segmentor = {f"backbone.{key}": value for key, value in headless(state_dict).items()}
    segmentor["decode_head.conv_seg.weight"] = torch.zeros(150, 96, 1, 1)
    backbone = load("test_van", {"state_dict": segmentor}, features_only=True)
    want = load("test_van", state_dict, features_only=True)
    assert all(torch.equal(*pair) for pair in zip(backbone(images), want(images), strict=True))


@pytest.mark.slow
def test_lightning_module_around_a_backbone_loads(state_dict, images):
    module = lightning(
        "model.", headless(state_dict), **{"head.weight": torch.zeros(7, 96), "head.bias": torch.zeros(7)}
    )
    backbone = load("test_van", module, features_only=True)
    want = load("test_van", state_dict, features_only=True)
    assert all(torch.equal(*pair) for pair in zip(backbone(images), want(images), strict=True))
    with pytest.raises(RuntimeError, match=r"2 missing \(head.weight, head.bias\).*num_classes=0"):
        load("test_van", module)


@pytest.mark.slow
def test_weights_of_a_feature_extractor_load(state_dict):
    extractor = load("test_van", state_dict, features_only=True)
    loaded = load("test_van", extractor.state_dict(), num_classes=0).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in headless(state_dict).items())


@pytest.mark.slow
def test_safetensors_file_loads(state_dict, tmp_path):
    from safetensors.torch import save_file

    save_file(state_dict, tmp_path / "model.safetensors")
    loaded = load("test_van", tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state_dict.items())


def test_missing_batch_counters_are_filled_in(state_dict):
    load("test_van", {key: value for key, value in state_dict.items() if not key.endswith("num_batches_tracked")})


def test_checkpoint_is_not_changed(state_dict):
    before = dict(state_dict)
    load("test_van", state_dict, num_classes=10, in_chans=1)
    assert state_dict.keys() == before.keys()
    assert all(value is before[key] for key, value in state_dict.items())


@pytest.mark.parametrize(
    "kwargs", [{"features_only": True}, {"num_classes": 0}, {"num_classes": 10}], ids=["features", "0", "10"]
)
def test_headless_checkpoint_loads(kwargs, state_dict):
    loaded = load("test_van", headless(state_dict), **kwargs).state_dict()
    assert torch.equal(next(iter(loaded.values())), next(iter(state_dict.values())))


@pytest.mark.slow
def test_headless_checkpoint_gives_no_trained_classifier(state_dict):
    with pytest.raises(RuntimeError, match=r"2 missing \(head.weight, head.bias\).*num_classes=0"):
        load("test_van", headless(state_dict))
    tuned = load("test_van", headless(state_dict), overlay={"num_classes": 0}, num_classes=1000)
    assert tuned.num_classes == 1000


@pytest.mark.slow
def test_classifier_of_another_size_has_to_be_announced(state_dict, images):
    other = timm.create_model("test_van", num_classes=21).eval().state_dict()
    with pytest.raises(RuntimeError, match=r"head.weight \(21, 96\) for \(1000, 96\).*num_classes=\.\.\."):
        load("test_van", other)
    assert load("test_van", other, overlay={"num_classes": 21}, num_classes=21)(images).shape == (2, 21)
    assert load("test_van", other, overlay={"num_classes": 21}, num_classes=5)(images).shape == (2, 5)
    assert load("test_van", other, num_classes=5)(images).shape == (2, 5)


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """The content of downloads of published weights, by URL."""
    files = {}

    def fetch(url, *_):
        torch.save(files[url], tmp_path / "model.pth")
        return tmp_path / "model.pth"

    monkeypatch.setattr("zoo.downloads.fetch", fetch)
    return files


@pytest.mark.slow
def test_published_backbone_gives_a_model_without_classifier(downloads):
    url = timm.get_pretrained_cfg("van_b4").url
    small = {"depths": (1, 1, 1, 1)}
    full = timm.create_model("van_b4", **small).state_dict()
    downloads[url] = headless(full)
    assert timm.create_model("van_b4", pretrained=True, **small).num_classes == 0
    assert timm.create_model("van_b4", pretrained=True, num_classes=10, **small).num_classes == 10
    backbone = timm.create_model("van_b4", pretrained=True, features_only=True, **small)
    assert torch.equal(backbone.model.stages[3].norm.weight, full["stages.3.norm.weight"])
    downloads[url] = full  # the file may hold a classifier after all
    assert timm.create_model("van_b4", pretrained=True, **small).num_classes == 0


@pytest.mark.slow
def test_model_without_published_classifier_has_one_otherwise():
    model = timm.create_model("van_b4", device="meta")
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 1000
    assert timm.create_model("van_b4", num_classes=3, device="meta").num_classes == 3
    own = timm.create_model("van_b4", depths=(1, 1, 1, 1)).state_dict()
    loaded = load("van_b4", own, depths=(1, 1, 1, 1))
    assert torch.equal(loaded.head.weight, own["head.weight"])


@pytest.mark.slow
def test_other_variant_is_recognised(state_dict):
    with pytest.raises(RuntimeError, match=r"does not fit van_b0: \d+ missing .*It looks like test_van: create that"):
        load("van_b0", state_dict)


@pytest.mark.slow
def test_deeper_variant_is_recognised():
    deeper = timm.create_model("van_b2", device="meta").state_dict()
    with pytest.raises(RuntimeError, match=r"does not fit van_b1: \d+ unexpected .*It looks like van_b2: create that"):
        load("van_b1", deeper)


@pytest.mark.slow
def test_variation_of_a_variant_is_recognised():
    other = timm.create_model("test_van", mlp_ratios=(8, 8, 4, 2)).state_dict()
    message = r"of another shape \(stages.3.blocks.0.mlp.fc1.weight \(192, .*\d\d% of it is test_van: .* altered"
    with pytest.raises(RuntimeError, match=message):
        load("test_van", other)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_other_family_is_recognised(source):
    from torchvision.models import resnet18

    resnet = timm.create_model("resnet18") if source == "timm" else resnet18()
    with pytest.raises(RuntimeError, match=r"does not fit test_van: .*It does not look like a model of zoo"):
        load("test_van", resnet.state_dict())


def test_truncated_checkpoint_is_recognised(state_dict):
    cut = dict(list(state_dict.items())[:200])
    with pytest.raises(
        RuntimeError, match=r"57 missing \(\S+, \S+, \S+, \.\.\.\)\. 77% of it is test_van: .*incomplete"
    ):
        load("test_van", cut)


def test_checkpoint_without_tensors_is_refused():
    with pytest.raises(ValueError, match=r"no tensors, only epoch, args: pass a state dict"):
        load("test_van", {"epoch": 3, "args": None})


def test_two_tensors_of_one_name_are_refused(state_dict):
    with pytest.raises(ValueError, match=r"Two tensors .* called stages.0.norm.weight"):
        load("test_van", state_dict | {"norm1.weight": torch.ones(16)})


@pytest.mark.slow
def test_arguments_of_timms_trainer_load(state_dict, tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": state_dict, "args": argparse.Namespace(lr=1e-3)}, path)
    assert torch.load(path, weights_only=True)["args"].lr == 1e-3  # as timm reads a download
    load("test_van", path)


def test_hostile_pickle_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Hostile()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: the file asks for posix\.mkdir, which could run any code"):
        load("test_van", tmp_path / "model.pth")
    assert not (tmp_path / "made").exists()


def test_parts_of_a_tensor_are_joined_in_the_order_of_their_numbers():
    parts = {
        f"a.qkv[{i}].{name}": torch.full(shape, i) for i in (2, 0, 1) for name, shape in (("w", (1, 2)), ("b", (1,)))
    }
    joined = join_parts({"x.w": torch.ones(1), **parts})
    assert {key: value.tolist() for key, value in joined.items()} == {
        "x.w": [1],
        "a.qkv.w": [[0, 0], [1, 1], [2, 2]],
        "a.qkv.b": [0, 1, 2],
    }


@pytest.mark.parametrize(
    "parts",
    [{"qkv[0].w": (1, 2), "qkv[2].w": (1, 2)}, {"qkv[0].w": (1, 2), "qkv[1].w": (1, 3)}, {"qkv[0].w": (), "qkv.w": ()}],
    ids=["missing", "another_form", "whole"],
)
def test_parts_that_do_not_fit_are_left_alone(parts):
    assert join_parts({key: torch.ones(shape) for key, shape in parts.items()}).keys() == parts.keys()
