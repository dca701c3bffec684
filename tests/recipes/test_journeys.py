"""From a shipped recipe to a report, with the commands in README. Slow: about a minute in all."""

import json
import re
import signal

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

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


def test_zoo_train_alone(start_cli, tmp_path):
    """The demo: no argument at all."""
    process = start_cli(cwd=tmp_path, WANDB_MODE="disabled", CUDA_VISIBLE_DEVICES="")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 1/12"):
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, "".join(lines)
    assert lines[0].startswith("test_van: 0.48 M parameters")
    [run] = tmp_path.glob("runs/*-test_van")
    assert lines[-1].endswith(f"Continue with: python -m zoo.recipes.train run={run.relative_to(tmp_path)}\n")


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


@pytest.mark.long
def test_classifier_of_a_recipe_is_exported(command, images, tmp_path):
    recipe, words, _ = RUNS["classify"]
    run = tmp_path / "run"
    code, output = command("train", f"recipe={recipe}", f"data.root={images}", f"run={run}", *SHORT, *words)
    assert code == 0, output
    code, output = command("export", run, "--out", tmp_path / "model.pt2", "--size", "32", "32")
    assert code == 0, output
    assert (tmp_path / "model.pt2").exists()


def test_three_hundred_classes(command, tmp_path):
    """Stripes of the labels 299, 256 and 2, and of ignored pixels, in PNGs of 16 bits."""
    stripes = np.tile(np.repeat(np.array([299, 256, 2, 65535], np.uint16), 16), (64, 1))
    for split in ("train", "val"):
        for number in range(2):
            for kind, pixels in (("images", (stripes >> 1).astype(np.uint8)), ("annotations", stripes)):
                (tmp_path / "data" / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "data" / kind / split / f"{number}.png")
    run, out = tmp_path / "run", tmp_path / "out"
    data = (f"data.root={tmp_path / 'data'}", "data.num_classes=300", "data.ignore_index=65535")
    length = ("trainer.max_updates=6", "optim.lr=3e-2", "trainer.batch_size=2", "trainer.effective_batch_size=2")
    small = (
        "dense.small=true",
        "dense.scales=[64]",
        "dense.max_size=64",
        "dense.crop=[64,64]",
        "dense.ratio_range=null",
    )
    settings = ("trainer.device=cpu", "log.wandb=disabled", "data.num_workers=0", "model=test_van", f"run={run}")
    code, output = command("train", "task=segment", *data, *length, *small, *settings)
    assert code == 0, output

    code, output = command("eval", run)
    assert code == 0, output
    classes = json.loads((run / "eval" / "classes.json").read_text())
    counted = {label: count for label, count in enumerate(classes["counts"]) if count}
    assert counted == dict.fromkeys((2, 256, 299), 2 * 64 * 16)
    assert {true for true, _, _ in classes["confusion"]} == counted.keys()

    code, output = command("predict", f"run={run}", tmp_path / "data" / "images" / "val", out)
    assert code == 0, output
    found = [np.array(Image.open(path)) for path in sorted((out / "labels").iterdir())]
    assert len(found) == 2
    assert all(labels.dtype == np.uint16 for labels in found)
    assert max(labels.max() for labels in found) > 255
    scored = {found for _, found, _ in classes["confusion"]}
    assert {int(label) for labels in found for label in np.unique(labels[:, :48])} == scored
