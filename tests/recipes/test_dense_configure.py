"""From zoo-train's settings to MMEngine's: refused settings, results, and the model of every recipe.

About 25 s; 4 min with the slow ones, which build every recipe's model, and train one of each kind for a step.
"""

import functools
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.messages import UserError
from zoo.recipes import cli, config, tasks

for task in ("detect", "segment", "panoptic"):  # each registers its own data sets
    settings = tasks.load(task, "settings")

from mmengine.dataset import pseudo_collate  # noqa: E402  after mmcv's operators are there
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import DATASETS, PARAM_SCHEDULERS  # noqa: E402

from zoo.recipes.dense import model as models  # noqa: E402
from zoo.recipes.dense import runner  # noqa: E402
from zoo.recipes.dense.backbone import param_groups  # noqa: E402
from zoo.recipes.dense.data import open_data  # noqa: E402
from zoo.recipes.dense.detection_data import DetectionData, DetectionSplit  # noqa: E402
from zoo.recipes.dense.optim import SkipBadLossAmpOptimWrapper, SkipBadLossOptimWrapper  # noqa: E402
from zoo.recipes.dense.panoptic_data import PanopticData, PanopticSplit  # noqa: E402
from zoo.recipes.dense.segmentation_data import (  # noqa: E402
    SegmentationData,
    SegmentationSplit,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# Refused settings.

REFUSED = [
    (
        "detect",
        "dense=upernet",
        r"dense.method='upernet' can't be used with task=detect: it has mask_rcnn, cascade_mask_rcnn, ",
    ),
    ("segment", "dense=mask_rcnn", r"dense.method='mask_rcnn' can't be used with task=segment: it has upernet, "),
    ("detect", "augment.mixup=0.8", r"augment.mixup=0.8 has no effect with task=detect: leave it out"),
    ("detect", "augment.smoothing=0.1", r"augment.smoothing=0.1 has no effect"),
    ("segment", "augment.auto_augment=rand-m9", r"augment.auto_augment=rand-m9 has no effect with task=segment"),
    ("detect", "augment.scale=[0.2,1.0]", r"augment.scale=\[0.2, 1.0\] has no effect"),
    ("detect", "augment.color_jitter=0.4", r"augment.color_jitter=0.4 has no effect"),
    ("detect", "data.img_size=64", r"data.img_size=64 has no effect"),
    ("detect", "schedule.warmup_epochs=2", r"schedule.warmup_epochs=2(.0)? has no effect"),
    ("detect", "schedule.cooldown_epochs=2", r"schedule.cooldown_epochs=2 has no effect"),
    ("detect", "optim.clip_mode=value", r"optim.clip_mode=value has no effect"),
    ("detect", "dense.updates=0", r"dense.updates=0 is not allowed: it has to be 1 or more, or null"),
    ("detect", "dense.warmup_updates=-1", r"dense.warmup_updates=-1 is not allowed: it has to be 0 or more"),
    ("detect", "dense.warmup_factor=0", r"dense.warmup_factor=0(.0)? is not allowed: it has to be above 0, at most 1"),
    ("detect", "dense.warmup_factor=1.5", r"dense.warmup_factor=1.5 is not allowed"),
    ("detect", "dense.backbone_lr=0", r"dense.backbone_lr=0(.0)? is not allowed: it has to be above 0"),
    ("detect", "dense.scales=[]", r"dense.scales=\[\] is not allowed: it has to be a list of numbers, 32 or more"),
    ("detect", "dense.scales=[16]", r"dense.scales=\[16\] is not allowed"),
    ("detect", "dense.max_size=64", r"dense.max_size=64 is not allowed: it has to be no less than the largest of"),
    ("detect", "dense.ratio_range=[2.0,1.0]", r"dense.ratio_range=.* is not allowed: it has to be two rising numbers"),
    ("detect", "dense.ratio_range=[1.0]", r"dense.ratio_range=\[1.0\] is not allowed"),
    ("detect", "dense.crop=[64]", r"dense.crop=\[64\] is not allowed: it has to be two numbers, 32 or more, or null"),
    ("segment", "dense.crop=[16,64]", r"dense.crop=\[16, 64\] is not allowed"),
    ("segment", "dense.detr_crop=true", r"dense.detr_crop=True is not allowed: it has to be false for task=segment"),
    ("detect", "+model_kwargs.in_chans=1", r"model_kwargs.in_chans=1 is not allowed: it has to be 3 for task=detect"),
    ("segment", "+model_kwargs.in_chans=4", r"model_kwargs.in_chans=4 is not allowed: it has to be 3 for task=segment"),
    ("detect", "dense.size_divisor=0", r"dense.size_divisor=0 is not allowed: it has to be 1 or more"),
    ("detect", "schedule.sched=tanh", r"schedule.sched=tanh is not allowed: it has to be cosine, multistep, poly or"),
    ("detect", "trainer.parallel=fsdp", r"trainer.parallel=fsdp is not allowed: it has to be ddp for task=detect"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "override", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_setting_is_refused(compose, task, override, message):
    with pytest.raises(UserError, match=message):
        settings.check(compose(f"task={task}", override))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
@pytest.mark.parametrize("data", ["digit_scenes", "coco", "ade20k", "masks"])
def test_settings_of_every_data_set_are_accepted(compose, task, data):
    settings.check(compose(f"task={task}", f"data={data}"))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("dense=mask_rcnn",), True),
        (("dense=cascade_mask_rcnn",), True),
        (("dense=mask2former",), True),
        (("dense=mask_rcnn", "dense.masks=false"), False),
        (("dense=retinanet",), False),
        (("dense=dino",), False),
    ],
    ids=range(1, 7),
)
def test_methods_that_find_masks(compose, words, found):
    assert settings.finds_masks(compose("task=detect", *words)) is found


