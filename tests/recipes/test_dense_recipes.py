"""The recipes for COCO and ADE20K against what the papers and their code say. About 8 s, 30 s with the slow ones.

The tables below were written from the papers' figures and configurations, not from the YAML files.
"""

import functools
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.nat import block_dilations
from zoo.recipes import cli, config

ROOT = Path(cli.CONF) / "recipe"
DETECT = sorted(f"coco/{path.stem}" for path in (ROOT / "coco").glob("*.yaml"))
SEGMENT = sorted(f"ade20k/{path.stem}" for path in (ROOT / "ade20k").glob("*.yaml"))
GENERIC = [
    *("coco/mask_rcnn_1x", "coco/mask_rcnn_3x", "coco/cascade_mask_rcnn_3x", "coco/retinanet_1x", "coco/dino_1x"),
    *("coco/mask2former_50e", "ade20k/upernet_160k", "ade20k/semantic_fpn_80k", "ade20k/mask2former_160k"),
]

# Drop path and the published figures: box/mask AP, or mIoU at one/several scales; "-" where there is none.
REPORTED = """
coco/mask_rcnn_nat_: mini .2 46.5/41.7, tiny .2 47.7/42.6, small .35 48.4/43.2
coco/cascade_mask_rcnn_nat_: mini .2 50.3/43.6, tiny .3 51.4/44.5, small .3 52.0/44.9, base .5 52.3/45.1
ade20k/upernet_nat_: mini .2 45.1/46.4, tiny .3 47.1/48.4, small .5 48.0/49.5, base .5 48.5/49.7
coco/mask_rcnn_dinat_: mini .2 47.2/42.5, tiny .2 48.6/43.5, small .35 49.3/44.0
coco/cascade_mask_rcnn_dinat_: mini .2 51.2/44.4, tiny .3 52.2/45.1, small .5 52.9/45.8, base .6 53.4/46.2
coco/cascade_mask_rcnn_dinat_: large .6 55.3/47.8
ade20k/upernet_dinat_: mini .2 45.8/47.2, tiny .3 47.8/48.8, small .5 48.9/49.9, base .5 49.6/50.4, large .3 54.0/54.9
coco/mask2former_dinat_: large .3 -/50.8
ade20k/mask2former_dinat_: large .3 -/58.1
coco/mask_rcnn_dinat_s_: tiny .2 46.6/42.1, small .35 48.6/43.5
coco/cascade_mask_rcnn_dinat_s_: tiny .3 51.0/44.1, small .5 52.3/45.2, base .6 52.6/45.3, large .6 54.8/47.2
ade20k/upernet_dinat_s_: tiny .3 46.0/47.4, small .3 48.6/49.9, base .3 49.4/50.2, large .3 53.4/54.6
coco/mask_rcnn_cswin_: tiny .2 49.0/43.6, small .4 50.0/44.5, base .5 50.8/44.9
coco/mask_rcnn_1x_cswin_: tiny .2 46.7/42.2, small .4 47.9/43.2, base .5 48.7/43.9
coco/cascade_mask_rcnn_cswin_: tiny .2 52.5/45.3, small .4 53.7/46.4, base .5 53.9/46.4
ade20k/upernet_cswin_: tiny .3 49.3/50.7, small .4 50.4/51.5, base .6 51.1/52.2, large .6 53.4/55.7
ade20k/semantic_fpn_cswin_: tiny .3 48.2/-, small .4 49.2/-, base .6 49.9/-
coco/mask_rcnn_biformer_: small .2 47.8/43.2, base .3 48.6/43.7
coco/retinanet_biformer_: small .2 45.9/-, base .3 47.1/-
ade20k/upernet_biformer_: small .3 49.8/50.8, base .4 51.0/51.7
ade20k/semantic_fpn_biformer_: small .15 48.9/-, base .3 49.9/-
coco/mask_rcnn_gc_vit_: tiny .2 47.9/43.2
coco/cascade_mask_rcnn_gc_vit_: tiny .2 51.6/44.6, small .3 52.4/45.4, base .5 52.9/45.8
coco/dino_gc_vit_: large .2 58.3/-
ade20k/upernet_gc_vit_: tiny .2 47.0/-, small .3 48.3/-, base .5 49.2/-
coco/retinanet_litv2_: small .2 44.0/-, medium .2 46.0/-, base .3 46.7/-
coco/mask_rcnn_litv2_: small .2 44.9/40.8, medium .2 46.8/42.3, base .3 47.3/42.6
ade20k/semantic_fpn_litv2_: small .2 44.3/-, medium .2 45.7/-, base .3 47.2/-
coco/retinanet_van_: b2 .1 44.9/-, b3 .2 47.5/-
coco/mask_rcnn_van_: b2 .1 46.4/41.8, b3 .2 48.3/43.4
coco/mask_rcnn_3x_van_: b2 .1 48.8/-
ade20k/upernet_van_: b0 .1 -/41.1, b1 .1 -/44.9, b2 .1 -/50.1, b3 .3 -/50.6, b4 .4 -/52.2
ade20k/upernet_van_: b4_in22k .4 -/53.5, b5 .4 -/53.9, b6 .5 -/54.7
ade20k/semantic_fpn_van_: b0 .2 38.5/-, b1 .2 42.9/-, b2 .2 46.7/-, b3 .3 48.1/-
coco/cascade_mask_rcnn_maxvit_: tiny .2 52.1/44.6, small .3 53.1/45.4, base .4 53.4/45.7
"""


