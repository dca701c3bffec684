"""The recipes: up to date with their tables, whole, and as papers and code say. 15 s, a minute with the slow ones.

The settings and figures below are written from the papers, their code and their READMEs, not from the tables.
"""

import functools
import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
import yaml
from omegaconf import OmegaConf
from timm.layers import LayerNorm2d
from torch import nn

import zoo
from zoo.manifest import manifest
from zoo.nat import block_dilations
from zoo.recipes import cli, config
from zoo.recipes.lr_factors import by_name

CONF = Path(cli.CONF)
RECIPES = cli.options("recipe")


@pytest.fixture(scope="module")
def recipes(compose):
    """The configuration of every recipe; not to be changed."""
    return {name: compose(f"recipe={name}") for name in RECIPES}


@pytest.fixture(scope="module")
def recipe_config(compose):
    """The configuration of a recipe; composed once, so not to be changed."""
    return functools.cache(lambda recipe: compose(f"recipe={recipe}"))


def _text(recipe: str) -> str:
    return (CONF / "recipe" / f"{recipe}.yaml").read_text()


def _flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What `make recipes` writes.


@pytest.fixture(scope="module")
def writer():
    """The names of recipes/tables/write.py."""
    return runpy.run_path(str(CONF.parent / "tables" / "write.py"))


@pytest.mark.slow
def test_recipes_are_what_their_tables_make(writer):
    wanted = writer["recipes"]()
    assert sorted(wanted) == RECIPES
    assert [name for name in RECIPES if _text(name) != wanted[name]] == [], "run make recipes, and read the difference"
    assert writer["PUBLISHED"].read_text() == writer["published"](wanted), "run make recipes, and read the difference"


def test_a_table_with_an_unknown_key_is_refused(writer):
    with pytest.raises(SystemExit, match=r"imagenet/x has the key 'lr' in its table"):
        writer["recipe"]("imagenet/x", "", "van", [{"lr": "1"}], {})


@pytest.mark.slow
def test_a_recipe_shows_every_setting_that_is_not_the_default(recipes):
    """As a value, or in the comment on what an option sets."""
    usual = dict(_flat(OmegaConf.to_container(OmegaConf.structured(config.Config))))
    hidden = []
    for name, cfg in recipes.items():
        text = _text(name)
        shown = {key for key, _ in _flat(yaml.safe_load(text))} | {"log.wandb", "trainer.device"}  # those of `compose`
        comments = re.sub(r"\n# ", " ", text)
        for section, listing in re.findall(r" (\w+)=\w+ sets (.*?)\.\n", comments):
            shown |= {f"{section}.{key}" for key in re.findall(r"(\w+): ", listing)}
        shown |= {"task", "dense.method"} if "override /dense" in text else set()
        hidden += [
            f"{name}: {key}"
            for key, value in _flat(OmegaConf.to_container(cfg))
            if value != usual.get(key) and key not in shown
        ]
    assert hidden == []


@pytest.mark.slow
def test_every_recipe_composes_for_its_task_with_the_keys_of_the_schema(recipes):
    mappings = ("model_kwargs", "mm", "optim.lr_factors")
    keys = {name for name, help in dict(config.keys()).items() if help and name not in mappings}
    for name, cfg in recipes.items():
        folder, _, short = name.partition("/")
        config.check(cfg)
        assert {key for key, _ in _flat(OmegaConf.to_container(cfg))} - {"model_kwargs", "mm"} >= keys, name
        if folder == "imagenet":
            assert (cfg.task, cfg.data.name, cfg.dense.method) == ("classify", "", ""), name
            continue
        if folder.endswith("_panoptic"):
            assert (cfg.task, cfg.data.name) == ("panoptic", folder), name
        else:
            detects = folder in ("coco", "ade20k_instance")
            assert (cfg.task, cfg.data.name) == (("detect", "coco") if detects else ("segment", "masks")), name
        methods = (*config.DETECTORS, *config.SEGMENTORS)
        assert cfg.dense.method == next(method for method in methods if short.startswith(method)), name
        assert cfg.augment.hflip == 0.5, name
        assert cfg.augment.mixup == cfg.augment.cutmix == cfg.augment.smoothing == 0, name


@pytest.mark.slow
def test_every_recipe_is_for_a_model_with_the_weights_that_it_starts_from(recipes):
    for name, cfg in recipes.items():
        model, _, tag = cfg.model.partition(".")
        assert timm.is_model(model), name
        weights = timm.models.get_pretrained_cfg(cfg.model)
        assert (cfg.pretrained is True) == bool(weights.has_weights) or name.startswith("imagenet/"), name
        if cfg.pretrained is True:
            assert weights.has_weights, name
            assert not tag or weights.tag == tag, name
        if isinstance(cfg.pretrained, str):
            assert f"imagenet/{cfg.pretrained.removeprefix('runs/')}" in RECIPES, name
        if cfg.published.model:
            backbone = re.sub(r"_(384|512)(_11x11)?$", "", model)
            assert re.search(rf"(^|[/_]){backbone}(_|$)", name), name


def test_every_recipe_states_its_source_and_its_command():
    for name in RECIPES:
        text = _text(name)
        assert re.search(r"^# Source: ", text, re.M), name
        assert re.search(rf"recipe={name} .*data\.root=", re.sub(r" \\\n# +", " ", text)), name
        if "published:" in text:
            assert re.search(r"\(arXiv \d{4}\.\d{5}\)\. Expected: [\d.]+ ", re.sub(r"\n# ", " ", text)), name


# What was published. Drop path and the figures; of COCO box and mask AP, of ADE20K at one scale and at several, of
# panoptic models the quality, and mask AP and mIoU beside it.

