"""data=csv: CSV files as they are found in practice, and images with several labels. 20 s; slow ones a minute."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import api
from zoo.recipes.classify import multi_label
from zoo.recipes.classify.data import Samples, _hold_out_several, open_data
from zoo.recipes.config import DataConfig
from zoo.recipes.logs import log
from zoo.tools import export


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with photos/0.png to photos/9.png, in which the test runs."""
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(caplog, monkeypatch):
    """The log."""
    monkeypatch.setattr(log, "propagate", True)  # the run of another test has changed it
    with caplog.at_level("INFO"):
        yield caplog


def _open(text, training=True, classes=None, **options):
    if isinstance(text, str):
        text = text.encode()
    with open("t.csv", "wb") as file:
        file.write(text)
    return open_data(DataConfig(name="csv", csv="t.csv", **{"root": "photos", **options}), 0, training, classes)


def _samples(dataset):
    return [(dataset.reader.filename(i), label) for i, (_, label) in enumerate(dataset.reader.samples)]


SPLIT = "file,label,split\n0.png,cat,train\n1.png,dog,train\n2.png,dog,val\n"
FORMS = {
    "as it is": SPLIT,
    "semicolons": SPLIT.replace(",", ";"),
    "tabs": SPLIT.replace(",", "\t"),
    "bars": SPLIT.replace(",", "|"),
    "a mark of the byte order": b"\xef\xbb\xbf" + SPLIT.encode(),
    "UTF-16": SPLIT.encode("utf-16"),
    "line ends of Windows": SPLIT.replace("\n", "\r\n"),
    "no end of the last line": SPLIT.rstrip(),
    "quotes": SPLIT.replace("cat", '"cat"').replace("0.png", '"0.png"'),
    "spaces": SPLIT.replace(",", " , "),
    "a space before a quote": SPLIT.replace("cat", ' "cat"'),
    "Excel's first line": "sep=;\n" + SPLIT.replace(",", ";"),
    "capital headers": SPLIT.replace("file,label,split", "File,LABEL,Split"),
    "other columns": re.sub(r"^(?=[\d])", "7,", SPLIT.replace("file,", "id,file,"), flags=re.MULTILINE),
    "empty lines": SPLIT.replace("\n", "\n\n") + ",,\n",
    "empty cells at the end": SPLIT.replace("train\n", "train,\n"),
    "other names of splits": SPLIT.replace("train", "Training").replace("val", "valid"),
    "a test split": SPLIT + "3.png,bird,test\n",
    "paths of Windows": SPLIT.replace("0.png", ".\\0.png"),
    "a duplicate row": SPLIT + "0.png,cat,train\n./0.png,cat,train\n",
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_forms_of_a_table(folder, text):
    data = _open(text)
    assert data.classes == ["cat", "dog"]
    assert not data.multi_label
    assert (_samples(data.train), _samples(data.val)) == ([("0.png", 0), ("1.png", 1)], [("2.png", 1)])


def test_paths_are_absolute_or_begin_in_the_folder_of_the_file_or_in_root(folder):
    (folder / "photos" / "UPPER.PNG").write_bytes((folder / "photos" / "3.png").read_bytes())
    text = f"file,label\n{folder}/photos/0.png,cat\nphotos/1.png,cat\nphotos\\UPPER.PNG,dog\nphotos/2.png,dog\n"
    assert {path for path, _ in _samples(_open(text, root=None).train)} == {
        *("photos/0.png", "photos/1.png", "photos/2.png", "photos/UPPER.PNG")
    }
    assert len(_open("file,label\n0.png,a\n1.png,a\n2.png,b\n3.png,b\n").train) == 4


def test_columns_are_named_by_keys(folder):
    text = "label,image,kind,fold\nx,0.png,cat,a\nx,1.png,dog,a\nx,2.png,dog,b\nx,3.png,dog,c\n"
    names = {"file_column": "image", "label_column": "kind", "split_column": "fold"}
    with pytest.raises(UserError, match=r"t\.csv, line 5: the split 'c' is unknown: write 'a', 'b' or 'test'"):
        _open(text, **names, train_split="a", val_split="b")
    data = _open(text.replace(",c\n", ",test\n"), **names, train_split="a", val_split="b")
    assert (_samples(data.train), _samples(data.val)) == ([("0.png", 0), ("1.png", 1)], [("2.png", 1)])


def test_share_of_each_class_is_held_out_without_splits(folder, said):
    text = "file,label\n" + "".join(f"{i}.png,{'cat' if i < 4 else 'dog'}\n" for i in range(10))
    data = _open(text, val_fraction=0.5)
    held = [data.train.reader.samples[i][1] for i in data.val_indices]
    assert sorted(held) == [0, 0, 1, 1, 1]
    assert sorted([*data.train_indices, *data.val_indices]) == list(range(10))
    assert "t.csv has no validation split: 5 of 10 images are held out (data.val_fraction=0.5)" in said.text
    everything = _open(text, training=False, classes=["cat", "dog"])
    assert len(everything.val_indices) == 10
    only_train = _open("file,label,split\n" + "".join(f"{i}.png,{'ab'[i % 2]},train\n" for i in range(10)))
    assert len(only_train.val_indices) == 2
    ignored = _open("file,label,split\n" + "".join(f"{i}.png,{'ab'[i % 2]},x\n" for i in range(10)), split_column=None)
    assert len(ignored.val_indices) == 2


def test_classes_are_in_natural_order_or_in_that_of_a_class_map(folder, said):
    text = "file,label,split\n0.png,c10,train\n1.png,c9,train\n2.png,c1,train\n3.png,c9,val\n"
    assert _open(text).classes == ["c1", "c9", "c10"]
    (folder / "classes.txt").write_text("c10\nc9\n")
    data = _open(text, class_map="classes.txt")
    assert (data.classes, _samples(data.train)) == (["c10", "c9"], [("0.png", 0), ("1.png", 1)])
    assert "data.class_map=classes.txt leaves out 1 of the 3 labels in t.csv: c1." in said.text


WRONG = {
    "empty": ("", r"t\.csv is empty: its first line has to name the columns, for example file,label\."),
    "a header only": ("file,label\n", r"t\.csv has a header but no rows: add a row for each image\."),
    "no header": ("0.png,cat\n1.png,dog\n", r"t\.csv, line 1, names an image, and no columns: put a header before it"),
    "no column of files": (
        "image,label\n0.png,cat\n",
        r"line 1: there is no column 'file', but 'image', 'label': name",
    ),
    "no column of labels": (
        "file,kind\n0.png,cat\n",
        r"no column 'label', but 'file', 'kind': name yours with data\.l",
    ),
    "two columns of labels": (
        "file,label,labels\n0.png,a,b\n",
        r"'label' and 'labels': choose one with data\.label_column",
    ),
    "two columns of a name": (
        "file,file,label\n0.png,1.png,a\n",
        r"line 1: 2 columns are named 'file': give each its own",
    ),
    "a cell too many": (
        SPLIT + "3.png,a,b,val\n",
        r"line 5, has 4 cells, but the header has 3 columns: leave no cell out",
    ),
    "a cell too few": ("file,label\n0.png,a\n1.png\n", r"t\.csv, line 3, has 1 cell, but the header has 2 columns"),
    "an open quote": ('file,label\n0.png,"cat\n1.png,dog\n', r"t\.csv, line 2, can't be read \(.*\): check its quotes"),
    "text after a quote": ('file,label\n0.png,"cat"s\n', r"t\.csv, line 2, can't be read \(.*\): check its quotes"),
    "no file": ("file,label\n0.png,cat\n,dog\n", r"t\.csv, line 3: the cell of 'file' is empty: name an image"),
    "no label": ("file,label\n0.png,cat\n1.png, \n", r"line 3: the cell of 'label' is empty: an image needs a label"),
    "no split": (SPLIT + "3.png,dog,\n", r"t\.csv, line 5: the cell of 'split' is empty: name a split"),
    "an unknown split": (
        SPLIT + "3.png,dog,tran\n",
        r"t\.csv, line 5: the split 'tran' is unknown: write 'train', 'val'",
    ),
    "no training split": (
        "file,label,split\n0.png,a,val\n",
        r"no row of the split 'train' \(data\.train_split\): it has 'val'",
    ),
    "a missing file": (
        "file,label\n0.png,cat\n11.png,dog\n",
        r"line 3: photos/11\.png does not exist: did you mean \S*1\.png\?",
    ),
    "missing files": (
        "file,label\na.png,cat\nb.png,dog\n",
        r"2 of 2 files are missing.*begin in photos \(data\.root\)",
    ),
    "a missing extension": ("file,label\n0,cat\n", r"line 2: photos/0 does not exist: did you mean photos/0\.png\?"),
    "a folder": ("file,label\n.,cat\n", r"t\.csv, line 2: photos is not a file"),
    "two labels of an image": (
        SPLIT + "0.png,dog,train\n",
        r"line 5: photos/0\.png is 'dog' here and 'cat' in line 2: keep one",
    ),
    "one class": (
        "file,label\n0.png,cat\n1.png,cat\n",
        r"all training images have the same label, 'cat': classification needs",
    ),
    "a class of validation only": (
        SPLIT + "3.png,dgo,val\n",
        r"line 5: the label 'dgo' is not one.*did you mean 'dog'\?",
    ),
    "an image in both splits": (SPLIT + "1.png,dog,val\n", r"1 of the 2 validation images are training images too"),
    "text": (b"file,label\n\xe9.png,cat\n", r"t\.csv is not text in UTF-8 or UTF-16"),
    "too few to hold out": ("file,label\n0.png,cat\n1.png,dog\n", r"too few images to hold out 10% of a class"),
    "a list": (
        "file,labels\n0.png,\"['a', 'b']\"\n",
        r"line 2: the labels \['a', 'b'\] are a list: write them as text",
    ),
    "two separators": (
        "file,labels\n0.png,a|b\n1.png,a;b\n",
        r"'\|' \(line 2\) and ';' \(line 3\): say what separates them",
    ),
    "no label in validation": (
        "file,labels,split\n0.png,a,train\n1.png,,train\n2.png,,val\n",
        r"t\.csv: no validation image has a label: scores need some",
    ),
    "no labels at all": ("file,labels\n0.png,\n1.png,\n", r"all training images have no label"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_table_that_is_refused(folder, text, message):
    with pytest.raises(UserError, match=message) as error:
        _open(text)
    assert "t.csv" in str(error.value) or "validation images" in str(error.value)
    assert "\n" not in str(error.value)


def test_images_in_both_splits_are_allowed_by_a_key(folder):
    assert len(_open(SPLIT + "1.png,dog,val\n", same_images=True).val) == 2


def test_text_saved_as_an_image_is_refused(folder):
    (folder / "photos" / "1.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"1\.png is text, not an image: remove or replace it"):
        _open(SPLIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, r"data\.csv=t\.csv has no effect with data\.name='': give data=csv, too"),
        ({"csv": "u.csv"}, r"data\.csv=u\.csv does not exist: did you mean \S*t\.csv\?"),
        ({"csv": None}, r"data\.csv is not set: give the CSV file"),
        ({"csv": "photos"}, r"data\.csv=photos is a folder: give a CSV file"),
        ({"root": "phots"}, r"data\.root=phots is not a folder"),
        ({"split_column": "fold"}, r"there is no column 'fold', but 'file', 'label', 'split'"),
        ({"name": "", "csv": None, "multi_label": True}, r"has one label per image: for several, give data=csv"),
    ],
    ids=str,
)
def test_key_that_does_not_fit(folder, options, message):
    (folder / "t.csv").write_text(SPLIT)
    settings = {"name": "csv", "csv": "t.csv", "root": "photos"} | options
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(**settings), 0)


# Several labels.

SEVERAL = "file,labels,split\n0.png,cat|dog,train\n1.png,,train\n2.png,dog,train\n3.png,dog,val\n"


@pytest.mark.parametrize(
    "text",
    [
        SEVERAL,
        SEVERAL.replace("|", ";"),
        SEVERAL.replace("cat|dog", '"dog, cat"'),
        SEVERAL.replace("cat|dog", "cat|dog|cat|"),
        SEVERAL.replace("0.png,cat|dog,train", "0.png,cat,train\n0.png,dog,train"),
    ],
    ids=["bar", "semicolon", "comma", "repeated", "a row for each label"],
)
def test_several_labels(folder, text):
    data = _open(text)
    assert (data.classes, data.multi_label) == (["cat", "dog"], True)
    assert [label for _, label in _samples(data.train)] == [(0, 1), (), (1,)]
    samples = Samples(data.train, lambda image: np.array(image), 0, False, (3, 8, 8), classes=2)
    assert torch.stack([samples[0, i][1] for i in range(3)]).tolist() == [[1, 1], [0, 0], [0, 1]]


def test_labels_with_spaces_are_whole_unless_told(folder, said):
    text = "file,labels\n0.png,New York\n1.png,York\n2.png,New\n3.png,New\n4.png,York\n"
    assert _open(text).classes == ["New", "New York", "York"]
    assert "'New York' is one label; if spaces separate labels, set data.label_separator=' '" in said.text
    assert _open(text, label_separator=" ").classes == ["New", "York"]


def test_any_column_can_have_several_labels(folder):
    assert _open(SEVERAL.replace("labels", "tags"), label_column="tags", multi_label=True).classes == ["cat", "dog"]
    assert _open(SEVERAL.replace("1.png,,", "1.png,dog,"), multi_label=False).classes == ["cat|dog", "dog"]


def test_share_of_each_label_is_held_out():
    rng = np.random.default_rng(0)
    targets = [tuple(np.flatnonzero(rng.random(6) < (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)).tolist()) for _ in range(1000)]
    train, held = _hold_out_several(targets, 0.2, 0)
    assert sorted([*train, *held]) == list(range(1000))
    assert 0.18 <= len(held) / 1000 <= 0.23
    for label in range(6):
        having = [i for i, labels in enumerate(targets) if label in labels]
        assert len(set(having) & set(held)) / len(having) == pytest.approx(0.2, abs=0.04)
    assert _hold_out_several(targets, 0.2, 0)[1] == held
    assert _hold_out_several(targets, 0.2, 1)[1] != held


@pytest.mark.parametrize(
    ("value", "expected"), [(0.3, [0.3, 0.3]), ([0.2, 0.4], [0.2, 0.4]), ({"dog": 0.9}, [0.5, 0.9])], ids=str
)
def test_thresholds(compose, value, expected):
    cfg = compose()
    cfg.eval.threshold = value
    assert multi_label.thresholds(cfg, ["cat", "dog"]).tolist() == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"dgo": 0.9}, r"eval\.threshold names 'dgo', which is not a class: did you mean dog\?"),
        ([0.5], r"eval\.threshold has 1 numbers, but there are 2 classes"),
    ],
    ids=str,
)
def test_thresholds_that_do_not_fit(compose, value, message):
    cfg = compose()
    cfg.eval.threshold = value
    with pytest.raises(UserError, match=message):
        multi_label.thresholds(cfg, ["cat", "dog"])