def _reported() -> dict[str, tuple[float, str, str]]:
    rows = {}
    for line in REPORTED.strip().splitlines():
        prefix, _, items = line.partition(":")
        for item in items.split(","):
            size, rate, figures = item.split()
            rows[prefix + size] = (float(rate), *figures.split("/"))
    return rows


PAIRS = _reported()

NORM, TABLES, FULL = ["norm"], ["norm", "bias_table"], []  # FULL: everything is decayed
OWN = None  # vectors and what the model names
QUERIES = ["norm", ".bn", ".gn", "bias_table", "query_embed", "query_feat", "level_embed"]

# COCO: learning rate, weight decay, exempt from it, epochs, drops, warm-up, precision.
COCO = {
    r"mask_rcnn_1x": (1e-4, 0.05, OWN, 12, [8, 11], 500, "none"),
    r"(cascade_)?mask_rcnn_3x": (1e-4, 0.05, OWN, 36, [27, 33], 500, "none"),
    r"retinanet_1x": (1e-4, 1e-4, OWN, 12, [8, 11], 500, "none"),
    r"dino_1x": (1e-4, 1e-4, FULL, 12, [11], 0, "none"),
    r"mask2former_50e": (1e-4, 0.05, QUERIES, 50, [44.444, 48.148], 0, "none"),
    r"(cascade_)?mask_rcnn_((di)?nat|dinat_s)_(mini|tiny|small)": (1e-4, 0.05, TABLES, 36, [27, 33], 500, "fp16"),
    r"cascade_mask_rcnn_nat_base": (1e-4, 0.05, TABLES, 36, [27, 33], 500, "fp16"),
    r"cascade_mask_rcnn_dinat(_s)?_base": (7.5e-5, 0.05, TABLES, 36, [27, 33], 500, "fp16"),
    r"cascade_mask_rcnn_dinat_large": (7.5e-5, 0.05, TABLES, 36, [27, 33], 500, "none"),
    r"cascade_mask_rcnn_dinat_s_large": (5e-5, 0.05, TABLES, 36, [27, 33], 500, "fp16"),
    r"mask2former_dinat_large": (1e-4, 0.05, QUERIES, 100, [88.889, 96.296], 0, "none"),
    r"(cascade_)?mask_rcnn_cswin_\w+": (1e-4, 0.05, NORM, 36, [27, 33], 500, "none"),
    r"mask_rcnn_1x_cswin_\w+": (1e-4, 0.05, NORM, 12, [8, 11], 500, "none"),
    r"mask_rcnn_biformer_\w+": (1e-4, 0.05, NORM, 12, [8, 11], 500, "fp16"),
    r"retinanet_biformer_\w+": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"mask_rcnn_gc_vit_tiny": (1e-4, 0.05, NORM, 36, [27, 33], 2500, "none"),
    r"cascade_mask_rcnn_gc_vit_\w+": (1e-4, 0.05, TABLES, 36, [27, 33], 2500, "none"),
    r"dino_gc_vit_large": (1e-4, 1e-4, FULL, 36, [27, 33], 0, "none"),
    r"mask_rcnn_litv2_\w+": (2e-4, 1e-4, NORM, 12, [8, 11], 500, "fp16"),
    r"retinanet_litv2_\w+": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"mask_rcnn_van_b[23]": (1e-4, 0.05, NORM, 12, [8, 11], 500, "none"),
    r"mask_rcnn_3x_van_b2": (1e-4, 0.05, NORM, 36, [27, 33], 500, "none"),
    r"retinanet_van_b[23]": (1e-4, 1e-4, NORM, 12, [8, 11], 500, "none"),
    r"cascade_mask_rcnn_maxvit_\w+": (1e-4, 0.05, OWN, 36, [27, 33], 500, "none"),
}

