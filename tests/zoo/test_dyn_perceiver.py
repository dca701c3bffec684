"""Dynamic Perceiver's exits, networks, latents, arguments and initialisation. 5 s, slow ones 20 s."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import zoo
from zoo import families
from zoo.dyn_perceiver import VARIANTS, Attention, DynPerceiver, Widen
from zoo.exits import exit_costs

from . import golden
from .attended import check_keys, patterns, product
from .test_parity import multiply_adds

REGNETY, RESNET, MOBILENET = (name for name in VARIANTS if name.startswith("dyn"))


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_dyn_perceiver", **{"num_classes": 5, **kwargs}).eval()


def images(batch=3, side=64):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_every_variant_is_registered():
    assert set(timm.list_models(module="dyn_perceiver")) == set(VARIANTS)
    assert zoo.dyn_perceiver.DynPerceiver is DynPerceiver


# ---- exits


@pytest.mark.slow
@torch.no_grad()
def test_all_exits_are_official():
    record = golden.read(REGNETY)
    overlay = {"state_dict": golden.official_weights(REGNETY, record)}
    model = timm.create_model(REGNETY, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64).eval()
    for prefix in ("", "second_"):
        exits = list(model.forward_exits(golden.image(**record[f"{prefix}input"])))
        for logits, want in zip(exits, record[f"{prefix}exit_logits"], strict=True):
            assert golden.difference(logits, want) < 1e-6


@torch.no_grad()
def test_last_exit_is_the_models_answer():
    model = build()
    exits = list(model.forward_exits(images()))
    assert [tuple(logits.shape) for logits in exits] == [(3, 5)] * model.num_exits
    torch.testing.assert_close(exits[-1], model(images()))


@torch.no_grad()
def test_exits_in_training_are_those_of_the_generator():
    model = build()
    want = list(model.forward_exits(images()))
    model.head.all_exits = model.head.training = True  # the classifiers alone, since batch norm differs in training
    for module in model.head.modules():
        module.training = module is model.head
    for logits, expected in zip(model(images()), want, strict=True):
        torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_images_that_go_on_are_chosen_after_each_exit():
    model = build()
    want = list(model.forward_exits(images()))
    exits = model.forward_exits(images())
    assert torch.equal(next(exits), want[0])
    torch.testing.assert_close(exits.send(torch.tensor([2, 0])), want[1][[2, 0]])
    torch.testing.assert_close(exits.send(torch.tensor([1])), want[2][[0]])
    torch.testing.assert_close(next(exits), want[3][[0]])


@torch.no_grad()
def test_nothing_is_computed_before_it_is_asked_for():
    model, ran = build(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    exits = model.forward_exits(images())
    assert not ran
    next(exits)
    assert "stages.2.latent_blocks.0" in ran
    assert not any(name.startswith(("stages.2.blocks", "stages.3")) for name in ran)
    next(exits)
    assert "stages.3.latent_blocks.0" in ran
    assert not any(name.startswith("stages.3.blocks") for name in ran)
    next(exits)
    assert "stages.3.blocks.1" in ran
    assert not any(name.startswith("stages.3.write") for name in ran)
    next(exits)
    assert "stages.3.write" in ran


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"global_pool": "ep"}], ids=["no classes", "probing"])
def test_model_without_their_classifiers_has_no_exits(kwargs):
    model = build(**kwargs)
    assert model.num_exits == 1
    for call in (lambda: next(model.forward_exits(images())), model.set_exit_training):
        with pytest.raises(ValueError, match=r"has no exits: create it with num_classes and global_pool='avg'"):
            call()


def test_exit_training_survives_another_number_of_classes():
    model = build()
    model.set_exit_training()
    model.reset_classifier(7)
    assert [tuple(logits.shape) for logits in model.train()(images())] == [(3, 7)] * 4
    assert model.eval()(images()).shape == (3, 7)
    model.set_exit_training(False)
    assert model.train()(images()).shape == (3, 7)


def test_classifier_of_the_map_has_zero_gradient_in_ordinary_training():
    """Distributed training would wait for a gradient that is missing."""
    model = build().train()
    model(images()).square().mean().backward()
    assert model.head.plain.weight.grad.eq(0).all()
    assert model.head.early.weight.grad.abs().sum() > 0  # through its logits, which feed the next exit


def test_exits_learn_by_their_own_loss():
    model = build().train()
    model.set_exit_training()
    for number, logits in enumerate(model(images())):
        model.zero_grad()
        logits.square().mean().backward(retain_graph=True)
        grads = [model.head.early.weight, model.head.late.weight, model.head.plain.weight, model.head.merged[1].weight]
        found = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in grads]
        assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]][number]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"), [(REGNETY, [0.459, 1.065, 1.228, 1.298]), (MOBILENET, [0.098, 0.182, 0.207, 0.266])]
)
def test_costs_of_exits_are_near_those_of_the_official_count(name, billions):
    costs = exit_costs(timm.create_model(name, device="meta"), (3, 224, 224))
    assert [cost / 1e9 for cost in costs] == pytest.approx(billions, rel=0.03)


@pytest.mark.slow
@torch.no_grad()
def test_multiply_adds_are_those_of_the_last_exit():
    for name, billions in ((REGNETY, 1.298), (RESNET, 1.190), (MOBILENET, 0.266)):
        assert multiply_adds(name) == pytest.approx(billions, rel=0.03)


# ---- parts


@torch.no_grad()
def test_attention_is_the_papers():
    torch.manual_seed(0)
    module = Attention(12, num_heads=2, context_dim=6, inner_dim=8, positions=9, dtype=torch.float64)
    module.reset_parameters()
    x, context = torch.randn(2, 4, 5, 12, dtype=torch.float64), torch.randn(2, 3, 3, 6, dtype=torch.float64)
    y = F.layer_norm(context, (6,), module.norm.weight, module.norm.bias)
    query, key, value = (
        module.q(x).flatten(1, 2),
        module.k(y).flatten(1, 2) + module.pos_embed,
        module.v(y).flatten(1, 2),
    )
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (query[..., head] @ key[..., head].mT / math.sqrt(4)).softmax(-1)
        heads.append(weights @ value[..., head])
    torch.testing.assert_close(module(x, context), module.proj(torch.cat(heads, -1)).view(2, 4, 5, 12))


@torch.no_grad()
def test_latents_are_mixed_before_they_are_widened():
    torch.manual_seed(0)
    module, x = Widen(8, 4, 6, dtype=torch.float64), torch.randn(2, 1, 8, 4, dtype=torch.float64)
    mixed = module.mix(module.mix_norm(x[:, 0].mT)).mT
    torch.testing.assert_close(module(x)[:, 0], module.expand(module.expand_norm(mixed)))
    assert module(x).shape == (2, 1, 4, 6)


@pytest.mark.slow
def test_features_of_each_network_have_its_strides():
    for name, strides in ((REGNETY, [4, 8, 16, 32]), (RESNET, [4, 8, 16, 32]), (MOBILENET, [8, 16, 32, 32])):
        model = timm.create_model(name, features_only=True, device="meta")
        assert model.feature_info.reduction() == strides
        features = model(torch.empty(1, 3, 97, 130, device="meta"))
        want = [(dim, -(-97 // s), -(-130 // s)) for dim, s in zip(VARIANTS[name]["embed_dims"], strides, strict=True)]
        assert [tuple(feature.shape[1:]) for feature in features] == want


@pytest.mark.slow
@pytest.mark.parametrize("name", [RESNET, MOBILENET])
@torch.no_grad()
def test_other_networks_run_and_are_trained(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_rate=0.2, drop_path_rate=0.1, latent_depths=(1, 1, 1, 1))
    model.set_exit_training()
    with torch.enable_grad():
        sum(logits.square().mean() for logits in model.train()(images(2))).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(list(model.forward_exits(images()))[-1], model(images()))


@pytest.mark.parametrize(("name", "eps"), [(REGNETY, 1e-5), (RESNET, 1e-5), (MOBILENET, 1e-3)])
def test_epsilons_are_official(name, eps):
    model = timm.create_model(name, device="meta")
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {eps}
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm1d)} == {1e-5}


def test_initialisation_is_official():
    model = build(stem_dim=64, embed_dims=(64, 64, 64, 64), num_latents=256)
    assert model.stem.latent.std().item() == pytest.approx(0.02, rel=0.05)
    conv = model.stages[1].blocks[1].conv1.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert all(stage.read.block.attn.pos_embed.eq(0).all() for stage in model.stages)
    layer = model.stages[1].latent_blocks[0].attn.q  # PyTorch's own
    assert layer.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.02)


def is_uniform(values, bound):
    """Whether there are some hundred values, and whether they fill the range from -bound to bound."""
    return values.abs().max() <= bound and values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_initialisation_of_regnety_is_torchvisions():
    model = timm.create_model(REGNETY, latent_depths=(1, 1, 1, 1))
    excitations = [block.se for stage in model.stages for block in stage.blocks]
    for name in ("fc1", "fc2"):
        convs = [getattr(module, name) for module in excitations]
        biases = torch.cat([conv.bias * math.sqrt(conv.in_channels) for conv in convs])
        assert is_uniform(biases, 1), name
        weights = torch.cat([conv.weight.flatten() * math.sqrt(conv.out_channels / 2) for conv in convs])
        assert weights.std().item() == pytest.approx(1, rel=0.02), name


@pytest.mark.parametrize(("name", "torchvisions"), [(REGNETY, True), (RESNET, False), (MOBILENET, False)])
def test_third_classifier_begins_small_after_regnety_only(name, torchvisions):
    model = timm.create_model(name, latent_depths=(1, 1, 1, 1))
    for _ in range(2):  # at first, and after a reset
        head = model.head
        if torchvisions:
            assert head.plain.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert head.plain.bias.eq(0).all()
        else:
            layer = head.plain[0] if name == MOBILENET else head.plain
            assert is_uniform(layer.weight.detach(), layer.in_features**-0.5)
            assert is_uniform(layer.bias.detach(), layer.in_features**-0.5)
        assert is_uniform(head.early.weight.detach(), head.early.in_features**-0.5)
        assert is_uniform(head.early.bias.detach(), head.early.in_features**-0.5)
        model.reset_classifier(300)


@pytest.mark.parametrize("name", [RESNET, MOBILENET])
def test_biases_of_other_networks_begin_with_zeros(name):
    """MobileNetV3's squeeze and excitation has them; ResNet has none."""
    model = timm.create_model(name, latent_depths=(1, 1, 1, 1))
    convs = [
        module
        for part in (model.stem, *(stage.blocks for stage in model.stages))
        for module in part.modules()
        if isinstance(module, nn.Conv2d) and module.bias is not None
    ]
    assert bool(convs) == (name == MOBILENET)
    assert all(conv.bias.eq(0).all() for conv in convs)