REPORTED = {
    "imagenet/litv2_medium": (0.3, {"top1": 83.3}),
    "imagenet/gc_vit_tiny2": (0.25, {"top1": 83.7}),
    "imagenet/dinat_s_large_ft384": (0.35, {"top1": 87.4}),
    "imagenet/cswin_base_ft384": (0.7, {"top1": 85.5}),
    "imagenet/cswin_large_ft224": (0.2, {"top1": 86.5}),
    "imagenet/gc_vit_large_384": (0.1, {"top1": 87.4}),
    "imagenet/maxvit_base_512": (0.4, {"top1": 86.66}),
    "imagenet/moat_tiny3": (0.1, {"top1": 83.3}),
    "imagenet/moat_1": (0.3, {"top1": 84.2}),
    "imagenet/van_b3": (0.2, {"top1": 83.9}),
    "imagenet/casvit_xs": (0.1, {"top1": 78.3}),
    "imagenet/casvit_t_ft384": (0.0, {"top1": 84.1}),
    "imagenet/ravlt_s": (0.15, {"top1": 84.4}),
    "imagenet/mavit_s": (0.15, {"top1": 84.7}),
    "imagenet/ppma_s": (0.15, {"top1": 84.2}),
    "imagenet/segman_encoder_t": (0.0, {"top1": 76.2}),
    "imagenet/segman_encoder_b": (0.3, {"top1": 85.1}),
    "imagenet/vim_small": (0.05, {"top1": 80.5}),
    "imagenet/vim_tiny_stride8_ft": (0.0, {"top1": 78.3}),
    "imagenet/vim_small_stride8_ft": (0.0, {"top1": 81.6}),
    "coco/cascade_mask_rcnn_vim_tiny": (0.1, {"box_ap": 45.7, "mask_ap": 39.2}),
    "ade20k/upernet_vim_tiny": (0.1, {"miou": 41.0}),
    "ade20k/upernet_vim_small": (0.1, {"miou": 44.9}),
    "imagenet/biformer_small": (0.15, {"top1": 83.8}),
    "imagenet/l2vit_base_ft384": (0.2, {"top1": 87.0}),
    "imagenet/favit_b0": (0.1, {"top1": 71.5}),
    "imagenet/favit_b3": (0.3, {"top1": 83.4}),
    "imagenet/moh_vit_b_75": (0.6, {"top1": 84.9}),
    "imagenet/vig_h_s": (0.3, {"top1": 83.8}),
    "imagenet/illama_base": (0.4, {"top1": 81.6}),
    "imagenet/illama_base_ft384": (0.8, {"top1": 83.0}),
    "imagenet/illama_large_in21k_ft384": (0.3, {"top1": 86.0}),
    "imagenet/vig_gla_t": (0.0, {"top1": 77.2}),
    "imagenet/dyn_perceiver_resnet50_0375": (0.2, {"top1": 77.7}),
    "coco/mask_rcnn_nat_small": (0.35, {"box_ap": 48.4, "mask_ap": 43.2}),
    "coco/cascade_mask_rcnn_dinat_large": (0.6, {"box_ap": 55.3, "mask_ap": 47.8}),
    "coco/mask2former_dinat_large": (0.3, {"mask_ap": 50.8}),
    "coco_panoptic/mask2former_dinat_large": (0.3, {"pq": 58.5, "mask_ap": 49.2, "miou": 68.3}),
    "ade20k_panoptic/mask2former_dinat_large": (0.3, {"pq": 49.4, "mask_ap": 35.0, "miou": 56.3}),
    "cityscapes_panoptic/mask2former_dinat_large": (0.3, {"pq": 67.2, "mask_ap": 44.5, "miou": 83.4}),
    "ade20k_instance/mask2former_dinat_large": (0.3, {"mask_ap": 35.4}),
    "cityscapes/mask2former_dinat_large": (0.3, {"miou_multi_scale": 84.5}),
    "coco/mask_rcnn_1x_cswin_tiny": (0.2, {"box_ap": 46.7, "mask_ap": 42.2}),
    "coco/cascade_mask_rcnn_cswin_small": (0.4, {"box_ap": 53.7, "mask_ap": 46.4}),
    "coco/retinanet_biformer_base": (0.3, {"box_ap": 47.1}),
    "coco/mask_rcnn_casvit_s": (0.1, {"box_ap": 39.8, "mask_ap": 36.7}),
    "coco/retinanet_casvit_m": (0.1, {"box_ap": 40.9}),
    "coco/mask_rcnn_ravlt_t": (0.1, {"box_ap": 47.3, "mask_ap": 42.7}),
    "coco/mask_rcnn_3x_ravlt_b": (0.4, {"box_ap": 52.7, "mask_ap": 46.4}),
    "coco/cascade_mask_rcnn_ravlt_l": (0.55, {"box_ap": 55.6, "mask_ap": 48.0}),
    "coco/retinanet_ravlt_s": (0.15, {"box_ap": 48.3}),
    "coco/mask_rcnn_ppma_t": (0.1, {"box_ap": 47.1, "mask_ap": 42.4}),
    "coco/mask_rcnn_3x_ppma_b": (0.4, {"box_ap": 52.6, "mask_ap": 46.3}),
    "coco/dino_gc_vit_large": (0.2, {"box_ap": 58.3}),
    "coco/cascade_mask_rcnn_gc_vit_base": (0.5, {"box_ap": 52.9, "mask_ap": 45.8}),
    "coco/mask_rcnn_litv2_base": (0.3, {"box_ap": 47.3, "mask_ap": 42.6}),
    "coco/mask_rcnn_van_b3": (0.2, {"box_ap": 48.3, "mask_ap": 43.4}),
    "coco/cascade_mask_rcnn_moat_3_512": (0.6, {"box_ap": 59.2, "mask_ap": 50.3}),
    "coco/cascade_mask_rcnn_maxvit_base": (0.4, {"box_ap": 53.4, "mask_ap": 45.7}),
    "ade20k/upernet_dinat_s_base": (0.3, {"miou": 49.4, "miou_multi_scale": 50.2}),
    "ade20k/mask2former_dinat_large": (0.3, {"miou_multi_scale": 58.1}),
    "ade20k/upernet_cswin_large": (0.6, {"miou": 53.4, "miou_multi_scale": 55.7}),
    "ade20k/semantic_fpn_casvit_t": (0.1, {"miou": 45.0}),
    "ade20k/upernet_ravlt_b": (0.4, {"miou": 52.5}),
    "ade20k/upernet_ppma_b": (0.4, {"miou": 52.3, "miou_multi_scale": 53.0}),
    "cityscapes/upernet_ppma_t": (0.1, {"miou": 82.7, "miou_multi_scale": 83.5}),
    "ade20k/semantic_fpn_ravlt_l": (0.55, {"miou": 52.6}),
    "ade20k/semantic_fpn_biformer_small": (0.15, {"miou": 48.9}),
    "ade20k/upernet_gc_vit_base": (0.5, {"miou": 49.2}),
    "ade20k/semantic_fpn_litv2_medium": (0.2, {"miou": 45.7}),
    "ade20k/upernet_van_b4_in22k": (0.4, {"miou_multi_scale": 53.5}),
    "ade20k/semantic_fpn_van_b3": (0.3, {"miou": 48.1}),
    "imagenet/agent_swin_s_288": (0.3, {"top1": 84.1}),
    "imagenet/agent_cswin_b_ft384": (0.7, {"top1": 85.8}),
    "coco/mask_rcnn_1x_agent_swin_s": (0.1, {"box_ap": 47.2, "mask_ap": 42.7}),
    "coco/cascade_mask_rcnn_agent_swin_b": (0.4, {"box_ap": 52.6, "mask_ap": 45.3}),
    "coco/retinanet_agent_pvt_l": (0.3, {"box_ap": 46.8}),
    "ade20k/semantic_fpn_agent_pvt_m": (0.2, {"miou": 44.3}),
    "imagenet/vitaev2_vsa_48m": (0.25, {"top1": 83.9}),
    "coco/mask_rcnn_1x_vitaev2_vsa_s": (0.1, {"box_ap": 45.9, "mask_ap": 41.4}),
    "coco/mask_rcnn_vitaev2_vsa_s": (0.25, {"box_ap": 48.1, "mask_ap": 42.9}),
    "coco/cascade_mask_rcnn_1x_vitaev2_vsa_s": (0.05, {"box_ap": 49.8, "mask_ap": 43.0}),
    "coco/cascade_mask_rcnn_vitaev2_vsa_48m": (0.45, {"box_ap": 52.9, "mask_ap": 45.6}),
    "cityscapes/upernet_40k_vitaev2_vsa_s": (0.1, {"miou": 81.4, "miou_multi_scale": 82.3}),
    "cityscapes/upernet_80k_vitaev2_vsa_s": (0.1, {"miou": 82.2, "miou_multi_scale": 83.0}),
}


