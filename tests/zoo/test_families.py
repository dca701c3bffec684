"""What every family guarantees, on `test_<family>`: timm's methods, any size, export. 10 s, slow ones 3 min."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from torch.nn import functional as F

import zoo
from zoo.families import feature_side
from zoo.key_maps import is_classifier

MODELS = [name for name in timm.list_models("test_*") if timm.model_entrypoint(name).__module__.startswith("zoo.")]

pytestmark = pytest.mark.parametrize("name", MODELS)


def smallest_open(name):
    """The smallest side that torch.export can leave open; below it the last map is one token high, another case."""
    return next(side for side in range(32, 96) if feature_side(name, side, 32) > 1)


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(batch=2, height=64, width=64, in_chans=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, in_chans, height, width, generator=generator)


def reload(name, state_dict, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict}, **kwargs).eval()


def train_step(model, x):
    model(x).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_model_is_small_and_deep_enough(name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert timm.model_entrypoint(name).__module__.removeprefix("zoo.") in zoo.FAMILIES


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (75, 50)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size(name, size):
    x = images(2, *size)
    assert build(name)(x).shape == (2, 1000)
    backbone = build(name, features_only=True)
    for feature, channels, reduction in zip(
        backbone(x), backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, *(feature_side(name, side, reduction) for side in size))


@torch.no_grad()
def test_images_of_a_batch_are_independent(name):
    model, x = build(name), images(2, 48, 64)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


@torch.no_grad()
def test_parts_of_the_forward_agree(name):
    model, x = build(name), images()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx"])
def test_feature_extractors_agree(name, feature_cls):
    model, x = build(name), images(1, 70, 64)
    want = model.forward_intermediates(x, intermediates_only=True)
    backbone = reload(name, model.state_dict(), features_only=True, feature_cls=feature_cls)
    for got, expected in zip(backbone(x), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
@torch.no_grad()
def test_chosen_features_of_a_full_checkpoint(name):
    model, x = build(name), images(1)
    want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for feature_cls in ("list", "getter"):
        backbone = reload(name, model.state_dict(), features_only=True, feature_cls=feature_cls, out_indices=(0, 2))
        for got, expected in zip(backbone(x), want, strict=True):
            torch.testing.assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruned_model_ends_at_the_feature(name, index):
    model, x = build(name), images(1)
    want = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
    model.prune_intermediate_layers([index], prune_norm=True)
    torch.testing.assert_close(model.forward_features(x), want)
    assert model(x).shape[1] == model.num_features == want.shape[1]


@torch.no_grad()
def test_classifier_can_be_reset(name):
    model, x = build(name), images()
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    side = feature_side(name, 64, model.feature_info[-1]["reduction"])
    assert model(x).shape == (2, model.num_features, side, side)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("source", ["state_dict", "file"])
def test_checkpoint_loads_with_other_classes(name, num_classes, source, tmp_path):
    model, x = build(name), images()
    overlay = {"state_dict": model.state_dict()}
    if source == "file":
        torch.save(model.state_dict(), tmp_path / "model.pth")
        overlay = {"file": str(tmp_path / "model.pth")}
    tuned = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes).eval()
    assert tuned(x).shape == (2, num_classes or model.num_features)
    torch.testing.assert_close(tuned.forward_features(x), model.forward_features(x))


@pytest.mark.slow
@torch.no_grad()
def test_checkpoint_loads_with_other_channels(name):
    model, x = build(name), images(in_chans=1)
    gray = reload(name, model.state_dict(), in_chans=1)
    torch.testing.assert_close(gray(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "coarse"])
def test_layer_groups_cover_all_parameters_in_order(name, coarse):
    model = build(name)
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    order = [groups[key] for key, _ in model.named_parameters()]
    assert sorted(set(order)) == list(range(max(order) + 1))
    assert order[0] == 0
    head = {group for key, group in groups.items() if is_classifier(key, model.pretrained_cfg["classifier"])}
    assert head == {max(order)}
    assert list(dict.fromkeys(order)) == sorted(set(order))  # named_parameters runs from the stem to the classifier


def test_every_parameter_gets_a_gradient(name):
    model = build(name).train()
    assert not [key for key, grad in train_step(model, images()).items() if grad is None]


@pytest.mark.slow
def test_gradient_checkpointing_keeps_gradients(name):
    model, x = build(name).train(), images()
    want = train_step(model, x)
    model.zero_grad()
    model.set_grad_checkpointing()
    got = train_step(model, x)
    assert all(torch.allclose(got[key], grad, atol=1e-6) for key, grad in want.items())


def test_parameters_can_be_made_again_on_another_device(name):
    model = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    assert model(images()).isfinite().all()


@torch.no_grad()
def test_channels_last(name):
    model, x = build(name), images()
    want = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_is_finite(name, dtype):
    model = build(name).train()
    with torch.autocast("cpu", dtype):
        logits = model(images())
    F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"\(3, 64, 64\); expected \(batch, 3, height, width\)"),
        ((1, 4, 64, 64), r"\(1, 4, 64, 64\); expected \(batch, 3,"),
        ((1, 3, 64, 31), r"64 x 31 pixels; enlarge or pad them to at least 32 x 32"),
    ],
    ids=["dims", "channels", "size"],
)
@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])
def test_wrong_images_are_named(name, shape, message, features_only):
    with pytest.raises(ValueError, match=message):
        build(name, features_only=features_only)(torch.zeros(shape))


@pytest.mark.parametrize("norm", [False, True])
def test_only_nchw_intermediates(name, norm):
    with pytest.raises(ValueError, match="NCHW"):
        build(name).forward_intermediates(images(), norm=norm, output_fmt="NLC")


@pytest.fixture(scope="module")
def parallel(request, tmp_path_factory):
    """The results of two processes, by model, for the tests that need them: see parallel.py."""
    tests = (item for item in request.session.items if "parallel" in getattr(item, "fixturenames", ()))
    names = sorted({test.callspec.params["name"] for test in tests})
    results, script = tmp_path_factory.mktemp("parallel") / "results.json", Path(__file__).with_name("parallel.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", script, results, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads(results.read_text())


@pytest.mark.slow
def test_ddp_gradients_are_those_of_one_process(name, parallel):
    assert parallel[name]["ddp"] == pytest.approx(0, abs=1e-9)
    assert parallel[name]["training"]


@pytest.mark.slow
def test_fsdp_weights_are_those_of_one_process(name, parallel):
    assert parallel[name]["fsdp"] == pytest.approx(0, abs=1e-9)
    assert parallel[name]["moved"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_model_agrees(name, training):
    torch._dynamo.reset()
    model, x = build(name).train(training), images()
    # gradients of a mean square of random logits are tiny; compare outputs and gradients at their own scale
    exact = train_step(copy.deepcopy(model).double(), x.double())
    want_grads = train_step(model, x)
    model.zero_grad()
    with torch.no_grad():
        want = model(x)
    compiled = torch.compile(model, fullgraph=True)
    got_grads = {key.removeprefix("_orig_mod."): grad for key, grad in train_step(compiled, x).items()}
    torch.testing.assert_close(compiled(x), want, rtol=1e-3, atol=1e-4)
    largest = max(grad.abs().max().item() for grad in want_grads.values())
    for key, grad in want_grads.items():
        # batch norms of few values enlarge rounding errors, which some gradients consist of
        rounding = max(1e-7, 1e-5 * largest, 5 * (grad - exact[key]).abs().max().item())
        torch.testing.assert_close(got_grads[key], grad, rtol=1e-2, atol=1e-3 * grad.abs().max().item() + rounding)


@torch.no_grad()
@pytest.mark.slow
def test_exported_program_takes_any_batch_and_size(name):
    """ONNX files are tested with zoo-export, which writes them."""
    # torch.export treats a side of 1 as another case, and 32 pixels end as 1 at stride 32
    model, dim, least = build(name), torch.export.Dim, smallest_open(name)
    shapes = {0: dim("batch", max=64), 2: dim("height", min=least, max=4096), 3: dim("width", min=least, max=4096)}
    program = torch.export.export(model, (images(2, 64, 96),), dynamic_shapes=(shapes,)).module()
    for x in (images(1, max(48, least), least), images(3, 65, 130)):
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize(
    "features_only", [False, pytest.param(True, marks=pytest.mark.long)], ids=["logits", "features"]
)
def test_traced_model_agrees_on_any_batch_of_its_size(name, features_only):
    model = build(name, features_only=features_only)
    traced = torch.jit.trace(model, images(2, 64, 97))
    for x in (images(2, 64, 97).flip(0), images(3, 64, 97)):
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
def test_traced_model_refuses_another_size_or_agrees(name):
    model, x = build(name), images(2, 128, 97)
    traced = torch.jit.trace(model, images(2, 64, 97), check_trace=False)
    try:
        got = traced(x)
    except RuntimeError:
        return
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)  # a model of convolutions has nothing to refuse


def test_batch_of_no_images(name):
    model = build(name, num_classes=5)
    logits = model(images(0))
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


@torch.no_grad()
def test_batch_of_no_images_in_inference(name):
    assert build(name, num_classes=5)(images(0)).shape == (0, 5)