def test_bottlenecks_of_resnet_begin_as_their_shortcuts():
    """As in the official code, the last norm of each has the weight 0."""
    model = timm.create_model(RESNET, latent_depths=(1, 1, 1, 1))
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all(block.bn3.weight.eq(0).all() and block.bn2.weight.eq(1).all() for block in blocks)


@pytest.mark.parametrize(("hidden", "dropped"), [(None, [2]), (32, [2, 3])], ids=["linear", "hidden"])
def test_dropout_is_that_of_the_official_classifiers(hidden, dropped):
    """Of what the third exit reads; with hidden channels, of those, which the last exit has, too."""
    head = build(hidden_dim=hidden, drop_rate=0.5).head
    for module in head.modules():
        module.training = isinstance(module, nn.Dropout)
    head.training = head.all_exits = True
    x = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(2))
    one, other = head(x), head(x)
    assert [number for number in range(4) if not torch.equal(one[number], other[number])] == dropped


@torch.no_grad()
def test_dropout_follows_the_head():
    model = build(drop_rate=0.5)
    assert model.head_drop.p == 0
    model.reset_classifier(5, "ep")
    assert model.head_drop.p == 0.5


def test_drop_path_grows_linearly_over_all_blocks():
    model = build(drop_path_rate=0.7)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cnn": "vgg"}, "cnn='vgg'; it has to be one of 'regnety', 'resnet', 'mobilenetv3'"),
        ({"cnn": "mobilenetv3"}, r"embed_dims=\(16, 32, 48, 64\).*cnn='mobilenetv3' has stem_dim=24"),
        ({"embed_dims": (16, 32, 40, 64)}, r"\(16, 32, 40, 64\).*multiples of group_width=16"),
        ({"cnn": "resnet", "embed_dims": (16, 32, 50, 64)}, "multiples of 4"),
        ({"num_latents": 12}, "num_latents=12; it has to be a multiple of 8, since each of 4 stages has half as many"),
        ({"num_heads": (1, 3, 2, 2)}, r"num_heads=\(1, 3, 2, 2\) for latents of 16, 16, 32, 48 channels"),
        ({"num_heads": 2}, "num_heads=2; give a list"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 for 16 channels, which leaves no hidden channels"),
        ({"hidden_dim": 0}, "hidden_dim=0; it has to be a whole number from 1"),
    ],
    ids=["cnn", "mobilenet", "groups", "resnet", "latents", "heads", "one number", "mlp_ratio", "hidden"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dyn_perceiver", **kwargs)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_prediction_changes_no_argument(task):
    assert families.dense_kwargs(REGNETY, task) == {}


def test_keys_are_all_tokens():
    def keys(site, token, size):
        return [product(*map(range, size))]

    check_keys("test_dyn_perceiver", keys)


def test_pattern():
    _, got = patterns("dyn_perceiver")
    assert got["Perceiver"] == [product(range(28), range(28))]