@pytest.mark.parametrize("recipe", REPORTED)
def test_drop_path_and_figures_are_the_published_ones(recipe):
    content = yaml.safe_load(_text(recipe))
    published = content["published"]
    rate, figures = REPORTED[recipe]
    assert content["model_kwargs"]["drop_path_rate"] == rate
    assert {key: value for key, value in published.items() if key not in ("model", "source")} == figures
    assert published["model"] == content["model"]
    assert re.match("(official )?README|MODEL_ZOO|paper", published["source"])


@pytest.mark.parametrize("task", ["ade20k", "cityscapes", "coco_stuff"])
def test_segman_segments_without_drop_path(task):
    """Its segmentation configurations leave out the argument, whose default is 0, unlike its ImageNet scripts."""
    for size in "tsbl":
        content = yaml.safe_load(_text(f"{task}/upernet_segman_encoder_{size}"))
        assert content["model_kwargs"] == {"drop_path_rate": 0.0}


@pytest.mark.slow
def test_top1_of_a_recipe_is_the_manifests_for_the_weights_that_it_trains():
    known = {
        entry["model"]: entry["top1"]["value"]
        for family in zoo.FAMILIES
        for entry in manifest(family)
        if entry["tag"] == "in1k" and entry.get("top1", {}).get("source") == "README of the origin"
    }
    found = {}
    for name in RECIPES:
        content = yaml.safe_load(_text(name))
        if name.startswith("imagenet/") and "pretrained" not in content and "published" in content:
            found[content["model"]] = content["published"].get("top1")
    common = found.keys() & known.keys()
    assert len(common) > 30
    assert {model: found[model] for model in common} == {model: known[model] for model in common}


