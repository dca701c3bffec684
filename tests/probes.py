"""Measures what the features of small models are worth for classes that they were not trained on: `make probes`.

Every `test_<family>` is trained on the digits 0 to 4, and its frozen features are probed on the digits 5 to 9, which it
has not seen; the features of random weights are the comparison. The results are in docs/results/probes.json. Models
that are in the file already are not measured again, so an interrupted measurement can be continued.
`python -P` keeps tests/zoo from being taken for the package.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from hydra import compose, initialize_config_dir

import zoo
from zoo.messages import UserError
from zoo.recipes import cli, config
from zoo.recipes.classify import train
from zoo.recipes.digits import Digits

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "probes.json"
HALVES = {"first": range(5), "second": range(5, 10)}
PROBES = ("knn", "linear", "ep")
COMMON = ("data=imagefolder", "data.img_size=64", "data.num_workers=0", "trainer.device=cpu", "log.wandb=disabled")
# The augmentation and the schedule of `data=digits`.
TRAINING = ("augment=digits", "schedule=digits", "trainer=digits", "trainer.epochs=3", "schedule.warmup_epochs=1")
PROBING = ("probe.epochs=30",)


def write_folders(root: Path) -> None:
    """Write the digits as image folders, root/<half>/<train or val>/<class>/."""
    for split in ("train", "val"):
        digits = Digits(split == "train")
        for number, (image, target) in enumerate(zip(digits.images, digits.targets, strict=True)):
            half = next(name for name, classes in HALVES.items() if target in classes)
            folder = root / half / split / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")


def run(*words: str) -> dict:
    """The summary of `zoo-train` with these arguments, run in this process."""
    config.register()
    with initialize_config_dir(cli.CONF, version_base="1.3"):
        return train.train(compose("config", [*COMMON, *words]))


def measure(model: str, root: Path) -> dict:
    """The accuracies of one model, in percent; None for a probe that it can't have."""
    folder, data = root / "runs" / model, f"data.root={root / 'second'}"
    trained = run(f"model={model}", *TRAINING, f"data.root={root / 'first'}", f"run={folder}")
    found = {"parameters": trained["params"], "trained_top1": trained["metrics"]["top1"], "probes": {}, "random": {}}
    for name, weights in (("probes", folder), ("random", "false")):
        for kind in PROBES if name == "probes" else PROBES[:1]:
            words = PROBING if kind != "knn" else ()
            where = f"run={folder}-{name}-{kind}"
            try:
                result = run(f"model={model}", f"pretrained={weights}", data, f"probe={kind}", where, *words)
            except UserError as error:  # a model whose classifier a probe can't become
                print(f"{model}: {error}", file=sys.stderr)
                found[name][kind] = None
            else:
                found[name][kind] = result["metrics"]["top1"]
    return found


def main() -> None:
    """Measure the models that are not in the file yet, and write it after each of them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    about = {
        "command": "make probes",
        "settings": {"training": [*COMMON[:2], *TRAINING], "probes": [*COMMON[:2], *PROBING]},
        "machine": platform.machine(),
        "torch": str(torch.__version__),
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else about | {"models": {}}
    names = timm.list_models("test_*")
    models = [name for name in names if timm.model_entrypoint(name).__module__.removeprefix("zoo.") in zoo.FAMILIES]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        write_folders(root)
        for model in models:
            if model not in results["models"]:
                begun = time.process_time()
                results["models"][model] = measure(model, root)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{model}: {time.process_time() - begun:.0f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    main()
