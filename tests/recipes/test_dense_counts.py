"""The costs of the detectors and segmentors of all recipes, which zoo-models lists. All long, 5 min."""

import json
import os
from pathlib import Path

import pytest
import torch

from zoo import manifest
from zoo.recipes import tasks

cost = tasks.load("segment", "cost")
models = tasks.load("segment", "model")

COUNTS = Path(__file__).parents[2] / "checkpoints" / "dense_counts.json"
# The recipes that are counted, by the beginning of their names, with the classes of the data and the height and width
# for which papers count. For the others, papers name no size.
DATA = {"coco/": (80, (800, 1280)), "ade20k/": (150, (512, 2048)), "cityscapes/upernet": (19, (1024, 2048))}


@pytest.fixture
def counted(compose):
    """What dense_counts.json has of a recipe."""

    def count(name):
        cfg = compose(f"recipe={name}")
        classes, size = next(about for beginning, about in DATA.items() if name.startswith(beginning))
        if cfg.dense.method == "semantic_fpn" and size == (512, 2048):
            size = (512, 512)
        # The heads of DINO and Mask2Former are computed.
        device = "cpu" if cfg.dense.method in ("dino", "mask2former") else "meta"
        tasks.load(cfg.task, "model")
        with torch.device(device):
            model = models.build_model(cfg, [str(i) for i in range(classes)], torch.device("cpu"), pretrained=False)
        return {
            "method": cfg.dense.method,
            "size": list(size),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_adds": cost.multiply_adds(model, size),
        }

    return count


def recipes():
    """The recipes that are counted."""
    return [name for name in manifest.recipes() if name.startswith(tuple(DATA))]


@pytest.mark.timeout(1800)
@pytest.mark.long
def test_all_counts_are_right(counted):
    """`make tables` writes them."""
    found = {name: counted(name) for name in sorted(recipes())}
    if os.environ.get("ZOO_SNAPSHOT"):
        lines = (f"{json.dumps(name)}: {json.dumps(count)}" for name, count in found.items())
        COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert json.loads(COUNTS.read_text()) == found