# What the sources say of training from nothing on ImageNet: learning rate, weight decay, epochs, images per update,
# mixup, cutmix, erasing, cool-down, precision.
PAPERS = {
    r"van_b[0-3]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 10, "none"),
    r"(di)?nat(_s|_isotropic)?_(mini|tiny|small|base)|vitrpb_\w+": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 10, "fp16"),
    r"cswin_(tiny|small)": (2e-3, 0.05, 300, 2048, 0.8, 1.0, 0.25, 10, "fp16"),
    r"cswin_base": (1e-3, 0.1, 300, 1024, 0.8, 1.0, 0.25, 10, "fp16"),
    r"maxvit_(tiny|small|base|large)": (3e-3, 0.05, 300, 4096, 0.8, 0.0, 0.0, 0, "bf16"),
    r"moat_(tiny[0-3]|[01])": (3e-3, 0.05, 300, 4096, 0.8, 0.0, 0.0, 0, "bf16"),
    r"biformer_\w+": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"casvit_(xs|s|m|t)": (6e-3, 0.05, 300, 2048, 0.0, 0.0, 0.0, 0, "fp16"),
    r"(ravlt|mavit)_[tsbl]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"ppma_[tsb]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"segman_encoder_t": (4e-3, 0.05, 300, 4096, 0.8, 1.0, 0.25, 10, "fp16"),
    r"segman_encoder_[sbl]": (2e-3, 0.05, 300, 2048, 0.8, 1.0, 0.25, 10, "fp16"),
    r"vim_tiny": (1e-3, 0.1, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"vim_small": (1e-3, 0.05, 300, 512, 0.8, 1.0, 0.25, 0, "none"),
    r"favit_b[0-3]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"moh_vit_(s_75|s_80|b_50|b_75)": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"gc_vit_(xxtiny|xtiny|tiny|tiny2)": (5e-3, 0.05, 310, 4096, 0.8, 1.0, 0.25, 10, "fp16"),
    r"gc_vit_(small|small2|base|large)": (5e-3, 0.05, 310, 1024, 0.8, 1.0, 0.25, 10, "fp16"),
    r"gc_vit_large_384": (1e-3, 0.05, 310, 1024, 0.8, 1.0, 0.25, 10, "fp16"),
    r"l2vit_(tiny|small|base)": (4e-3, 0.05, 300, 4096, 0.8, 1.0, 0.25, 0, "none"),
    r"l2vit_base_in22k": (1e-3, 0.05, 90, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"litv2_(small|medium|base)": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"agent_swin_[ts]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"agent_swin_(s_288|b)": (5e-4, 0.05, 300, 512, 0.8, 1.0, 0.25, 0, "none"),
    r"agent_pvt_[tsm]|agent_cswin_[ts]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 10, "none"),
    r"agent_pvt_(m_256|l)": (5e-4, 0.05, 300, 512, 0.8, 1.0, 0.25, 10, "none"),
    r"agent_cswin_b": (5e-4, 0.1, 300, 512, 0.8, 1.0, 0.25, 10, "none"),
    r"dyn_perceiver_regnety_008": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"dyn_perceiver_resnet50_0375": (6e-4, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"dyn_perceiver_mobilenetv3_large_075": (1e-3, 0.05, 600, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"vig_h_t": (1.6e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"vig_h_[sb]": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "fp16"),
    r"vig_gla_[tb]": (2e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"vig_gla_s": (1e-3, 0.1, 300, 1024, 0.8, 1.0, 0.25, 0, "none"),
    r"vitaev2_vsa_s": (1e-3, 0.05, 300, 1024, 0.8, 1.0, 0.25, 10, "none"),
    r"illama_tiny": (4e-3, 0.05, 300, 4096, 0.1, 0.1, 0.25, 0, "none"),
    r"illama_small": (4e-3, 0.05, 300, 4096, 0.5, 0.5, 0.25, 0, "none"),
    r"illama_base": (4e-3, 0.05, 300, 4096, 0.95, 1.0, 0.25, 0, "none"),
    r"illama_(base|large)_in21k": (1e-3, 0.01, 90, 4096, 0.8, 1.0, 0.25, 0, "none"),
    r"flowformer": (7.5e-4, 0.05, 300, 768, 0.8, 1.0, 0.0, 0, "fp16"),
    r"vitaev2_vsa_48m": (1e-3, 0.055, 300, 1024, 0.8, 1.0, 0.25, 10, "none"),
}

# The images that are resized with one interpolation in training; the others have bilinear or bicubic at random.
BICUBIC = (
    r"imagenet/((agent|biformer|casvit|dyn_perceiver|favit|illama|l2vit|litv2|mavit|moh|ppma|ravlt|vig|vim)_\w+|"
    r"flowformer)"
)


@pytest.mark.slow
def test_interpolation_of_training_images_is_the_sources():
    for name in RECIPES:
        augment = yaml.safe_load(_text(name)).get("augment", {})
        wanted = "bicubic" if re.fullmatch(BICUBIC, name) else "random"
        assert augment.get("interpolation", "random") == wanted, name


@pytest.mark.slow
def test_augmentation_is_repeated_as_in_the_sources():
    """All of these train with DeiT's script, whose default are three forms of each image."""
    for name in RECIPES:
        augment = yaml.safe_load(_text(name)).get("augment", {})
        wanted = 3 if re.fullmatch(r"imagenet/(biformer|favit|mavit|moh|ppma|ravlt|vim)_\w+", name) else 1
        assert augment.get("repeats", 1) == wanted, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model", "scaled", "factor"),
    [
        ("litv2_small", "test_litv2", r".*offset\.weight", 0.01),
        ("litv2_base_ft384", "test_litv2", r".*offset\.weight", 0.01),
        ("cswin_large_ft224", "test_cswin", r"(?!head).*", 0.05),
    ],
)
def test_learning_rate_factors_are_those_of_the_sources(recipe, model, scaled, factor):
    names = [name for name, _ in timm.create_model(model, device="meta").named_parameters()]
    found = by_name(names, yaml.safe_load(_text(f"imagenet/{recipe}"))["optim"]["lr_factors"])
    assert found == {name: factor for name in names if re.fullmatch(scaled, name)}
    others = {name for name in RECIPES if "lr_factors" in yaml.safe_load(_text(name))["optim"]}
    assert others == {
        f"imagenet/{n}" for n in ("litv2_small", "litv2_medium", "litv2_base", "litv2_base_ft384", "cswin_large_ft224")
    }


NORM, TABLES, FULL = ["norm"], ["norm", "bias_table"], []  # FULL: everything is decayed
OWN = None  # vectors and what the model names
AGENTS = [*TABLES, "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias"]
QUERIES = ["norm", ".bn", ".gn", "bias_table", "query_embed", "query_feat", "level_embed"]
DECAYED = [name for name in QUERIES if name != "bias_table"]  # Mask2Former spares Swin's tables, not DiNAT's

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
    r"mask2former_dinat_large": (1e-4, 0.05, DECAYED, 100, [88.889, 96.296], 0, "none"),
    r"(cascade_)?mask_rcnn_cswin_\w+": (1e-4, 0.05, NORM, 36, [27, 33], 500, "none"),
    r"mask_rcnn_1x_cswin_\w+": (1e-4, 0.05, NORM, 12, [8, 11], 500, "none"),
    r"mask_rcnn_biformer_\w+": (1e-4, 0.05, NORM, 12, [8, 11], 500, "fp16"),
    r"retinanet_biformer_\w+": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"(mask_rcnn|retinanet)_casvit_\w+": (2e-4, 1e-4, FULL, 12, [8, 11], 500, "none"),
    r"mask_rcnn_ravlt_[tsbl]": (1e-4, 0.05, NORM, 12, [8, 11], 500, "fp16"),
    r"(mask_rcnn_3x|cascade_mask_rcnn)_ravlt_[sbl]": (1e-4, 0.05, NORM, 36, [27, 33], 500, "fp16"),
    r"retinanet_ravlt_[tsbl]": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"mask_rcnn_mavit_[tsbl]": (4e-4, 0.05, NORM, 12, [8, 11], 500, "fp16"),
    r"(mask_rcnn_3x|cascade_mask_rcnn)_mavit_[sbl]": (4e-4, 0.05, NORM, 36, [27, 33], 500, "fp16"),
    r"retinanet_mavit_[tsbl]": (4e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"mask_rcnn_ppma_[tsb]": (1e-4, 0.05, NORM, 12, [8, 11], 500, "none"),
    r"mask_rcnn_3x_ppma_[tsb]": (1e-4, 0.05, NORM, 36, [27, 33], 500, "none"),
    r"cascade_mask_rcnn_vim_tiny": (1e-4, 0.1, OWN, 100, [88.889, 96.296], 250, "fp16"),
    r"mask_rcnn_gc_vit_tiny": (1e-4, 0.05, NORM, 36, [27, 33], 2500, "fp16"),
    r"cascade_mask_rcnn_gc_vit_\w+": (1e-4, 0.05, TABLES, 36, [27, 33], 2500, "none"),
    r"dino_gc_vit_large": (1e-4, 1e-4, FULL, 36, [27, 33], 0, "none"),
    r"mask_rcnn_litv2_\w+": (2e-4, 1e-4, NORM, 12, [8, 11], 500, "fp16"),
    r"retinanet_litv2_\w+": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "fp16"),
    r"(mask_rcnn|retinanet)_1x_l2vit_\w+": (1e-4, 0.05, FULL, 12, [8, 11], 500, "none"),
    r"(mask_rcnn|retinanet)_3x_l2vit_\w+": (1e-4, 0.05, FULL, 36, [27, 33], 500, "none"),
    r"mask_rcnn_van_b[23]": (1e-4, 0.05, NORM, 12, [8, 11], 500, "none"),
    r"mask_rcnn_3x_van_b2": (1e-4, 0.05, NORM, 36, [27, 33], 500, "none"),
    r"retinanet_van_b[23]": (1e-4, 1e-4, NORM, 12, [8, 11], 500, "none"),
    r"cascade_mask_rcnn_(maxvit|moat)_\w+": (1e-4, 0.05, OWN, 36, [27, 33], 500, "none"),
    r"(cascade_)?mask_rcnn_agent_swin_[tsb]": (1e-4, 0.05, AGENTS, 36, [27, 33], 500, "none"),
    r"(cascade_)?mask_rcnn_1x_agent_swin_[ts]": (1e-4, 0.05, AGENTS, 12, [8, 11], 500, "none"),
    r"mask_rcnn_agent_pvt_[tsml]": (2e-4, 1e-4, FULL, 12, [8, 11], 500, "none"),
    r"retinanet_agent_pvt_[tsml]": (1e-4, 1e-4, FULL, 12, [8, 11], 500, "none"),
    r"(cascade_)?mask_rcnn_vitaev2_vsa_(s|48m)": (1e-4, 0.05, TABLES, 36, [27, 33], 500, "none"),
    r"((cascade_)?mask_rcnn|retinanet)_1x_vitaev2_vsa_s": (1e-4, 0.05, TABLES, 12, [8, 11], 500, "none"),
}

LAYER_DECAY = {
    "coco/cascade_mask_rcnn_vim_tiny": 0.837,
    "ade20k/upernet_vim_tiny": 0.92,
    "ade20k/upernet_vim_small": 0.95,
    "ade20k/upernet_illama_tiny": 0.9,
    "ade20k/upernet_illama_base": 0.9,
}

# ADE20K: learning rate, weight decay, exempt from it, updates, images an update, schedule and power, lowest learning
# rate, warm-up and its start, crop, evaluated size, test divisor, precision.
U160 = (160_000, 16, "poly", 1.0, 0.0, 1500, 1e-6)
ADE = {
    r"upernet_160k": (6e-5, 0.01, OWN, *U160, 512, 512, None, "none"),
    r"semantic_fpn_80k": (1e-4, 1e-4, OWN, 80_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"mask2former_160k": (1e-4, 0.05, QUERIES, 160_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"mask2former_dinat_large": (1e-4, 0.05, DECAYED, 160_000, 16, "poly", 0.9, 0.0, 0, None, 640, 640, None, "none"),
    r"upernet_(nat_\w+|dinat_(mini|tiny|small|base)|dinat_s_\w+)": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "fp16"),
    r"upernet_dinat_large": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "none"),
    r"upernet_cswin_(tiny|small|base)": (6e-5, 0.01, NORM, *U160, 512, 512, None, "none"),
    r"upernet_cswin_large": (6e-5, 0.01, NORM, *U160, 640, 640, None, "none"),
    r"semantic_fpn_cswin_\w+": (1e-4, 1e-4, NORM, 80_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"upernet_biformer_\w+": (6e-5, 0.01, NORM, *U160, 512, 512, None, "fp16"),
    r"semantic_fpn_biformer_\w+": (2e-4, 1e-4, FULL, 80_000, 32, "cosine", None, 0.0, 1000, 0.1, 512, 512, 32, "fp16"),
    r"semantic_fpn_casvit_\w+": (2e-4, 1e-4, FULL, 40_000, 32, "poly", 0.9, 0.0, 0, None, 512, 512, 32, "none"),
    r"upernet_(ravlt_[sbl]|mavit_[tsbl])": (6e-5, 0.01, NORM, *U160, 512, 512, None, "none"),
    r"semantic_fpn_(ra|ma)v\w+": (1e-4, 1e-4, FULL, 80_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
    r"upernet_ppma_[tsb]": (6e-5, 0.05, NORM, *U160, 512, 512, None, "none"),
    r"upernet_segman_encoder_[tsbl]": (6e-4, 0.01, NORM, *U160, 512, 512, 32, "none"),
    r"upernet_vim_tiny": (2e-4, 0.1, OWN, 60_000, 32, *U160[2:], 512, 512, None, "none"),
    r"upernet_vim_small": (1e-4, 0.05, OWN, 60_000, 32, *U160[2:], 512, 512, None, "none"),
    r"upernet_illama_(tiny|base)": (6e-5, 0.01, OWN, *U160, 512, 512, None, "none"),
    r"upernet_gc_vit_\w+": (6e-5, 0.01, TABLES, *U160, 512, 512, None, "none"),
    r"semantic_fpn_litv2_\w+": (1e-4, 1e-4, FULL, 80_000, 16, "poly", 0.9, 1e-6, 0, None, 512, 512, None, "none"),
    r"upernet_l2vit_\w+": (6e-5, 0.01, FULL, *U160, 512, 512, None, "none"),
    r"upernet_van_b[012356]": (6e-5, 0.01, NORM, *U160, 512, 512, 32, "none"),
    r"upernet_van_b4(_in22k)?": (6e-5, 0.01, NORM, 160_000, 32, *U160[2:], 512, 512, 32, "none"),
    r"semantic_fpn_van_b[0-4]": (2e-4, 1e-4, FULL, 40_000, 32, "poly", 0.9, 0.0, 0, None, 512, 512, 32, "none"),
    r"upernet_agent_swin_[tsb]": (6e-5, 0.01, AGENTS, *U160, 512, 512, None, "none"),
    r"semantic_fpn_agent_pvt_[tsml]": (2e-4, 1e-4, FULL, 40_000, 16, "poly", 0.9, 0.0, 0, None, 512, 512, None, "none"),
}


def _row(table: dict[str, tuple], recipe: str) -> tuple:
    rows = [row for pattern, row in table.items() if re.fullmatch(pattern, recipe.partition("/")[2])]
    assert len(rows) == 1, f"one row of the table, and only one, is about {recipe}"
    return rows[0]


def _optional(values) -> list | None:
    return None if values is None else list(values)


def _of(recipes, folder):
    return {name: cfg for name, cfg in recipes.items() if name.startswith(folder if "/" in folder else f"{folder}/")}


@pytest.mark.slow
def test_training_from_nothing_follows_the_paper(recipes):
    for name, cfg in _of(recipes, "imagenet").items():
        optim, trainer, augment = cfg.optim, cfg.trainer, cfg.augment
        assert optim.opt == "adamw", name
        if cfg.pretrained:  # fine-tuning: shorter and gentler
            assert trainer.epochs <= 40, name
            assert optim.lr <= 3e-4, name
            continue
        found = (optim.lr, optim.weight_decay, trainer.epochs, trainer.effective_batch_size)
        found += (augment.mixup, augment.cutmix, augment.re_prob, cfg.schedule.cooldown_epochs)
        found += (trainer.amp,)
        assert found == _row(PAPERS, name), name


@pytest.mark.parametrize(
    ("recipe", "lr", "lowest", "images", "amp"),
    [
        ("litv2_base_ft384", 4e-5, 4e-7, 1024, "fp16"),
        ("agent_swin_b_ft384", 1e-5, 1e-7, 256, None),
        ("agent_cswin_b_ft384", 2.5e-6, 2.5e-7, 256, None),
        ("cswin_base_ft384", 5e-6, 5e-7, 256, "fp16"),
        ("cswin_large_ft224", 2.5e-4, 5e-7, 512, "fp16"),
        ("dinat_large_ft224", 5e-5, 0.0, 512, "none"),
        ("illama_base_ft384", 8e-5, 1e-6, 512, None),
        ("illama_base_in21k_ft224", 8e-5, 1e-6, 512, None),
        ("illama_base_in21k_ft384", 1.1e-4, 1e-6, 512, None),
        ("illama_large_in21k_ft224", 6e-5, 1e-6, 512, None),
        ("illama_large_in21k_ft384", 3.5e-5, 1e-6, 512, None),
    ],
)
def test_fine_tuning_follows_configurations_and_commands(recipe, lr, lowest, images, amp):
    content = yaml.safe_load(_text(f"imagenet/{recipe}"))
    assert (content["optim"]["lr"], content["schedule"]["min_lr"]) == (lr, lowest)
    assert (content["trainer"]["effective_batch_size"], content["trainer"].get("amp")) == (images, amp)


def test_dropout_of_dyn_perceiver_is_that_of_its_models():
    """It is in the code of two models, not in the commands that train them."""
    rates = {"regnety_008": 0.0, "resnet50_0375": 0.2, "mobilenetv3_large_075": 0.2}
    for name, rate in rates.items():
        content = yaml.safe_load(_text(f"imagenet/dyn_perceiver_{name}"))
        assert content["model_kwargs"].get("drop_rate", 0.0) == rate


def test_fine_tuning_of_illama_follows_its_logs():
    """Without mixup, warm-up and soft mask; before it, attention becomes causal after 30 of 90 epochs."""
    for size in ("base", "large"):
        content = yaml.safe_load(_text(f"imagenet/illama_{size}_in21k"))
        assert content["model_kwargs"] == {"soft_mask": "constant", "soft_mask_epochs": 30, "drop_path_rate": 0.1}
    for name in ("base_ft384", *(f"{size}_in21k_ft{side}" for size in ("base", "large") for side in (224, 384))):
        content = yaml.safe_load(_text(f"imagenet/illama_{name}"))
        assert list(content["model_kwargs"]) == ["drop_path_rate"]
        assert (content["augment"]["mixup"], content["augment"]["cutmix"]) == (0, 0)
        assert (content["schedule"]["warmup_epochs"], content["trainer"]["epochs"]) == (0, 30)
        assert content["optim"]["weight_decay"] == 1e-8


def test_segmentation_of_illama_follows_its_configurations():
    """Features after blocks 4, 6, 8 and 12, of images of 512 pixels; the head has as many channels as the backbone."""
    for size, channels in (("tiny", 192), ("base", 768)):
        content = yaml.safe_load(_text(f"ade20k/upernet_illama_{size}"))
        assert content["model_kwargs"] == {"img_size": 512, "depths": [4, 2, 2, 4], "drop_path_rate": 0.1}
        assert content["mm"] == {"model": {"decode_head": {"channels": channels}}}


@pytest.mark.slow
def test_heads_of_recipes_say_what_differs_from_the_sources(recipes):
    """What the keys can't follow."""
    heads = {name: re.sub(r"\n# ", " ", _text(name).partition("defaults:")[0]) for name in recipes}
    said = {
        "keeps the learning rate constant": r"imagenet/dinat_(s_)?large(_11x11)?_ft(224|384)",
        "Its batch norms then see fewer images": r"coco/cascade_.*|[^/]*/(upernet|semantic_fpn)_.*",
        "images without boxes, 1 % of COCO, which are left out": r"coco/dino_.*",
        "In the official code, the batch norms between stages see the images of one GPU": r".*/semantic_fpn_litv2_.*",
        "configurations of fine-tuning are for MaxViT-T": r"imagenet/maxvit_(small|base|large)_(384|512)",
    }
    for sentence, pattern in said.items():
        found = {name for name, head in heads.items() if sentence in head}
        assert found == {name for name in heads if re.fullmatch(pattern, name)}, sentence


@pytest.mark.slow
def test_detection_follows_the_paper(recipes):
    for name, cfg in _of(recipes, "coco").items():
        optim, schedule, trainer, dense = cfg.optim, cfg.schedule, cfg.trainer, cfg.dense
        found = (optim.lr, optim.weight_decay, _optional(dense.no_decay), trainer.epochs)
        found += (list(schedule.decay_milestones), dense.warmup_updates, trainer.amp)
        assert found == _row(COCO, name), name
        assert (optim.opt, schedule.sched, schedule.decay_rate) == ("adamw", "multistep", 0.1)
        assert optim.layer_decay == LAYER_DECAY.get(name), name
        images = 32 if "casvit" in name else 64 if "_vim_" in name else 16
        assert (trainer.effective_batch_size, dense.updates, dense.warmup_factor) == (images, None, 1e-3), name
        assert dense.backbone_lr == (0.1 if dense.method in ("dino", "mask2former") else 1.0), name
        assert optim.clip_grad == {"dino": 0.1, "mask2former": 0.01}.get(dense.method), name


@pytest.mark.slow
def test_images_of_detection_follow_the_paper(recipes):
    several = list(range(480, 801, 32))
    for name, cfg in _of(recipes, "coco").items():
        dense = cfg.dense
        if re.search("maxvit|moat", name):
            wanted = ([896], 896, False, None, None)
        elif "_vim_" in name:
            wanted = ([1024], 1024, False, [1024, 1024], [0.1, 2.0])
        elif dense.method == "mask2former":
            wanted = ([800], 1333, False, [1024, 1024], [0.1, 2.0])
        elif dense.method == "dino" or cfg.trainer.epochs == 36 or re.search("agent_swin|l2vit|vitaev2", name):
            wanted = (several, 1333, True, None, None)
        else:
            wanted = ([800], 1333, False, None, None)
        crop, ratio_range = _optional(dense.crop), _optional(dense.ratio_range)
        assert (list(dense.scales), dense.max_size, dense.detr_crop, crop, ratio_range) == wanted, name
        assert (dense.photometric, dense.frozen_stages, dense.small) == (False, -1, False), name
        assert dense.norm_eval == bool(re.search("biformer|casvit|maxvit|moat", name)), name


@pytest.mark.slow
def test_segmentation_follows_the_paper(recipes):
    for name, cfg in _of(recipes, "ade20k").items():
        optim, schedule, trainer, dense = cfg.optim, cfg.schedule, cfg.trainer, cfg.dense
        found = (
            *(optim.lr, optim.weight_decay, _optional(dense.no_decay), dense.updates, trainer.effective_batch_size),
            *(schedule.sched, schedule.decay_rate if schedule.sched == "poly" else None, schedule.min_lr),
            *(dense.warmup_updates, dense.warmup_factor if dense.warmup_updates else None),
            *(dense.crop[0], dense.scales[-1], dense.test_divisor, trainer.amp),
        )
        assert found == _row(ADE, name), name
        assert (optim.opt, dense.photometric, dense.norm_eval) == ("adamw", True, False), name
        assert optim.layer_decay == LAYER_DECAY.get(name), name
        assert (cfg.data.num_classes, cfg.data.reduce_zero_label, dense.small) == (150, True, False), name
        assert dense.cat_max_ratio == (1.0 if name == "ade20k/mask2former_dinat_large" else 0.75), name
        size = dense.crop[0]
        if dense.method == "mask2former":
            assert sorted(dense.scales) == [int(tenths * 0.1 * size) for tenths in range(5, 21)], name
            wanted = (size, 4 * size, None, 0.1, 0.01)
        else:
            assert list(dense.scales) == [size], name
            wanted = (size, 4 * size, [0.5, 2.0], 0.1 if "segman" in name else 1.0, None)
        ratio_range = _optional(dense.ratio_range)
        assert (dense.crop[1], dense.max_size, ratio_range, dense.backbone_lr, optim.clip_grad) == wanted, name


# Of Mask2Former's own configurations: updates, size of the smaller side in evaluation, crop and queries.
MASK2FORMER = {
    "ade20k_panoptic": (160_000, 640, [640, 640], 200),
    "ade20k_instance": (160_000, 640, [640, 640], 200),
    "cityscapes_panoptic": (90_000, 1024, [512, 1024], 200),
    "cityscapes": (90_000, 1024, [512, 1024], None),  # its default, 100
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", MASK2FORMER)
def test_mask2former_on_other_data_follows_its_configuration(recipe_config, folder):
    cfg = recipe_config(f"{folder}/mask2former_dinat_large")
    optim, schedule, dense = cfg.optim, cfg.schedule, cfg.dense
    assert (optim.opt, optim.lr, optim.weight_decay, optim.clip_grad) == ("adamw", 1e-4, 0.05, 0.01)
    assert (schedule.sched, schedule.decay_rate, schedule.min_lr, dense.warmup_updates) == ("poly", 0.9, 0.0, 0)
    assert (list(dense.no_decay), dense.backbone_lr, cfg.trainer.effective_batch_size) == (DECAYED, 0.1, 16)
    updates, size, crop, queries = MASK2FORMER[folder]
    assert (dense.updates, dense.scales[-1], list(dense.crop), dense.photometric) == (updates, size, crop, True)
    assert sorted(dense.scales) == [int(tenths * 0.1 * size) for tenths in range(5, 21)]
    assert dense.max_size == 4 * size
    assert OmegaConf.select(cfg, "mm.model.panoptic_head.num_queries") == queries


@pytest.mark.slow
def test_panoptic_coco_has_the_settings_of_its_instances(recipe_config):
    cfg, instances = (recipe_config(f"{folder}/mask2former_dinat_large") for folder in ("coco_panoptic", "coco"))
    for section in ("optim", "schedule", "trainer", "dense", "mm", "augment", "model_kwargs"):
        assert cfg[section] == instances[section], section


@pytest.mark.slow
def test_segmentation_of_cityscapes_follows_the_paper(recipes):
    for name, cfg in _of(recipes, "cityscapes/upernet_ppma").items():
        optim, data, dense = cfg.optim, cfg.data, cfg.dense
        assert (optim.lr, optim.weight_decay, list(dense.no_decay), dense.backbone_lr) == (6e-5, 0.05, NORM, 1.0), name
        assert (data.num_classes, data.reduce_zero_label) == (19, False), name
        assert (dense.updates, cfg.trainer.effective_batch_size, dense.warmup_updates) == (160_000, 8, 1500), name
        assert (list(dense.scales), dense.max_size, list(dense.crop)) == ([1024], 2048, [1024, 1024]), name


@pytest.mark.parametrize("thousands", [40, 80])
def test_vsa_on_cityscapes_follows_the_readme(recipe_config, thousands):
    cfg = recipe_config(f"cityscapes/upernet_{thousands}k_vitaev2_vsa_s")
    optim, data, dense = cfg.optim, cfg.data, cfg.dense
    assert (optim.lr, optim.weight_decay, list(dense.no_decay), dense.warmup_updates) == (6e-5, 0.01, TABLES, 1500)
    assert (data.num_classes, data.reduce_zero_label, dense.updates) == (19, False, 1000 * thousands)
    assert (cfg.trainer.effective_batch_size, list(dense.scales), dense.max_size) == (8, [1024], 2048)
    assert (list(dense.crop), dense.test_divisor, cfg.mm) == ([512, 1024], None, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "size", "stride"),
    [
        ("ade20k/upernet_ppma_s", 512, 341),
        ("cityscapes/upernet_ppma_s", 1024, 768),
        ("cityscapes/upernet_segman_encoder_b", 1024, 768),
        ("ade20k/upernet_vim_small", 512, 341),
        ("ade20k/upernet_illama_base", 512, 341),
    ],
)
def test_images_are_evaluated_in_windows(recipe_config, recipe, size, stride):
    chosen = recipe_config(recipe).eval
    assert (chosen.window, chosen.stride, chosen.tta) == ([size, size], [stride, stride], "none")


@pytest.mark.slow
def test_figures_at_several_scales_have_their_settings(recipes):
    # MMSegmentation 0.x: tools/test.py --aug-test. Mask2Former: short sides of 320, 480, ... 1120 where 640 is usual.
    quoted = {name: cfg for name, cfg in recipes.items() if cfg.published.miou_multi_scale}
    assert len(quoted) == 37
    for name, cfg in quoted.items():
        assert (cfg.eval.scales, cfg.eval.flip, cfg.eval.tta) == ([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], True, "none"), name
    assert [int(640 * scale) for scale in quoted["ade20k/mask2former_dinat_large"].eval.scales] == [
        *(320, 480, 640, 800, 960, 1120)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "classes", "images", "size"), [("cityscapes", 19, 8, 1024), ("coco_stuff", 171, 16, 512)]
)
def test_segmentation_of_other_data_follows_the_paper(recipes, folder, classes, images, size):
    found = _of(recipes, f"{folder}/upernet_segman")
    assert found
    for name, cfg in found.items():
        optim, dense = cfg.optim, cfg.dense
        assert (optim.lr, dense.backbone_lr, optim.weight_decay, list(dense.no_decay)) == (6e-4, 0.1, 0.01, NORM), name
        assert (cfg.data.num_classes, cfg.data.reduce_zero_label) == (classes, False), name
        assert (dense.updates, cfg.trainer.effective_batch_size, list(dense.crop)) == (160_000, images, [size] * 2), (
            name
        )


@pytest.mark.slow
def test_large_dinats_start_from_22k_weights(recipes):
    large = [cfg.model for name, cfg in recipes.items() if re.search("dinat_(s_)?large", name)]
    assert len(large) > 8
    assert all(model.endswith(".in22k") for model in large)


@pytest.mark.slow
def test_detectors_and_segmentors_with_van_take_the_mean_of_imagenet_unlike_its_classifiers(recipes):
    found = {name: cfg for name, cfg in recipes.items() if "van" in name and not name.startswith("imagenet/")}
    assert len(found) > 15
    for name, cfg in found.items():
        assert list(cfg.data.mean) == [0.485, 0.456, 0.406], name
        assert list(cfg.data.std) == [0.229, 0.224, 0.225], name
        assert timm.models.get_pretrained_cfg(cfg.model).mean == (0.5, 0.5, 0.5), name


@pytest.mark.slow
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


@pytest.mark.slow
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
        ("coco/mask_rcnn_vitaev2_vsa_s", "test_vitae_vsa"),
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


@pytest.mark.slow
def test_no_decay_of_agent_swin_matches_norms_and_all_tables(recipe_config):
    with torch.device("meta"):
        backbone = timm.create_model("test_agent", num_classes=0)
    keys = recipe_config("coco/mask_rcnn_agent_swin_t").dense.no_decay
    exempt = {name for name, _ in backbone.named_parameters() if any(key in name for key in keys)}
    rest = {name for name, _ in backbone.named_parameters()} - exempt
    assert {name.rpartition(".")[2] for name in rest} == {"weight", "bias"}
    assert not any("norm" in name for name in rest)


@pytest.mark.slow
def test_no_decay_of_biformer_leaves_the_norms_between_stages_decayed_as_published(recipe_config):
    with torch.device("meta"):
        backbone = timm.create_model("test_biformer", num_classes=0)
    (key,) = recipe_config("coco/mask_rcnn_biformer_small").dense.no_decay
    downsampling = dict(backbone.stages[1].downsample.named_parameters(prefix="stages.1.downsample"))
    assert len(downsampling) == 4  # a convolution's and a BatchNorm's
    assert not any(key in name for name in downsampling)


# With other words on the command line.


@pytest.mark.slow
@pytest.mark.parametrize("task", [[], ["task=detect"]])
def test_recipe_with_and_without_its_task(compose, task):
    cfg = compose(*task, "recipe=coco/retinanet_1x")
    assert (cfg.task, cfg.data.name, cfg.dense.method, cfg.model) == ("detect", "coco", "retinanet", "dinat_tiny")


@pytest.mark.slow
def test_generic_recipe_takes_any_model(compose):
    cfg = compose("recipe=ade20k/upernet_160k", "model=convnext_atto", "+model_kwargs.drop_path_rate=0.1")
    assert (cfg.model, cfg.model_kwargs, cfg.optim.lr) == ("convnext_atto", {"drop_path_rate": 0.1}, 6e-5)


@pytest.mark.slow
def test_option_and_value_beat_the_recipe(compose):
    cfg = compose("recipe=coco/mask_rcnn_3x", "dense=cascade_mask_rcnn", "trainer.epochs=1")
    assert (cfg.dense.method, cfg.trainer.epochs, cfg.dense.detr_crop) == ("cascade_mask_rcnn", 1, True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["coco/mask_rcnn_litv2_small", "imagenet/van_b0"])
def test_other_options_do_not_change_what_a_recipe_writes_out(compose, recipe):
    before, after = compose(f"recipe={recipe}"), compose(f"recipe={recipe}", "schedule=constant", "trainer=digits")
    assert (after.schedule, after.trainer.epochs) == (before.schedule, before.trainer.epochs)
    assert after.trainer.effective_batch_size == before.trainer.effective_batch_size


@pytest.mark.slow
def test_coco_by_itself_has_the_1x_schedule(compose):
    cfg = compose("task=detect", "data=coco")
    assert (cfg.schedule.sched, cfg.schedule.decay_milestones) == ("multistep", [8, 11])
    assert (cfg.trainer.epochs, cfg.trainer.batch_size, cfg.trainer.effective_batch_size) == (12, 2, 16)


OWN = """\
defaults:
  - config
  - /recipe/coco/mask_rcnn_litv2_small
  - override /dense: cascade_mask_rcnn
  - _self_

model: van_b0
optim:
  lr: 3.0e-4
"""


@pytest.mark.slow
def test_a_file_of_the_users_own_builds_on_a_recipe(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN)
    code, output = command("train", "--config-dir", ".", "--config-name", "mine", "--cfg", "job")
    assert code == 0, output
    cfg = OmegaConf.create(output)
    assert (cfg.model, cfg.dense.method, cfg.data.name) == ("van_b0", "cascade_mask_rcnn", "coco")
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.trainer.epochs) == (3e-4, 1e-4, 12)
    assert cfg.published.model == "litv2_small"  # so that a report does not show its figures for van_b0