# ADE20K: learning rate, weight decay, exempt from it, updates, images an update, schedule and power, lowest learning
# rate, warm-up and its start, crop, evaluated size, test divisor, precision.
U160 = (160_000, 16, "poly", 1.0, 0.0, 1500, 1e-6)
ADE = {
    r"upernet_160k": (6e-5, 0.01, OWN, *U160, 512, 512, None, "none"),
    r"semantic_fpn_80k": (1e-4, 1e-4, OWN, 80_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"mask2former_160k": (1e-4, 0.05, QUERIES, 160_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"mask2former_dinat_large": (1e-4, 0.05, QUERIES, 160_000, 16, "poly", 0.9, 0.0, 0, None, 640, 640, None, "none"),
    r"upernet_(nat_\w+|dinat_(mini|tiny|small|base)|dinat_s_\w+)": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "fp16"),
    r"upernet_dinat_large": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "none"),
    r"upernet_cswin_(tiny|small|base)": (6e-5, 0.01, NORM, *U160, 512, 512, None, "none"),
    r"upernet_cswin_large": (6e-5, 0.01, NORM, *U160, 640, 640, None, "none"),
    r"semantic_fpn_cswin_\w+": (1e-4, 1e-4, NORM, 80_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"upernet_biformer_\w+": (6e-5, 0.01, NORM, *U160, 512, 512, None, "fp16"),
    r"semantic_fpn_biformer_\w+": (2e-4, 1e-4, FULL, 80_000, 32, "cosine", None, 0.0, 1000, 0.1, 512, 512, 32, "fp16"),
    r"upernet_gc_vit_\w+": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "none"),
    r"semantic_fpn_litv2_\w+": (1e-4, 1e-4, FULL, 80_000, 16, "poly", 0.9, 1e-6, 0, None, 512, 512, None, "none"),
    r"upernet_van_b[012356]": (6e-5, 0.01, NORM, *U160, 512, 512, 32, "none"),
    r"upernet_van_b4(_in22k)?": (6e-5, 0.01, NORM, 160_000, 32, *U160[2:], 512, 512, 32, "none"),
    r"semantic_fpn_van_b[0-3]": (2e-4, 1e-4, FULL, 40_000, 32, "poly", 0.9, 0.0, 0, None, 512, 512, 32, "none"),
}


@pytest.fixture(scope="module")
def recipe_config(compose):
    """The configuration of a recipe; composed once, so not to be changed."""
    return functools.cache(lambda recipe: compose(f"recipe={recipe}"))


def _text(recipe: str) -> str:
    return (ROOT / f"{recipe}.yaml").read_text()


def _row(table: dict[str, tuple], recipe: str) -> tuple:
    rows = [row for pattern, row in table.items() if re.fullmatch(pattern, recipe.partition("/")[2])]
    assert len(rows) == 1, "one row of the table, and only one, is about this recipe"
    return rows[0]


def _optional(values) -> list | None:
    return None if values is None else list(values)


def test_every_reported_pair_has_a_recipe_and_every_recipe_is_reported_or_generic():
    assert sorted([*DETECT, *SEGMENT]) == sorted([*PAIRS, *GENERIC])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*DETECT, *SEGMENT])
def test_recipe_composes_for_its_task_and_method(recipe_config, recipe):
    cfg = recipe_config(recipe)
    config.check(cfg)
    folder, _, name = recipe.partition("/")
    assert (cfg.task, cfg.data.name) == (("detect", "coco") if folder == "coco" else ("segment", "masks"))
    methods = config.DETECTORS if folder == "coco" else config.SEGMENTORS
    assert cfg.dense.method == next(method for method in methods if name.startswith(method))
    assert not cfg.dense.small
    assert cfg.augment.hflip == 0.5
    assert cfg.augment.mixup == cfg.augment.cutmix == cfg.augment.smoothing == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DETECT)
def test_detection_follows_the_paper(recipe_config, recipe):
    cfg = recipe_config(recipe)
    optim, schedule, trainer, dense = cfg.optim, cfg.schedule, cfg.trainer, cfg.dense
    found = (optim.lr, optim.weight_decay, _optional(dense.no_decay), trainer.epochs, list(schedule.decay_milestones))
    assert (*found, dense.warmup_updates, trainer.amp) == _row(COCO, recipe)
    assert (optim.opt, optim.layer_decay, schedule.sched, schedule.decay_rate) == ("adamw", None, "multistep", 0.1)
    assert (trainer.effective_batch_size, dense.updates, dense.warmup_factor) == (16, None, 1e-3)
    transformer = dense.method in ("dino", "mask2former")
    assert dense.backbone_lr == (0.1 if transformer else 1.0)
    assert optim.clip_grad == {"dino": 0.1, "mask2former": 0.01}.get(dense.method)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DETECT)