@pytest.mark.parametrize(("task", "method"), [("detect", "mask2former"), ("panoptic", "panoptic_fpn")])
def test_methods_that_need_masks(compose, task, method):
    with pytest.raises(UserError, match=rf"dense.masks=false can't be used with dense.method={method}: it needs masks"):
        settings.finds_masks(compose(f"task={task}", f"dense={method}", "dense.masks=false"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("trainer.epochs=3", "trainer.batch_size=4"), (15, 5, 1, 4, 5)),
        (("trainer.epochs=3", "trainer.batch_size=4", "trainer.eval_every=2"), (15, 5, 1, 4, 10)),
        (("trainer.epochs=3", "trainer.batch_size=4", "trainer.eval_every=9"), (15, 5, 1, 4, 15)),
        (("dense.updates=7", "trainer.batch_size=2", "trainer.effective_batch_size=8"), (7, 3, 4, 8, 3)),
        (("dense.updates=2", "trainer.batch_size=5"), (2, 4, 1, 5, 2)),
    ],
    ids=[1, 2, 3, 4, 5],
)
def test_length(compose, words, expected):
    """Updates, updates per epoch, passes and images per update, updates between evaluations, with 18 images."""
    found = settings.run_length(compose("task=detect", "trainer.eval_every=1", *words), 18)
    assert (found.updates, found.per_epoch, found.accumulate, found.batch, found.evaluate_every) == expected


def test_batch_that_can_not_be_reached(compose):
    with pytest.raises(UserError, match=r"trainer.effective_batch_size=6 is not a multiple of 4"):
        settings.run_length(compose("task=detect", "trainer.batch_size=4", "trainer.effective_batch_size=6"), 50)


# Replacements for data sets that are not installed.


def _coco(classes=80, images=117_266):
    names = [f"class {i}" for i in range(classes)]
    split = DetectionSplit(Path("ann.json"), Path("images"), names, [1] * classes, images, 0, True)
    return DetectionData(split, split, names, True)


def _ade(classes=150, images=20_210):
    names = [f"class {i}" for i in range(classes)]
    split = SegmentationSplit(Path("images"), Path("labels"), names, 255, True, images, [1] * classes, 10)
    return SegmentationData(split, split, names, 255, True)


