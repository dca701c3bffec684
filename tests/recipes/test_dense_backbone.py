"""Any timm model under MMDetection and MMSegmentation: features, norms, freezing, parameter groups. Two minutes."""

import importlib
import inspect
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.optim import param_groups_layer_decay
from torch import nn

import zoo
from zoo import families
from zoo.messages import UserError
from zoo.recipes.dense import backbone as module
from zoo.recipes.dense.backbone import TimmBackbone, param_groups

sys.path.append(str(Path(__file__).parents[1] / "zoo"))
import golden

sys.path.pop()


def _class(name):
    return type(timm.create_model(name, device="meta"))


OURS = [name for family in zoo.FAMILIES for name in timm.list_models("test_*", module=family)]
STAGES = dict.fromkeys(OURS, (4, 8, 16, 32)) | {
    "convnext_atto": (4, 8, 16, 32),
    "davit_tiny": (4, 8, 16, 32),
    "resnet10t": (4, 8, 16, 32),
    "swin_tiny_patch4_window7_224": (4, 8, 16, 32),  # NHWC features, and images of one size by default
    "test_mambaout": (4, 8, 16, 32),  # NHWC features
    "test_efficientnet": (4, 8, 16, 32),  # five stages, an extractor of its own
    "test_vit": (16, 16, 16, 16),
    "test_vim": (16, 16, 16, 16),  # without its pyramid
    "test_illama": (16, 16, 16, 16),  # without its pyramid
    "pit_ti_224": (8, 16, 32),  # three stages, hooks
}
NORMS_IN_MODEL = {name for name in OURS if "output_norm" in inspect.signature(_class(name)).parameters}
NORMS_OF_ADAPTER = {"convnext_atto", "davit_tiny", "swin_tiny_patch4_window7_224", "test_mambaout", "test_vit"}
NORMS_OF_ADAPTER |= {"pit_ti_224"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def said(monkeypatch):
    """The warnings of the backbone."""
    lines = []
    monkeypatch.setattr(module.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


def image(height=96, width=160, batch=2):
    return torch.randn(batch, 3, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_channels_strides_and_layout(name):
    net = TimmBackbone(name).eval()
    side = (224, 224) if name.startswith("pit") else (96, 160)  # PiT takes one size only
    with torch.no_grad():
        features = net(image(*side))
    assert isinstance(features, tuple)
    assert tuple(net.reductions) == STAGES[name]
    want = [(2, dim, *(-(-s // stride) for s in side)) for dim, stride in zip(net.channels, STAGES[name], strict=True)]
    if name.startswith("pit"):  # its patches overlap
        want = [(2, dim, s, s) for dim, s in zip(net.channels, (27, 14, 7), strict=True)]
    assert [tuple(feature.shape) for feature in features] == want


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_norm_of_each_output(name):
    net = TimmBackbone(name, out_indices=None)
    inner = getattr(getattr(net.body, "model", None), "output_norms", None)
    assert (inner is not None) == (name in NORMS_IN_MODEL)
    assert (net.norms is not None) == (name in NORMS_OF_ADAPTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_dinat", "test_van", "test_maxvit", "resnet10t", "convnext_atto"])
@pytest.mark.parametrize("output_norm", [True, False])
def test_output_norm_as_asked(name, output_norm):
    features = TimmBackbone(name, output_norm=output_norm)(image())
    features = [feature.detach() for feature in features]
    normed = all(
        feature.mean(dim=1).abs().max() < 1e-2 and (feature.var(dim=1, unbiased=False) - 1).abs().max() < 1e-2
        for feature in features
    )
    # the stages of VAN end in a norm already
    assert normed == (output_norm or name == "test_van")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OURS if "output_norm" in families.dense_kwargs(name, "detect")])
def test_output_norm_of_the_call_wins_over_the_model_kwargs(name):
    kwargs = families.dense_kwargs(name, "detect")
    norms = [TimmBackbone(name, kwargs, output_norm=x).body.model.output_norms for x in (None, True, False)]
    kinds = ["LayerNorm2d" if i in kwargs["output_norm"] else "Identity" for i in range(4)]
    assert [type(norm).__name__ for norm in norms[0]] == kinds
    assert [type(norm).__name__ for norm in norms[1]] == ["LayerNorm2d"] * 4
    assert norms[2] is None


@pytest.mark.slow
def test_norm_of_the_adapter_is_the_models_own():
    net = TimmBackbone("convnext_atto", output_norm=None)
    x = image()
    plain = TimmBackbone("convnext_atto", output_norm=False)
    plain.body.load_state_dict(net.body.state_dict())
    want = [
        nn.functional.layer_norm(f.permute(0, 2, 3, 1), f.shape[1:2], eps=1e-6).permute(0, 3, 1, 2) for f in plain(x)
    ]
    torch.testing.assert_close(list(net(x)), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_dinat", "swin_tiny_patch4_window7_224", "resnet10t"])
def test_chosen_stages_leave_no_parameter_without_gradient(name):
    net = TimmBackbone(name, out_indices=(1, 3))
    features = net(image())
    sum(feature.square().sum() for feature in features).backward()
    assert [parameter for parameter, p in net.named_parameters() if p.grad is None] == []
    every = TimmBackbone(name, out_indices=range(4))
    assert net.channels == every.channels[1::2]
    assert [feature.shape[1] for feature in features] == net.channels


@pytest.mark.slow
def test_features_are_timms():
    net = TimmBackbone("swin_tiny_patch4_window7_224", output_norm=False).eval()
    plain = timm.create_model("swin_tiny_patch4_window7_224", features_only=True).eval()
    plain.load_state_dict(net.body.state_dict(), strict=False)
    x = image(224, 224, 1)
    with torch.no_grad():
        torch.testing.assert_close([f.permute(0, 2, 3, 1) for f in net(x)], plain(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "task"),
    [*golden.backbones()[:2], *(pytest.param(*rest, marks=pytest.mark.long) for rest in golden.backbones()[2:])],
)
def test_outputs_match_official(model, task, tmp_path):
    record = golden.read(model, task)
    weights = {k: v for k, v in golden.official_weights(model, record).items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "official.pt")
    kwargs = families.dense_kwargs(model, task) | {"dtype": torch.float64}
    net = TimmBackbone(model, kwargs, pretrained=str(tmp_path / "official.pt")).eval()
    for prefix in ("", "second_"):  # the second is 198 x 262
        outputs = net(golden.image(**record[f"{prefix}input"]))
        wanted = record[f"{prefix}outputs"]
        assert max(golden.difference(*pair) for pair in zip(outputs, wanted, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "test_van", "test_dinat", "swin_tiny_patch4_window7_224"])
def test_frozen_stages_stay_as_they_are(name):
    net = TimmBackbone(name, {"drop_path_rate": 0.5}, frozen_stages=2).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    features = net(image())
    sum(feature.square().sum() for feature in features).backward()
    groups = {
        name.replace(".", "_"): group
        for group, names in timm.models.group_parameters(
            net.classifier(), net.classifier().group_matcher(coarse=True)
        ).items()
        for name in names
    }
    for key, parameter in net.body.named_parameters():
        group = groups.get(key.removeprefix("model.").replace(".", "_"), 99)
        assert (parameter.grad is None) == (not parameter.requires_grad) == (group <= 2), key
    modes = {module.training for module in net._frozen}
    assert modes == {False}
    assert net.training
    frozen = {key for key, parameter in net.named_parameters() if not parameter.requires_grad}
    for key, value in net.state_dict().items():
        owner = key.rpartition(".")[0]
        if any(other.rpartition(".")[0] == owner for other in frozen):
            assert torch.equal(value, before[key]), key


def test_frozen_stem_alone():
    net = TimmBackbone("test_van", frozen_stages=0)
    frozen = {key for key, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(key.startswith("body.model.stem.") for key in frozen)


@pytest.mark.parametrize("norm_eval", [True, False])
def test_norm_eval_keeps_the_statistics(norm_eval):
    net = TimmBackbone("resnet10t", norm_eval=norm_eval).train()
    before = {key: value.clone() for key, value in net.named_buffers()}
    net(image())
    same = [torch.equal(value, before[key]) for key, value in net.named_buffers()]
    assert all(same) if norm_eval else not any(same)
    assert net.eval().training is False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_dinat", "convnext_atto", "resnet10t"])
def test_gradient_checkpointing_changes_no_gradient(name):
    plain, saving = TimmBackbone(name), TimmBackbone(name, grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = image()
    kept = [0, 0]
    gradients = []
    for i, net in enumerate((plain, saving)):

        def count(tensor, i=i):
            kept[i] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = sum(feature.square().mean() for feature in net.train()(x))
        loss.backward()
        gradients.append({key: parameter.grad for key, parameter in net.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert kept[1] < kept[0]


class Detector(nn.Module):
    """A detector with only what `param_groups` reads."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.channels[-1], 5, 1)


def settings(groups, model):
    """Learning rate and weight decay by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


LAYERED = ["test_dinat", "test_van", "test_maxvit", "convnext_atto", "resnet10t", "swin_tiny_patch4_window7_224"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERED)
def test_layer_decay_is_timms(name):
    model = Detector(TimmBackbone(name, output_norm=True))
    found = settings(param_groups(model, 1e-3, 0.05, layer_decay=0.7), model)
    assert set(found) == {key for key, _ in model.named_parameters()}
    bare = timm.create_model(name)
    patterns = bare.no_weight_decay() if hasattr(bare, "no_weight_decay") else set()
    timms = param_groups_layer_decay(bare, 0.05, patterns, layer_decay=0.7)
    names = {id(parameter): key for key, parameter in bare.named_parameters()}
    want = {
        names[id(p)].replace(".", "_"): (1e-3 * group["lr_scale"], group["weight_decay"])
        for group in timms
        for p in group["params"]
    }
    compared = 0
    for key, (lr, decay) in found.items():
        flat = key.removeprefix("backbone.body.").removeprefix("model.").replace(".", "_")
        if flat in want:
            compared += 1
            assert lr == pytest.approx(want[flat][0]), key
            assert decay == want[flat][1] or key.endswith(".bias"), key
        else:
            assert "norms." in key or key.startswith("head."), key
            assert lr == 1e-3, key
    head = [key for key in want if fnmatch(key, "head*") or fnmatch(key, "fc_*") or fnmatch(key, "*norm_*")]
    assert compared >= len(want) - len(head) - 4
    assert len({lr for lr, _ in found.values()}) > 4


def test_layer_decay_of_a_model_without_groups():
    backbone = TimmBackbone("pit_ti_224")
    scales = backbone.layer_scales(0.5)
    assert len(set(scales.values())) > 2
    assert {key for key, _ in backbone.named_parameters()} - set(scales) == {
        f"norms.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_gc_vit", "swin_tiny_patch4_window7_224", "test_vit"])
def test_vectors_and_the_models_own_are_not_decayed(name):
    model = Detector(TimmBackbone(name))
    found = settings(param_groups(model, 1e-3, 0.05), model)
    listed = timm.create_model(name).no_weight_decay()
    assert {lr for lr, _ in found.values()} == {1e-3}
    for key, parameter in model.named_parameters():
        flat = key.removeprefix("backbone.body.").removeprefix("model.")
        own = any(fnmatch(flat.replace(".", "_"), pattern.replace(".", "_")) for pattern in listed)
        assert found[key][1] == (0.0 if parameter.ndim < 2 or key.endswith("bias") or own else 0.05), key
    assert len(param_groups(model, 1e-3, 0.05)) == 2


def test_no_decay_names_exactly_what_is_not_decayed():
    model = Detector(TimmBackbone("test_dinat"))
    found = settings(param_groups(model, 1e-3, 0.05, no_decay=["norm", "bias_table"]), model)
    assert {key for key, (_, decay) in found.items() if decay == 0} == {
        key for key in found if "norm" in key or "bias_table" in key
    }
    assert found["head.bias"] == (1e-3, 0.05)
    assert len(param_groups(model, 1e-3, 0.05, no_decay=[])) == 1


def test_backbone_lr_is_a_factor_of_the_backbone():
    model = Detector(TimmBackbone("test_dinat"))
    found = settings(param_groups(model, 1e-3, 0.05, backbone_lr=0.1), model)
    assert {lr for key, (lr, _) in found.items() if key.startswith("backbone.")} == {1e-4}
    assert {lr for key, (lr, _) in found.items() if not key.startswith("backbone.")} == {1e-3}


def test_lr_factors_multiply_the_other_factors():
    model = Detector(TimmBackbone("test_litv2"))
    plain = settings(param_groups(model, 1e-3, 0.05, layer_decay=0.7, backbone_lr=0.1), model)
    factors = {"offset.weight": 0.01, "head": 2.0}
    found = settings(param_groups(model, 1e-3, 0.05, layer_decay=0.7, backbone_lr=0.1, lr_factors=factors), model)
    for key, (lr, decay) in plain.items():
        factor = 2.0 if key.startswith("head") else 0.01 if key.endswith("offset.weight") else 1.0
        assert found[key] == (pytest.approx(lr * factor), decay), key


def test_lr_factor_of_nothing():
    with pytest.raises(
        UserError, match=r"optim.lr_factors has 'ofset', but no trained parameter .*: did you mean offset"
    ):
        param_groups(Detector(TimmBackbone("test_litv2")), 1e-3, 0.05, lr_factors={"ofset": 0.1})


@pytest.mark.slow
def test_frozen_parameters_are_in_no_group():
    model = Detector(TimmBackbone("test_van", frozen_stages=1))
    found = settings(param_groups(model, 1e-3, 0.05, layer_decay=0.8), model)
    assert set(found) == {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_dinat", "resnet10t"])
def test_pretrained_file(name, tmp_path):
    classifier = timm.create_model(name, num_classes=7)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    net = TimmBackbone(name, pretrained=str(tmp_path / "weights.safetensors")).eval()
    x = image()
    with torch.no_grad():
        features = TimmBackbone(name, output_norm=False, pretrained=str(tmp_path / "weights.safetensors")).eval()(x)
        want = classifier.eval().forward_intermediates(x, indices=4, intermediates_only=True)
        torch.testing.assert_close(list(features), want)
        assert net(x)[0].isfinite().all()
    assert "pretrained" not in net.arguments


@pytest.mark.slow
def test_pretrained_run_folder(finished):
    net = TimmBackbone("test_vit", {"img_size": 32}, output_norm=False, pretrained=str(finished)).eval()
    x = image(32, 32)
    trained = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    with torch.no_grad():
        want = trained.forward_intermediates(x, indices=4, intermediates_only=True)
        torch.testing.assert_close(list(net(x)), want)


@pytest.mark.slow
def test_pretrained_of_another_model(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"resnet10t can't be created with .*other\.safetensors"):
        TimmBackbone("resnet10t", pretrained=str(tmp_path / "other.safetensors"))


def test_weights_stay_as_timm_made_them():
    net = TimmBackbone("test_dinat", {"layer_scale": 0.25})
    before = {key: value.clone() for key, value in net.state_dict().items()}
    nn.Sequential(net)
    net.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.slow
def test_arguments_build_the_same_backbone():
    net = TimmBackbone(
        "resnet10t", {"drop_path_rate": 0.1}, out_indices=(2, 3), frozen_stages=1, norm_eval=True, output_norm=True
    )
    again = TimmBackbone(**net.arguments)
    again.load_state_dict(net.state_dict())
    assert again.arguments == net.arguments
    x = image()
    torch.testing.assert_close(again.train()(x), net.train()(x))


@pytest.mark.slow
def test_statistics_are_the_models():
    net = TimmBackbone("test_maxvit")
    assert (net.mean, net.std) == ((0.5,) * 3, (0.5,) * 3)
    assert TimmBackbone("resnet10t").mean == (0.485, 0.456, 0.406)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_both_registries_build_it(package):
    importlib.import_module("zoo.recipes.mm")
    registry = importlib.import_module(f"{package}.registry").MODELS
    for prefix in ("", "mmengine.", "mmdet.", "mmseg."):
        net = registry.build({"type": f"{prefix}TimmBackbone", "model": "test_van", "model_kwargs": {"num_classes": 0}})
        assert net.channels == [16, 32, 64, 96]


def _varied():
    """One model of zoo for each different setting of dense prediction, with its task."""
    found = {}
    for name in (name for family in zoo.FAMILIES for name in timm.list_models(module=family)):
        for task in ("detect", "segment"):
            kwargs = families.dense_kwargs(name, task)
            if kwargs:
                found.setdefault((timm.model_entrypoint(name).__module__, repr(kwargs)), (name, task))
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), _varied())
def test_dense_kwargs_suit_the_model(name, task):
    TimmBackbone(name, families.dense_kwargs(name, task) | {"device": "meta"})


@pytest.mark.slow
def test_task_brings_the_familys_settings(said):
    kwargs = families.dense_kwargs("dinat_mini", "detect")
    net = TimmBackbone("dinat_mini", {"drop_path_rate": 0.1, "device": "meta"}, task="detect")
    assert net.arguments["model_kwargs"] == kwargs | {"drop_path_rate": 0.1, "device": "meta"}
    given = {"dilations": [[1], [1], [1], [1]]}
    assert module._task_kwargs("dinat_mini", "segment", given) == given
    assert module._task_kwargs("dinat_mini", None, kwargs) == kwargs
    assert said == []


def test_settings_of_a_classifier_are_pointed_out(said):
    assert module._task_kwargs("dinat_mini", None, {}) == {}
    assert said == [
        "The backbone dinat_mini has the dilations of a classifier: give task=detect or task=segment for those that "
        "its family has for this task."
    ]
    assert module._task_kwargs("resnet10t", None, {}) == module._task_kwargs("test_van", None, {}) == {}
    assert len(said) == 1


def test_unknown_task():
    with pytest.raises(UserError, match="task='detection' is not allowed: it has to be detect or segment, or None"):
        TimmBackbone("test_van", task="detection")


@pytest.mark.slow
def test_channels_are_checked():
    assert TimmBackbone("test_van", channels=(16, 32, 64, 96)).channels == [16, 32, 64, 96]
    with pytest.raises(UserError, match=r"channels=\[64, 128\]: the features of test_van have \[16, 32, 64, 96\] chan"):
        TimmBackbone("test_van", channels=[64, 128])


def test_unknown_model():
    with pytest.raises(UserError, match="there is no model 'dinat_tinny': did you mean dinat_tiny"):
        TimmBackbone("dinat_tinny")


def test_unknown_keyword():
    with pytest.raises(UserError, match=r"test_van can't be created with depth=3: .*depth"):
        TimmBackbone("test_van", {"depth": 3})


@pytest.mark.parametrize("key", ["out_indices", "features_only"])
def test_keywords_of_the_backbone_itself(key):
    with pytest.raises(UserError, match=f"model_kwargs has '{key}', which the backbone sets itself: see dense.out_ind"):
        TimmBackbone("test_van", {key: True})


def test_stages_from_the_end():
    assert TimmBackbone("test_van", out_indices=(-3, -2, -1)).reductions == [8, 16, 32]


@pytest.mark.parametrize("indices", [(0, 4), (-5,), (2, 1), (1, 1), (3, -1), ()])
def test_stages_that_are_not_there(indices):
    with pytest.raises(UserError, match="test_van has 4 stages, so it has to be increasing numbers from 0 to 3"):
        TimmBackbone("test_van", out_indices=indices)


class Plain(nn.Module):
    def __init__(self, num_classes=1000, **kwargs):
        super().__init__()
        self.num_classes = num_classes
        self.fc = nn.Linear(3, num_classes)


@pytest.fixture
def without_features():
    from timm.models import _registry

    before = {key: value.copy() for key, value in vars(_registry).items() if isinstance(value, dict | set)}

    def no_features(pretrained=False, **kwargs):
        return build_model_with_cfg(Plain, "no_features", pretrained, **kwargs)

    no_features.__module__ = __name__
    register_model(no_features)
    yield "no_features"
    for key, value in before.items():
        own = getattr(_registry, key)
        own.clear()
        own.update(value)


def test_model_without_features(without_features):
    with pytest.raises(UserError, match="no_features gives no features, only classes: choose a model whose"):
        TimmBackbone(without_features)


def test_more_frozen_stages_than_there_are():
    with pytest.raises(UserError, match=r"dense\.frozen_stages=5: test_van has 4 stages, so it has to be from -1 to 4"):
        TimmBackbone("test_van", frozen_stages=5)


@pytest.mark.slow
def test_frozen_stages_of_a_model_without_groups():
    with pytest.raises(UserError, match=r"dense\.frozen_stages=1: pit_ti_224 does not say what its stages are"):
        TimmBackbone("pit_ti_224", frozen_stages=1)


@pytest.mark.slow
def test_no_gradient_checkpointing():
    with pytest.raises(UserError, match="coat_lite_tiny has no gradient checkpointing: leave trainer"):
        TimmBackbone("coat_lite_tiny", grad_checkpointing=True)


def test_missing_weights():
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere\.pt"):
        TimmBackbone("resnet10t", pretrained="nowhere.pt")


def test_equal_strides_are_pointed_out(said):
    TimmBackbone("test_vit")
    assert said == ["test_vit has features at strides 16, 16, 16, 16: no pyramid for objects of all sizes."]


def test_images_of_one_size_are_pointed_out(said):
    TimmBackbone("pit_ti_224")
    assert said == ["pit_ti_224 is made for images of one size: others may fail, or need certain multiples."]


@pytest.mark.slow
def test_pyramids_of_any_size_need_no_word(said):
    for name in ("test_van", "swin_tiny_patch4_window7_224"):
        TimmBackbone(name)
    assert said == []