def test_detection_images_follow_the_paper(recipe_config, recipe):
    dense = recipe_config(recipe).dense
    several = list(range(480, 801, 32))
    if "maxvit" in recipe:
        wanted = ([896], 896, False, None, None)
    elif dense.method == "mask2former":
        wanted = ([800], 1333, False, [1024, 1024], [0.1, 2.0])
    elif dense.method == "dino" or recipe_config(recipe).trainer.epochs == 36:
        wanted = (several, 1333, True, None, None)
    else:
        wanted = ([800], 1333, False, None, None)
    found = (list(dense.scales), dense.max_size, dense.detr_crop, _optional(dense.crop), _optional(dense.ratio_range))
    assert found == wanted
    assert not dense.photometric
    assert dense.frozen_stages == -1
    assert dense.norm_eval == bool(re.search("biformer|maxvit", recipe))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SEGMENT)
def test_segmentation_follows_the_paper(recipe_config, recipe):
    cfg = recipe_config(recipe)
    optim, schedule, trainer, dense = cfg.optim, cfg.schedule, cfg.trainer, cfg.dense
    wanted = _row(ADE, recipe)
    found = (
        *(optim.lr, optim.weight_decay, _optional(dense.no_decay), dense.updates, trainer.effective_batch_size),
        *(schedule.sched, schedule.decay_rate if schedule.sched == "poly" else None, schedule.min_lr),
        *(dense.warmup_updates, dense.warmup_factor if dense.warmup_updates else None),
        *(dense.crop[0], dense.scales[-1], dense.test_divisor, trainer.amp),
    )
    assert found == wanted
    assert (optim.opt, optim.layer_decay, dense.photometric, dense.norm_eval) == ("adamw", None, True, False)
    assert dense.crop[0] == dense.crop[1]
    assert (cfg.data.num_classes, cfg.data.reduce_zero_label) == (150, True)
    if dense.method == "mask2former":
        size = dense.crop[0]
        assert sorted(dense.scales) == [int(tenths * 0.1 * size) for tenths in range(5, 21)]
        assert (dense.max_size, dense.ratio_range, dense.backbone_lr, optim.clip_grad) == (4 * size, None, 0.1, 0.01)
    else:
        assert (list(dense.scales), dense.max_size) == ([dense.crop[0]], 4 * dense.crop[0])
        assert (list(dense.ratio_range), dense.backbone_lr, optim.clip_grad) == ([0.5, 2.0], 1.0, None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PAIRS)
def test_pair_has_the_drop_path_and_the_backbone_of_its_name(recipe_config, recipe):
    cfg = recipe_config(recipe)
    assert cfg.model_kwargs.drop_path_rate == PAIRS[recipe][0]
    model, _, tag = cfg.model.partition(".")
    backbone = re.sub(r"_(384(_11x11)?)$", "", model) + ("_in22k" if tag == "in22k_mmseg" and "b4" in model else "")
    assert recipe.endswith(f"_{backbone}")


@pytest.mark.parametrize("recipe", PAIRS)
def test_pair_states_source_figures_and_command(recipe):
    text = _text(recipe)
    head = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert re.search(r"on (COCO|ADE20K), .*\(arXiv \d{4}\.\d{5}[ )]", head)
    expected = re.search(r"Expected: (.*?), the (README|paper)'s figures?( \([a-z ]+\))?; not run here\.", head)
    assert re.findall(r"\d+\.\d+", expected[1]) == [figure for figure in PAIRS[recipe][1:] if figure != "-"]
    assert f"recipe={recipe} data.root=" in text


@pytest.mark.parametrize("recipe", GENERIC)
def test_generic_recipe_names_its_settings_and_command(recipe):
    text = _text(recipe)
    (settings,) = re.findall(r"settings: (shared/\w+\.yaml)", re.sub(r"\n# ", " ", text))
    assert re.search(r"^# .*(arXiv|Source)", (Path(cli.CONF) / settings).read_text(), re.M)
    assert f"recipe={recipe} model=" in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*DETECT, *SEGMENT])
