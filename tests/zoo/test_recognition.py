"""Which models a state dict may belong to, and the table of shapes that says so. A second, long ones 20 s."""

import json
import lzma
import os
from pathlib import Path

import pytest
import timm

import zoo
from zoo import families, manifest, recognition

TABLE = Path(__file__).parents[2] / "checkpoints" / "shapes.json.xz"
MODELS = [name for family in zoo.FAMILIES for name in timm.list_models(module=family)]
TAGGED = [name for model in MODELS for name in timm.list_pretrained(f"{model}.*") if families.tag_kwargs(name)]
SOME = ["van_b0", TAGGED[0], "test_dinat", "test_biformer"]


def built(name):
    return {key: list(shape) for key, shape in recognition.built_shapes(name).items()}


@pytest.mark.parametrize("name", SOME)
def test_some_shapes_are_right(name):
    assert manifest.shapes()[name] == built(name)


@pytest.mark.long
def test_all_shapes_are_right():
    """`make tables` writes them."""
    found = {name: built(name) for name in sorted({*MODELS, *TAGGED})}
    if os.environ.get("ZOO_SNAPSHOT"):
        text = json.dumps(found, separators=(",", ":"))
        TABLE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert json.loads(lzma.decompress(TABLE.read_bytes())) == found


def test_every_model_has_a_row():
    assert manifest.shapes().keys() == {*MODELS, *TAGGED}


@pytest.mark.slow
def test_models_that_the_table_knows_are_not_built(monkeypatch):
    state_dict = timm.create_model("test_van", device="meta").state_dict()
    monkeypatch.setattr(timm, "create_model", None)
    assert recognition.closest_models(state_dict) == (["test_van"], 1.0)
    assert recognition.closest_models({"layer1.0.conv1.weight": state_dict["head.weight"]}) == ([], 0.0)


@pytest.fixture
def without_test_van(monkeypatch):
    """Leave a model out of the table."""
    recognition._model_shapes.cache_clear()
    table = {name: row for name, row in manifest.shapes().items() if name != "test_van"}
    monkeypatch.setattr(manifest, "shapes", lambda: table)
    yield
    recognition._model_shapes.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("without_test_van")
def test_model_that_the_table_does_not_know_yet_is_built():
    state_dict = timm.create_model("test_van", device="meta").state_dict()
    assert recognition.closest_models(state_dict) == (["test_van"], 1.0)