def _panoptic(classes=133, things=80, images=118_287):
    names = [f"class {i}" for i in range(classes)]
    split = PanopticSplit(Path("ann.json"), Path("labels"), Path("images"), names, things, [1] * classes, images)
    return PanopticData(split, split, names, things)


def _settings(cfg, data, device=GPU):
    return runner.runner_config(cfg, data, settings.run_length(cfg, data.train.num_images), Path("work"), device)


def _meta(cfg, classes):
    """The model of `cfg` on the meta device."""
    with torch.device("meta"):
        return models.build_model(cfg, classes, CPU, False)


# Changes through `mm`.


@pytest.mark.slow
def test_mm_changes_the_runner(compose):
    words = ("++mm.val_evaluator.classwise=true", "++mm.train_cfg.val_begin=5", "++mm.custom=[1,2]")
    built = _settings(compose("task=detect", *words), _coco())
    assert built.val_evaluator.classwise is True
    assert built.train_cfg.val_begin == 5
    assert built.custom == [1, 2]


@pytest.mark.slow
def test_mm_changes_the_model(compose):
    cfg = compose("task=detect", "++mm.model.rpn_head.loss_bbox.loss_weight=3.0")
    model = models.model_config(cfg, ["a"], CPU, False)
    assert model.rpn_head.loss_bbox.loss_weight == 3.0
    assert "model" not in _settings(cfg, _coco())


@pytest.mark.slow
def test_mm_that_does_not_fit(compose):
    with pytest.raises(UserError, match=r"mm=.*max_iters.* does not fit the configuration of mmengine"):
        _settings(compose("task=detect", "++mm.train_cfg.max_iters.x.y=1"), _coco())