def test_model_is_registered_with_its_tag(recipe_config, recipe):
    cfg = recipe_config(recipe)
    model, _, tag = cfg.model.partition(".")
    assert timm.is_model(model)
    assert cfg.pretrained is True
    weights = timm.models.get_pretrained_cfg(cfg.model)
    assert weights.has_weights
    assert not tag or weights.tag == tag


@pytest.mark.parametrize("recipe", [name for name in PAIRS if name.endswith("dinat_large") or "s_large" in name])
def test_large_models_start_from_22k_weights(recipe_config, recipe):
    assert recipe_config(recipe).model.endswith(".in22k")


@pytest.mark.parametrize("recipe", [name for name in PAIRS if "van" in name])
def test_van_takes_the_mean_of_imagenet_unlike_its_classifier(recipe_config, recipe):
    cfg = recipe_config(recipe)
    assert list(cfg.data.mean) == [0.485, 0.456, 0.406]
    assert list(cfg.data.std) == [0.229, 0.224, 0.225]
    assert timm.models.get_pretrained_cfg(cfg.model).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("recipe", ["coco/mask2former_dinat_large", "ade20k/mask2former_dinat_large"])
def test_mask2former_has_dilations_of_its_own(recipe_config, recipe):
    cfg = recipe_config(recipe)
    assert cfg.model == "dinat_large_384_11x11.in22k"
    stage_3 = [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3]
    found = [block_dilations(list(d), n) for d, n in zip(cfg.model_kwargs.dilations, (3, 4, 18, 5), strict=True)]
    assert found == [[1, 14, 1], [1, 4, 1, 7], stage_3, [1] * 5]


def test_mask2former_on_coco_has_200_queries_as_for_swin_large(recipe_config):
    assert recipe_config("coco/mask2former_dinat_large").mm == {"model": {"panoptic_head": {"num_queries": 200}}}


NORMS = (nn.LayerNorm, nn.BatchNorm2d, LayerNorm2d)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("coco/mask_rcnn_dinat_mini", "test_dinat"),
        ("coco/cascade_mask_rcnn_dinat_s_tiny", "dinat_s_tiny"),
        ("ade20k/upernet_nat_mini", "test_nat"),
        ("ade20k/upernet_cswin_tiny", "test_cswin"),
        ("coco/cascade_mask_rcnn_gc_vit_tiny", "test_gc_vit"),
        ("coco/mask_rcnn_litv2_small", "test_litv2"),
        ("ade20k/upernet_van_b0", "test_van"),
        ("coco/mask2former_50e", "test_dinat"),
    ],
)
def test_no_decay_matches_norms_and_bias_tables_and_nothing_else(recipe_config, recipe, model):
    with torch.device("meta"):
        backbone = timm.create_model(model, num_classes=0)
    keys = recipe_config(recipe).dense.no_decay
    norms = {
        f"{path}.{name}"
        for path, module in backbone.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    tables = {name for name, _ in backbone.named_parameters() if name.endswith("bias_table")}
    exempt = {name for name, _ in backbone.named_parameters() if any(key in name for key in keys)}
    assert exempt == norms | (tables if "bias_table" in keys else set())


def test_no_decay_of_biformer_leaves_the_norms_between_stages_decayed_as_published(recipe_config):
    with torch.device("meta"):
        backbone = timm.create_model("test_biformer", num_classes=0)
    (key,) = recipe_config("coco/mask_rcnn_biformer_small").dense.no_decay
    downsampling = dict(backbone.stages[1].downsample.named_parameters(prefix="stages.1.downsample"))
    assert len(downsampling) == 4  # a convolution's and a BatchNorm's
    assert not any(key in name for name in downsampling)


# With other words on the command line.


@pytest.mark.parametrize("task", [[], ["task=detect"]])
def test_recipe_with_and_without_its_task(compose, task):
    cfg = compose(*task, "recipe=coco/retinanet_1x")
    assert (cfg.task, cfg.data.name, cfg.dense.method, cfg.model) == ("detect", "coco", "retinanet", "dinat_tiny")


def test_generic_recipe_takes_any_model(compose):
    cfg = compose("recipe=ade20k/upernet_160k", "model=convnext_atto", "+model_kwargs.drop_path_rate=0.1")
    assert (cfg.model, cfg.model_kwargs, cfg.optim.lr) == ("convnext_atto", {"drop_path_rate": 0.1}, 6e-5)


def test_option_and_value_beat_the_recipe(compose):
    cfg = compose("recipe=coco/mask_rcnn_3x", "dense=cascade_mask_rcnn", "trainer.epochs=1")
    assert (cfg.dense.method, cfg.trainer.epochs, cfg.dense.detr_crop) == ("cascade_mask_rcnn", 1, True)
