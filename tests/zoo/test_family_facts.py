"""The facts that the families' files state, found by a model's name. Two seconds."""

from functools import wraps
from pathlib import Path

import pytest
import timm
from timm.models import build_model_with_cfg

import zoo
from zoo import families, manifest

MODELS = [name for family in zoo.FAMILIES for name in timm.list_models(module=family)]


def test_every_family_of_the_manifest_has_a_file_and_models():
    assert list(zoo.FAMILIES) == sorted(zoo.FAMILIES)
    for family in zoo.FAMILIES:
        assert Path(zoo.__file__).with_name(f"{family}.py").is_file()
        assert set(families.load(family).VARIANTS) == set(timm.list_models(module=family)) != set()


def test_every_module_with_models_is_a_family():
    """A file whose family is missing from the manifest would register nothing."""
    files = Path(zoo.__file__).parent.glob("*.py")
    assert {file.stem for file in files if "@register_model" in file.read_text()} == set(zoo.FAMILIES)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_examples_are_published_models_of_the_family(family):
    published = {entry["model"] for entry in manifest.manifest(family)}
    assert manifest.examples(family)
    assert set(manifest.examples(family)) <= published
    assert "examples" not in manifest.manifest(family)[0]


def test_family_of_a_name():
    assert families.family_of("dinat_mini") is families.family_of("dinat_mini.in1k") is zoo.nat
    assert families.family_of("resnet50") is families.family_of("vam_b0") is None
    assert families.family_of("hf-hub:timm/resnet50.a1_in1k") is None


@pytest.mark.parametrize("name", ["resnet50", "hf-hub:timm/resnet50.a1_in1k", "cswin_tiny", "vam_b0"])
def test_usual_facts(name):
    assert families.dense_kwargs(name, "detect") == families.tag_kwargs(f"{name}.in1k") == {}
    assert families.timm_name(name) is None
    assert families.feature_side("resnet50", 33, 32) == 2


def test_entry_points_build_their_own_variants(monkeypatch):
    @wraps(build_model_with_cfg)  # whose arguments are known
    def built_variant(model_cls, variant, *args, **kwargs):
        return variant

    monkeypatch.setattr("zoo.backbone.build_model_with_cfg", built_variant)
    assert [timm.model_entrypoint(name)() for name in MODELS] == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_facts_are_stated_of_every_variant(name):
    for task in ("detect", "segment"):
        assert isinstance(families.dense_kwargs(name, task), dict)
    other = families.timm_name(name)
    assert other is None or (timm.is_model(other) and families.family_of(other) is None)