class _Fixed(torch.nn.Module):
    """Logits that the first channel's left pixels hold."""

    def forward(self, images):
        return images[:, 0, 0, :3] * 255 - 127.5


def test_scores_by_hand():
    """Three classes: one found perfectly, one half, one of no image."""
    targets = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [-1, -1, -1]])
    pixels = torch.tensor([[200, 200, 0], [199, 180, 0], [1, 100, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    images = torch.zeros(5, 3, 3, 3, dtype=torch.uint8)
    images[:, 0, 0] = pixels
    loader = [(images[:2], targets[:2], []), (images[2:], targets[2:], ["bad.png (why)"])]

    def normalize(batch):
        return batch.float() / 255

    result = multi_label.measure(_Fixed(), loader, normalize, torch.no_grad(), np.array([0.5, 0.5, 0.5]))
    assert result.per_class()["AP"] == [100, pytest.approx(100 * (1 + 2 / 3) / 2), None]
    assert result.per_class()["F1"] == [100, 50, None]
    metrics = result.metrics
    assert (metrics["images"], metrics["F1"]) == (4, 75)
    assert metrics["mAP"] == pytest.approx((100 + 100 * 5 / 6) / 2)
    assert metrics["F1_micro"] == pytest.approx(100 * 2 * 3 / (4 + 4))
    assert result.corrupt == ["bad.png (why)"]


# Journeys.


@pytest.fixture(scope="module")
def two_digits(tmp_path_factory):
    """A folder with 120 images of two digits of sixteen pixels, or of one or none, and labels.csv; read only."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    pictures, labels = load_digits(n_class=3, return_X_y=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(120):
        chosen = rng.integers(0, len(labels), 2 if number % 8 else number // 8 % 2)
        pixels = np.zeros((16, 16))
        for place, i in enumerate(chosen):
            pixels[4:12, 8 * place : 8 * place + 8] = pictures[i].reshape(8, 8) * 15
        Image.fromarray(pixels.astype("uint8")).resize((32, 32)).save(folder / f"{number}.png")
        names = "|".join(sorted({("zero", "one", "two")[labels[i]] for i in chosen}))
        rows.append((f"{number}.png", names, "train" if number < 80 else "val" if number < 110 else "test"))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "labels", "split"), *rows])
    return folder


SMALL = ("model=test_vit", "data.img_size=32", "trainer.device=cpu", "log.wandb=disabled", "data.num_workers=0",
         "trainer.batch_size=16", "schedule.warmup_epochs=0", "optim.lr=3e-3", "augment=none")  # fmt: skip


@pytest.mark.slow
def test_journey_of_several_labels(command, two_digits, tmp_path, weights, same):
    data = ("data=csv", f"data.csv={two_digits / 'labels.csv'}")
    words = (*SMALL, *data, "trainer.epochs=3", "augment.mixup=0.2", "augment.smoothing=0.1", "loss.weights=balanced")
    code, output = command("train", *words, "run=whole")
    assert code == 0, output
    assert "80 training and 30 validation images" in output
    assert re.search(r"Loss: binary cross-entropy, weights of the positive terms from \S+ \(\w+\) to", output)
    assert re.search(r"mAP \d+\.\d\d % on 30 validation images \(best: ", output)
    # Resuming within an epoch changes nothing.
    assert command("train", *words, "run=parts", "trainer.max_updates=7")[0] == 0
    assert command("train", *words, "run=parts")[0] == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"loss", "mAP", "F1", "F1_micro"}

    code, output = command("eval", "whole", "per_class=true", "trainer.device=cpu")
    assert code == 0, output
    found = json.loads((tmp_path / "whole" / "eval" / "eval.json").read_text())
    assert found["metrics"]["mAP"] == pytest.approx(summary["metrics"]["mAP"])
    assert found["per_class"].keys() == {"one", "two", "zero"}
    assert found["per_class"]["one"].keys() == {"AP", "F1"}
    assert re.search(r"mAP \d.* %, F1 .* %, micro F1 .* %, loss .* on 30 images", output)
    code, output = command("eval", "whole", "data.val_split=test", "out=test", "eval.threshold={zero: 0.3}")
    assert code == 0, output
    assert "on 10 images" in output

    code, output = command("predict", "run=whole", "device=cpu", "eval.threshold=0.01", two_digits / "1.png", "out")
    assert code == 0, output
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert sorted(row["labels"].split("|")) == ["one", "two", "zero"]  # all probabilities are above 1 %
    assert "labels (%)" in output
    (image,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert sum(guess["probability"] for guess in image["predictions"]) != pytest.approx(1)

    code, output = command("report", "whole", "whole/eval", "-o", "both.html")
    assert code == 0, output
    page = (tmp_path / "whole" / "report.html").read_text()
    for text in (
        "mAP",
        "micro F1",
        "A label wrong or missing",
        "training images with each label",
        '<th class="n">AP</th>',
    ):
        assert text in page
    assert "Confusion matrix" not in page

    facts = export._load(export.parser().parse_args(["whole"]))[2]
    assert (facts["classes"], facts["multi_label"]) == (["one", "two", "zero"], True)


@pytest.mark.slow
def test_run_of_several_labels_needs_data_of_several_labels(command, fit, two_digits, images, tmp_path):
    fit(
        tmp_path / "run",
        None,
        "data=csv",
        f"data.csv={two_digits / 'labels.csv'}",
        "data.num_workers=0",
        "trainer.max_updates=1",
    )
    code, output = command("eval", "run", "data=imagefolder", f"data.root={images}")
    assert (code, "for several, give data=csv" in output) == (1, True)
    result = api.evaluate("run", {"trainer.device": "cpu"})
    assert result.targets.dtype == result.predictions.dtype == bool
    assert result.targets.shape == result.predictions.shape == (result.metrics["images"], 3)
    with pytest.raises(UserError, match=r"loss\.name=ce is for one label per image, but the data has several"):
        fit(tmp_path / "a", None, "data=csv", f"data.csv={two_digits / 'labels.csv'}", "loss.name=ce")
    with pytest.raises(UserError, match=r"data\.sampling=balanced needs one label per image"):
        fit(tmp_path / "b", None, "data=csv", f"data.csv={two_digits / 'labels.csv'}", "data.sampling=balanced")


@pytest.mark.slow
def test_journey_of_one_label(command, images, tmp_path):
    """A corrupt image is skipped, a second start with more epochs continues, other files are evaluated."""
    files = sorted(images.rglob("*.jpg"))
    (tmp_path / "bad.jpg").write_bytes(files[0].read_bytes()[:300])
    rows = [(path, path.parent.name, path.parent.parent.name) for path in files] + [
        (tmp_path / "bad.jpg", "apple", "train")
    ]
    with open(tmp_path / "all.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows([("File", "Label", "Split"), *rows])
    with open(tmp_path / "other.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *[row[:2] for row in rows[:6]]])
    words = (*SMALL, "data=csv", "data.csv=all.csv", "run=run", "trainer.batch_size=8")
    code, output = command("train", *words, "trainer.epochs=1")
    assert code == 0, output
    assert "25 training and 15 validation images" in output
    assert "Skipped a corrupt image: " in output
    code, output = command("train", *words, "trainer.epochs=2", "data.sampling=balanced")
    assert code == 0, output
    assert "Continues in epoch 2 after update 3." in output
    code, output = command("eval", "run", "data.csv=other.csv", "out=other")
    assert code == 0, output
    assert "balanced accuracy" in output
    assert "on 6 images" in output
    code, output = command("eval", "run", "eval.threshold=0.3")
    assert (code, "eval.threshold=0.3 has no effect: each image has one label" in output) == (1, True)
    code, output = command("train", *SMALL, "data.csv=all.csv", "run=b")
    assert (code, "data.csv=all.csv has no effect with data.name='digits': give data=csv, too" in output) == (1, True)