@pytest.mark.slow
def test_model_that_can_not_be_built(compose):
    cfg = compose("task=detect", "++mm.model.roi_head.bbox_head.type=NoHead")
    with pytest.raises(UserError, match=r"dense.method=mask_rcnn can't be built on test_dinat: .*NoHead"):
        models.build_model(cfg, ["a"], CPU, False)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_refused_on_a_cpu(compose, amp):
    with pytest.raises(UserError, match=rf"trainer.amp={amp} can't be used with task=detect on a CPU: leave it out"):
        _settings(compose("task=detect", f"trainer.amp={amp}"), _coco(), CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_mixed_precision_elsewhere(compose, amp, dtype):
    wrapper = _settings(compose("task=detect", f"trainer.amp={amp}"), _coco()).optim_wrapper
    assert (wrapper.type, wrapper.dtype) == (SkipBadLossAmpOptimWrapper.__name__, dtype)


# Optimizer and schedule.


def _rates(cfg, images, updates):
    """The learning rate of each update from the configured schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.learning_rate(cfg))
    parts = runner._schedule(cfg, settings.run_length(cfg, images))
    schedulers = [PARAM_SCHEDULERS.build(dict(part, optimizer=optimizer)) for part in parts]
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


LR = ("task=detect", "optim.lr=0.1", "trainer.batch_size=2", "schedule.min_lr=0.01", "dense.warmup_factor=0.2")


def _warm(update, length):
    return 0.1 * (0.2 + 0.8 * update / (length - 1))


@pytest.mark.slow
def test_cosine_after_warm_up(compose):
    rates = _rates(compose(*LR, "schedule.sched=cosine", "dense.updates=20", "dense.warmup_updates=5"), 20, 20)
    wanted = [_warm(t, 5) for t in range(5)]
    wanted += [0.01 + 0.09 * (1 + math.cos(math.pi * t / 15)) / 2 for t in range(15)]
    assert rates == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("power", [0.9, 1.0])
def test_polynomial_after_warm_up(compose, power):
    words = ("schedule.sched=poly", f"schedule.decay_rate={power}", "dense.updates=20", "dense.warmup_updates=5")
    wanted = [_warm(t, 5) for t in range(5)] + [0.01 + 0.09 * (1 - t / 14) ** power for t in range(15)]
    assert _rates(compose(*LR, *words), 20, 20) == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 3])
def test_milestones_are_epochs(compose, accumulated):
    words = (
        *("schedule.sched=multistep", "schedule.decay_milestones=[2,4]", "schedule.decay_rate=0.1"),
        *("trainer.epochs=5", "dense.warmup_updates=3", f"trainer.effective_batch_size={2 * accumulated}"),
    )
    epoch = -(-20 // (2 * accumulated))
    wanted = [0.1 * 0.1 ** ((t >= 2 * epoch) + (t >= 4 * epoch)) for t in range(5 * epoch)]
    wanted[:3] = [_warm(t, 3) for t in range(3)]
    assert _rates(compose(*LR, *words), 20, 5 * epoch) == pytest.approx(wanted)


@pytest.mark.slow
def test_constant(compose):
    rates = _rates(compose(*LR, "schedule.sched=constant", "dense.updates=6", "dense.warmup_updates=0"), 20, 6)
    assert rates == [0.1] * 6


@pytest.mark.slow
@pytest.mark.parametrize("sched", ["cosine", "poly", "multistep", "constant"])
def test_warm_up_that_fills_the_training(compose, sched):
    rates = _rates(compose(*LR, f"schedule.sched={sched}", "dense.updates=4", "dense.warmup_updates=100"), 20, 4)
    assert rates == pytest.approx([_warm(t, 4) for t in range(4)])


@pytest.mark.parametrize("updates", [1, 2])
def test_warm_up_of_an_update_or_two_ends(compose, updates):
    words = ("schedule.sched=constant", "dense.updates=4", f"dense.warmup_updates={updates}")
    assert _rates(compose(*LR, *words), 20, 4) == pytest.approx([[], [0.02]][updates - 1] + [0.1] * (5 - updates))


@pytest.mark.slow
def test_default_learning_rate(compose):
    assert settings.learning_rate(compose("task=detect", "optim.lr=null")) == 1e-4


@pytest.fixture(scope="module")
def detector():
    """Small detectors, cached by configuration; read only."""

    @functools.cache
    def build(compose):
        cfg = compose("task=detect")
        return models.build_model(cfg, ["a", "b"], CPU, False)

    return build


def _wrapper(compose, detector, *words):
    cfg = compose("task=detect", *words)
    return build_optim_wrapper(detector(compose), _settings(cfg, _coco(2, 100), CPU).optim_wrapper)


def _by_name(model, wrapper):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.slow
def test_optimizer_is_timms_with_its_settings(compose, detector):
    words = ("optim.lr=0.003", "optim.weight_decay=0.02", "optim.betas=[0.8,0.9]", "optim.eps=1e-6")
    wrapper = _wrapper(compose, detector, *words, "optim.clip_grad=2.5")
    assert isinstance(wrapper, SkipBadLossOptimWrapper)
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    group = wrapper.optimizer.param_groups[0]
    assert (group["lr"], list(group["betas"]), group["eps"]) == (0.003, [0.8, 0.9], 1e-6)
    assert wrapper.clip_grad_kwargs == {"max_norm": 2.5}


@pytest.mark.slow
def test_momentum_reaches_sgd(compose, detector):
    wrapper = _wrapper(compose, detector, "optim=sgd", "optim.momentum=0.7")
    assert type(wrapper.optimizer).__name__ == "SGD"
    assert {group["momentum"] for group in wrapper.optimizer.param_groups} == {0.7}


@pytest.mark.slow
def test_every_parameter_is_trained_once(compose, detector):
    found = _by_name(detector(compose), _wrapper(compose, detector))
    assert found.keys() == {name for name, p in detector(compose).named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_words_exempt_from_weight_decay(compose, detector):
    found = _by_name(
        detector(compose), _wrapper(compose, detector, "dense.no_decay=[norm,bias_table]", "optim.weight_decay=0.02")
    )
    assert all((decay == 0) == ("norm" in name or "bias_table" in name) for name, (_, decay) in found.items())
    assert {decay for _, decay in found.values()} == {0, 0.02}


@pytest.mark.slow
def test_vectors_are_exempt_without_words(compose, detector):
    found = _by_name(detector(compose), _wrapper(compose, detector))
    parameters = dict(detector(compose).named_parameters())
    assert found["roi_head.bbox_head.fc_cls.bias"][1] == 0
    assert found["roi_head.bbox_head.fc_cls.weight"][1] > 0
    assert all(decay == 0 for name, (_, decay) in found.items() if parameters[name].ndim == 1)


@pytest.mark.slow
def test_learning_rate_of_the_backbone(compose, detector):
    found = _by_name(detector(compose), _wrapper(compose, detector, "optim.lr=0.1", "dense.backbone_lr=0.25"))
    assert {lr for name, (lr, _) in found.items() if name.startswith("backbone.")} == {0.025}
    assert {lr for name, (lr, _) in found.items() if not name.startswith("backbone.")} == {0.1}


@pytest.mark.slow
def test_learning_rate_factors(compose, detector):
    words = (
        "optim.lr=0.1",
        "dense.backbone_lr=0.5",
        "++optim.lr_factors={rpn_head:2,rpn_head.rpn_cls.bias:3,stem:0.1}",
    )
    found = _by_name(detector(compose), _wrapper(compose, detector, *words))
    assert {lr for name, (lr, _) in found.items() if name.startswith("roi_head.")} == {0.1}
    assert found["rpn_head.rpn_cls.weight"][0] == pytest.approx(0.2)
    assert found["rpn_head.rpn_cls.bias"][0] == pytest.approx(0.3)
    assert next(lr for name, (lr, _) in found.items() if ".stem" in name) == pytest.approx(0.005)


@pytest.mark.slow
def test_layer_decay_falls_towards_the_image(compose, detector):
    found = _by_name(detector(compose), _wrapper(compose, detector, "optim.lr=0.1", "optim.layer_decay=0.5"))
    assert {lr for name, (lr, _) in found.items() if not name.startswith("backbone.")} == {0.1}
    scales = detector(compose).backbone.layer_scales(0.5)
    for name, scale in scales.items():
        assert found[f"backbone.{name}"][0] == pytest.approx(0.1 * scale)
    stem = next(lr for name, (lr, _) in found.items() if "stem" in name)
    assert stem == min(lr for lr, _ in found.values()) < 0.1


@pytest.mark.slow
def test_unknown_optimizer(compose, detector):
    with pytest.raises(UserError, match=r"the optimizer can't be created from optim=.*nonsense"):
        _wrapper(compose, detector, "optim.opt=nonsense")


# Two recipes, point by point. The numbers are those of the papers and their official configurations.


@pytest.fixture(scope="module")
def dinat(compose):
    """Mask R-CNN with DiNAT-Mini on COCO: configuration, runner's configuration, model's, model."""
    cfg, data = compose("recipe=coco/mask_rcnn_dinat_mini"), _coco()
    model = models.model_config(cfg, data.classes, GPU, False)
    return cfg, _settings(cfg, data), model, _meta(cfg, data.classes)


@pytest.fixture(scope="module")
def cswin(compose):
    """UPerNet with CSWin-Tiny on ADE20K, as above."""
    cfg, data = compose("recipe=ade20k/upernet_cswin_tiny"), _ade()
    model = models.model_config(cfg, data.classes, GPU, False)
    return cfg, _settings(cfg, data), model, _meta(cfg, data.classes)


def _steps(pipeline):
    return {step["type"]: step for step in pipeline}


@pytest.mark.slow
def test_dinat_optimizer(dinat):
    wrapper = dinat[1].optim_wrapper
    assert wrapper.optimizer == {"type": "adamw", "lr": 1e-4, "weight_decay": 0.05, "momentum": 0.9}
    assert wrapper.paramwise_cfg == {
        "layer_decay": None,
        "no_decay": ["norm", "bias_table"],
        "backbone_lr": 1.0,
        "lr_factors": {},
    }
    assert (wrapper.type, wrapper.dtype) == ("SkipBadLossAmpOptimWrapper", "float16")
    assert "clip_grad" not in wrapper


@pytest.mark.slow
def test_dinat_schedule(dinat):
    """16 images per update, 7330 updates per epoch, 36 epochs, a tenth after 27 and 33, 500 updates of warm-up."""
    cfg, settings, _, _ = dinat
    assert cfg.trainer.batch_size * settings.optim_wrapper.accumulative_counts == 16
    assert settings.train_cfg.max_iters == 36 * 7330 * 8
    warm, steps = settings.param_scheduler
    assert (warm.type, warm.begin, warm.end, warm.start_factor) == ("LinearLR", 0, 500, 1e-3)
    assert (steps.type, steps.milestones, steps.gamma) == ("MultiStepLR", [27 * 7330, 33 * 7330], 0.1)


def test_dinat_images(dinat):
    _, settings, model, _ = dinat
    pipeline = _steps(settings.train_dataloader.dataset.pipeline)
    assert pipeline["RandomFlip"]["prob"] == 0.5
    whole, cropped = pipeline["RandomChoice"]["transforms"]
    scales = [(1333, side) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    assert [whole[0]["scales"], cropped[2]["scales"]] == [scales, scales]
    assert cropped[0]["scales"] == [(1333, side) for side in (400, 500, 600)]
    assert (cropped[1]["crop_type"], cropped[1]["crop_size"]) == ("absolute_range", (384, 600))
    assert _steps(settings.val_dataloader.dataset.pipeline)["Resize"]["scale"] == (1333, 800)
    assert settings.val_evaluator.metric == ["bbox", "segm"]
    preprocessor = model.data_preprocessor
    assert preprocessor.mean == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std == pytest.approx([58.395, 57.12, 57.375])
    assert (preprocessor.bgr_to_rgb, preprocessor.pad_size_divisor) == (True, 32)


def test_dinat_backbone(dinat):
    _, _, model, built = dinat
    assert model.backbone.model_kwargs == {
        "dilations": [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
        "drop_path_rate": 0.2,
    }
    assert (model.backbone.frozen_stages, model.backbone.norm_eval) == (-1, False)
    assert _output_norms(built) == [(64, 1e-5), (128, 1e-5), (256, 1e-5), (512, 1e-5)]
    assert built.neck.in_channels == [64, 128, 256, 512]


def test_dinat_heads(dinat):
    _, _, model, built = dinat
    assert (model.type, model.neck.type, model.roi_head.type) == ("MaskRCNNOfViews", "FPN", "StandardRoIHead")
    assert built.roi_head.bbox_head.fc_cls.out_features == 81
    assert built.roi_head.mask_head.conv_logits.out_channels == 80


def test_dinat_weight_decay(dinat):
    assert _undecayed(dinat[0], dinat[3]) == {
        name for name, _ in dinat[3].named_parameters() if "norm" in name or "bias_table" in name
    }


@pytest.mark.slow
def test_cswin_optimizer(cswin):
    wrapper = cswin[1].optim_wrapper
    assert wrapper.optimizer == {"type": "adamw", "lr": 6e-5, "weight_decay": 0.01, "momentum": 0.9}
    assert wrapper.paramwise_cfg == {"layer_decay": None, "no_decay": ["norm"], "backbone_lr": 1.0, "lr_factors": {}}
    assert wrapper.type == "SkipBadLossOptimWrapper"
    assert "clip_grad" not in wrapper


@pytest.mark.slow
def test_cswin_schedule(cswin):
    """16 images per update, 160,000 updates, linear decay to nothing after 1500 of warm-up."""
    cfg, settings, _, _ = cswin
    assert cfg.trainer.batch_size * settings.optim_wrapper.accumulative_counts == 16
    assert settings.train_cfg.max_iters == 160_000 * 8
    warm, poly = settings.param_scheduler
    assert (warm.type, warm.begin, warm.end, warm.start_factor) == ("LinearLR", 0, 1500, 1e-6)
    assert (poly.type, poly.begin, poly.end, poly.power, poly.eta_min) == ("PolyLR", 1500, 160_000, 1.0, 0.0)


@pytest.mark.slow
def test_cswin_images(cswin):
    _, settings, model, _ = cswin
    pipeline = _steps(settings.train_dataloader.dataset.pipeline)
    assert (pipeline["RandomResize"]["scale"], pipeline["RandomResize"]["ratio_range"]) == ((2048, 512), (0.5, 2.0))
    assert (pipeline["RandomCrop"]["crop_size"], pipeline["RandomCrop"]["cat_max_ratio"]) == ((512, 512), 0.75)
    assert pipeline["RandomFlip"]["prob"] == 0.5
    assert "PhotoMetricDistortion" in pipeline
    test = _steps(settings.val_dataloader.dataset.pipeline)
    assert test["Resize"]["scale"] == (2048, 512)
    assert "ResizeToMultiple" not in test
    assert settings.val_dataloader.batch_size == 1
    assert settings.train_dataloader.dataset.reduce_zero_label is True
    preprocessor = model.data_preprocessor
    assert preprocessor.mean == pytest.approx([123.675, 116.28, 103.53])
    assert (preprocessor["size"], preprocessor.seg_pad_val, preprocessor.test_cfg) == (
        (512, 512),
        255,
        {"size_divisor": 1},
    )


@pytest.mark.slow
def test_cswin_backbone(cswin):
    _, _, model, built = cswin
    assert model.backbone.model_kwargs == {"drop_path_rate": 0.3}
    assert _output_norms(built) == [(64, 1e-5), (128, 1e-5), (256, 1e-5), (512, 1e-5)]


@pytest.mark.slow
def test_cswin_heads(cswin):
    _, _, model, built = cswin
    assert (model.decode_head.type, model.auxiliary_head.type) == ("UPerHead", "FCNHead")
    assert built.decode_head.in_channels == [64, 128, 256, 512]
    assert built.auxiliary_head.in_channels == 256
    assert (built.decode_head.conv_seg.out_channels, built.auxiliary_head.conv_seg.out_channels) == (150, 150)
    assert (model.decode_head.channels, model.auxiliary_head.loss_decode.loss_weight) == (512, 0.4)


@pytest.mark.slow
def test_cswin_weight_decay(cswin):
    assert _undecayed(cswin[0], cswin[3]) == {name for name, _ in cswin[3].named_parameters() if "norm" in name}


def _output_norms(model):
    norms = [module for name, module in model.backbone.named_modules() if re.search(r"output_norms\.\d$", name)]
    assert all(isinstance(norm, nn.LayerNorm) for norm in norms)
    return [(norm.normalized_shape[0], norm.eps) for norm in norms]


def _undecayed(cfg, model):
    groups = param_groups(model, 1.0, 1.0, None, list(cfg.dense.no_decay))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for group in groups if not group["weight_decay"] for parameter in group["params"]}


# Every recipe.

RECIPES = sorted(
    f"{path.parent.name}/{path.stem}"
    for path in (Path(cli.CONF) / "recipe").glob("*/*.yaml")
    if path.parent.name != "imagenet"
)

# Published parameters in millions, of CSWin's detectors and segmentors. (Its table has 60 for UPerNet with CSWin-Tiny,
# 5 less than with Small, whose backbone has 12 more.)
PUBLISHED = {
    **{"coco/mask_rcnn_cswin_tiny": 42, "coco/mask_rcnn_cswin_small": 54, "coco/mask_rcnn_cswin_base": 97},
    **{"coco/cascade_mask_rcnn_cswin_tiny": 80, "coco/cascade_mask_rcnn_cswin_small": 92},
    **{"coco/cascade_mask_rcnn_cswin_base": 135, "ade20k/semantic_fpn_cswin_tiny": 26},
    **{"ade20k/semantic_fpn_cswin_small": 39, "ade20k/semantic_fpn_cswin_base": 81},
    **{"ade20k/upernet_cswin_small": 65, "ade20k/upernet_cswin_base": 109, "ade20k/upernet_cswin_large": 208},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_its_model(compose, recipe):
    """The full model on the meta device."""
    cfg = compose(f"recipe={recipe}")
    config.check(cfg)
    settings.check(cfg)
    data = {"detect": _coco, "segment": _ade, "panoptic": _panoptic}[cfg.task]()
    if cfg.task == "panoptic":
        cfg.dense.num_things = data.num_things
    model = _meta(cfg, data.classes)
    assert _settings(cfg, data).train_cfg.max_iters > 10_000
    heads = [module for name, module in model.named_modules() if re.search("(bbox|mask|decode)_head", name)]
    assert {head.num_classes for head in heads if hasattr(head, "num_classes")} <= {len(data.classes)}
    if recipe in PUBLISHED:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[recipe], abs=0.7)


@pytest.fixture(scope="module")
def scenes_data(compose, digit_scenes, panoptic_digit_scenes):
    """The digit scenes as data of a task."""

    @functools.cache
    def get(task):
        root = panoptic_digit_scenes if task == "panoptic" else digit_scenes
        return open_data(compose(f"task={task}", f"data.root={root}"))

    return get


MODELS = [name for family in zoo.FAMILIES for name in timm.list_models(module=family)]


def _one_of_each() -> list:
    """The first recipe of each task, method and family; the first of each method is not left to `make test-all`."""
    found: dict[tuple, str] = {}
    for recipe in RECIPES:
        folder, _, name = recipe.partition("/")
        method = next(method for method in (*config.DETECTORS, *config.SEGMENTORS) if name.startswith(method))
        model = max((model for model in MODELS if f"_{model}" in name), key=len, default=None)
        family = model and timm.model_entrypoint(model).__module__
        found.setdefault((folder, method, family), recipe)
    first = {kind[:2]: recipe for kind, recipe in reversed(found.items())}.values()
    return [
        pytest.param(recipe, marks=pytest.mark.slow if recipe in first else pytest.mark.long)
        for recipe in found.values()
    ]


@pytest.mark.parametrize("recipe", _one_of_each())
def test_recipe_trains_and_predicts(compose, scenes_data, recipe, tmp_path):
    """One update and one prediction of the small version."""
    full = compose(f"recipe={recipe}")
    small = timm.list_models("test_*", module=timm.model_entrypoint(full.model.partition(".")[0]).__module__[4:])[0]
    size = 96 if full.dense.method == "dino" else 64  # its encoder needs more positions than queries
    words = [
        *(f"recipe={recipe}", f"model={small}", "pretrained=false"),
        *("trainer.batch_size=2", "trainer.effective_batch_size=2", "trainer.amp=none", "data.num_workers=0"),
        *("dense.small=true", f"dense.scales=[{size}]", f"dense.max_size={size}", "dense.size_divisor=32"),
    ]
    if full.dense.crop:
        words.append("dense.crop=[64,64]")
    cfg, data = compose(*words), scenes_data(full.task)
    if cfg.task == "panoptic":
        cfg.dense.num_things = data.num_things
    cfg.model_kwargs = {key: rate for key, rate in full.model_kwargs.items() if key == "drop_path_rate"}  # of any depth
    configuration = _settings(cfg, data, CPU)
    model = models.build_model(cfg, data.classes, CPU, False)
    model.init_weights()  # as the Runner does: DINO's level embedding is uninitialized before
    wrapper = build_optim_wrapper(model, configuration.optim_wrapper)
    train = DATASETS.build(configuration.train_dataloader.dataset)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train().train_step(pseudo_collate([train[0], train[1]]), wrapper)
    assert losses["loss"].isfinite()
    assert wrapper.stepped
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.startswith("backbone.") for name in changed)
    assert any(not name.startswith("backbone.") for name in changed)
    val = DATASETS.build(configuration.val_dataloader.dataset)
    with torch.no_grad():
        (found,) = model.eval().test_step(pseudo_collate([val[0]]))
    if cfg.task == "segment":
        assert found.pred_sem_seg.data.shape == (1, 128, 128)
        assert found.pred_sem_seg.data.max() < 11
    else:
        assert found.pred_instances.scores.isfinite().all()
        assert ("pred_panoptic_seg" in found) == (cfg.task == "panoptic")
        assert ("masks" in found.pred_instances) == settings.finds_masks(cfg)
