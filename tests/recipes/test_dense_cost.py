"""What detectors and segmentors cost: the counts of runs, beside real passes, and those of papers. All slow, 10 s."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import implementation
from zoo.messages import count_text
from zoo.recipes import tasks

cost = tasks.load("segment", "cost")
models = tasks.load("segment", "model")
evaluate = tasks.load("detect", "evaluate")

pytestmark = pytest.mark.slow


def test_summary_has_what_a_segmentor_does_for_an_image(finished_dense, summary, compose):
    """The same as for a forward pass that computes values."""
    folder = finished_dense["segment"]
    found = summary(folder)
    assert found["image_size"] == [128, 128]
    model = evaluate.from_run(compose(f"run={folder}", name="eval"))[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), implementation("reference"), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 128, 128), mode="tensor")
    assert found["multiply_adds"] == counter.get_total_flops() // 2 > 1e6
    assert cost.multiply_adds(model, (128, 128)) == found["multiply_adds"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_report_shows_the_multiply_adds(finished_dense, summary):
    found = summary(finished_dense["detect"])
    page = (finished_dense["detect"] / "report.html").read_text()
    assert found["multiply_adds"] > 1e6
    assert count_text(found["multiply_adds"]) in page
    assert "for an image of 128x128" in page


def test_model_that_can_not_be_counted_does_not_end_the_run(caplog):
    class Backbone(torch.nn.Module):
        def extract_feat(self, images):
            raise RuntimeError("no values\nhere")

    model = Backbone()
    model.data_preprocessor = torch.nn.Identity()
    model.data_preprocessor.pad_size_divisor = 32
    found = cost.cost_of_evaluation(model, [{"inputs": torch.zeros(3, 100, 129)}])
    assert found == {"multiply_adds": None, "image_size": [128, 160]}


@pytest.mark.parametrize(
    ("recipe", "classes", "size", "parameters", "billions"),
    [
        ("coco/mask_rcnn_nat_mini", 80, (800, 1280), 40, 225),  # README of NAT
        ("coco/cascade_mask_rcnn_nat_mini", 80, (800, 1280), 77, 704),  # README of NAT
        ("coco/mask_rcnn_cswin_tiny", 80, (800, 1280), 42, 279),  # README of CSWin
        ("ade20k/upernet_nat_mini", 150, (512, 2048), 50, 900),  # README of NAT
    ],
)
def test_counts_are_those_of_the_papers(compose, recipe, classes, size, parameters, billions):
    cfg = compose(f"recipe={recipe}")
    tasks.load(cfg.task, "model")
    with torch.device("meta"):
        names = [str(i) for i in range(classes)]
        model = models.build_model(cfg, names, torch.device("cpu"), pretrained=False)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.6)
    assert cost.multiply_adds(model, size) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("task", "method"), [("detect", "dino"), ("detect", "mask2former"), ("segment", "mask2former")]
)
def test_heads_that_read_sizes_from_tensors_are_counted(compose, task, method):
    """Twice the side are four times the tokens, and the queries stay as many."""
    tasks.load(task, "model")
    cfg = compose(f"task={task}", f"dense.method={method}", "model=test_van")
    model = models.build_model(cfg, ["a", "b"], torch.device("cpu"), pretrained=False)
    small, large = (cost.multiply_adds(model, (side, side)) for side in (128, 256))
    assert 2 < large / small < 4.5
    assert model.training


def test_semantic_head_of_panoptic_fpn_is_counted(compose):
    """Beside the heads of Mask R-CNN; each of its convolutions counts at the size of its own output."""
    counts = {}
    for task, method in (("detect", "mask_rcnn"), ("panoptic", "panoptic_fpn")):
        tasks.load(task, "model")
        cfg = compose(f"task={task}", "model=test_van")
        cfg.dense.num_things = 2
        with torch.device("meta"):
            model = models.build_model(cfg, ["a", "b", "c"][: 2 + (task == "panoptic")], torch.device("cpu"), False)
        counts[method] = cost.multiply_adds(model, (128, 128))
    # The maps of 32, 16, 8 and 4 pixels a side are raised to 32: one 3x3 convolution before each step, then 1x1.
    width, sides = 64, (32, 16, 8, 16, 4, 8, 16)
    expected = sum(9 * width**2 * side**2 for side in sides) + 2 * width * 32**2
    assert counts["panoptic_fpn"] - counts["mask_rcnn"] == expected
