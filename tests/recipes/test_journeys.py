"""From a shipped recipe to a report, with the commands in README. Slow: about a minute in all."""

import json
import re

import pytest
from omegaconf import OmegaConf

pytestmark = pytest.mark.slow

SHORT = (
    *("trainer.max_updates=2", "trainer.effective_batch_size=null", "trainer.amp=none", "schedule.warmup_epochs=0"),
    *("data.num_workers=0", "log.wandb=disabled", "trainer.device=cpu", "model_kwargs.drop_path_rate=0.1"),
)
DENSE = (
    *(
        "pretrained=false",
        "dense.digits_first=false",
        "trainer.batch_size=2",
        "dense.small=true",
        "dense.scales=[128]",
        "dense.max_size=128",
        "dense.crop=null",
    ),
    *("dense.warmup_updates=0", "dense.detr_crop=false", "dense.ratio_range=null"),
)
# A recipe, the small replacements for its model and data, and the score that is printed.
RUNS = {
    "classify": (
        "imagenet/van_b0",
        ("model=test_van", "data.img_size=32", "data=imagefolder", "trainer.batch_size=8", "trainer.epochs=1"),
        r"top-1 [\d.]+ %",
    ),
    "detect": (
        "coco/mask_rcnn_dinat_mini",
        ("model=test_dinat", "data=digit_scenes", "++mm.model.test_cfg.rcnn.score_thr=0.01", *DENSE),
        r"box AP [\d.]+",
    ),
    "segment": (
        "ade20k/upernet_van_b0",
        ("model=test_van", "data=digit_scenes_labels", "++mm.model.test_cfg.mode=whole", *DENSE),
        r"mIoU [\d.]+",
    ),
}


@pytest.mark.parametrize("task", list(RUNS))
def test_from_a_recipe_to_a_report(command, images, digit_scenes, tmp_path, task):
    recipe, words, score = RUNS[task]
    run, root = tmp_path / "run", images if task == "classify" else digit_scenes
    warm_up = SHORT if task == "classify" else [word for word in SHORT if not word.startswith("schedule.")]
    code, output = command("train", f"recipe={recipe}", f"data.root={root}", f"run={run}", *warm_up, *words)
    assert code == 0, output
    settings = OmegaConf.load(run / "config.yaml")
    assert settings.model_kwargs.drop_path_rate == 0.1

    code, output = command("eval", run)
    assert code == 0, output
    assert re.search(score, output)
    assert json.loads((run / "eval" / "eval.json").read_text())["metrics"]

    folder = root / "val" if task == "classify" else root / "images" / "val"
    code, output = command("predict", f"run={run}", folder, tmp_path / "out")
    assert code == 0, output
    assert any((tmp_path / "out").iterdir())

    code, output = command("report", run)
    assert code == 0, output
    assert (run / "report.html").stat().st_size > 10_000


def test_classifier_of_a_recipe_is_exported(command, images, tmp_path):
    recipe, words, _ = RUNS["classify"]
    run = tmp_path / "run"
    code, output = command("train", f"recipe={recipe}", f"data.root={images}", f"run={run}", *SHORT, *words)
    assert code == 0, output
    code, output = command("export", run, "--out", tmp_path / "model.pt2", "--size", "32", "32")
    assert code == 0, output
    assert (tmp_path / "model.pt2").exists()
