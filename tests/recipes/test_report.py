"""Reports of runs: content, escaping, comparisons, messages. A few seconds, slow ones 15 s."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import logs, report, run_folder, sheet, timing

HOSTILE = "<script>alert(1)</script>"
CLASSES = ["cat", HOSTILE, "dog"]


def _write_run(folder, task="classify", scores=(50.0, 75.0), ended=True, classes=CLASSES, recipe=None, **settings):
    """A folder like those of zoo-train, with an epoch for each of `scores`, the main score."""
    folder.mkdir(parents=True)
    main, other = {"classify": ("top1", "top5"), "detect": ("mask_AP", "bbox_AP"), "segment": ("mIoU", "mAcc")}[task]
    values = {"model": "test_van", "run": str(folder), "seed": 0, "task": task, "optim": {"lr": 1e-3, "opt": "adamw"}}
    values |= {"dense": {"method": "mask_rcnn" if task == "detect" else ""}} | settings
    (folder / "config.yaml").write_text(json.dumps(values))
    start = {"command": f"zoo-train {HOSTILE}", "data": ["training: 24 images"], "params": 2_000_000, "device": "cpu"}
    start["recipe"] = {"chosen": "recipe=imagenet/van_b0", "settings": recipe or values}
    (folder / "start.json").write_text(json.dumps(start))
    history = [
        {
            **{
                "epoch": i + 1,
                "update": 10 * (i + 1),
                "lr": 1e-3 / (i + 1),
                "train_loss": 2.0 - i,
                "val_loss": 1.5 - i,
            },
            **{f"val_{main}": score, f"val_{other}": 90.0, "seconds": 60.0 * (i + 1), "images_per_second": 100.0},
            "step_seconds": {
                "updates": 2,
                "waiting for images": 0.1,
                "forward": 0.2,
                "backward": 0.6,
                "optimizer": 0.1,
            },
        }
        for i, score in enumerate(scores)
    ]
    run_folder.write_metrics(folder, history)
    counts, confusion = [10, 10, 0], [[0, 0, 10], [1, 0, 4], [1, 1, 6]]
    values = {"classify": "top1", "detect": "mask_AP", "segment": "IoU"}[task]
    run_folder.write_classes(folder, classes, {values: [100.0, 60.0, None]}, counts, "images", confusion)
    if ended:
        summary = {"metrics": {main: scores[-1], other: 90.0}, "params": 2_000_000, "seconds": 120.0}
        (folder / "summary.json").write_text(json.dumps(summary | {"versions": {"torch": "2.0"}}))
    return folder


class _Reader(HTMLParser):
    """Elements, attributes and text; checks that elements are closed in order."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.attributes, self.open, self.words = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def _page(folder):
    reader = _Reader(report.page(report.read(folder)))
    assert not reader.open
    return reader


# A run's page.


PUBLISHED = {"model": "test_van", "mask_ap": 40.8, "box_ap": 44.9, "source": "README"}


def test_page_shows_the_published_figures_of_the_recipe(tmp_path):
    text = _page(_write_run(tmp_path / "run", "detect", published=PUBLISHED)).text
    assert "published mask AP 40.8 README published box AP 44.9 README" in text


def test_page_shows_no_published_figures_of_another_model(tmp_path):
    text = _page(_write_run(tmp_path / "run", "detect", published=PUBLISHED, model="van_b0")).text
    assert "published mask AP" not in text


def test_published_figures_are_not_listed_as_changed_settings(tmp_path):
    run = _write_run(tmp_path / "run", published=PUBLISHED, recipe={"model": "test_van", "published": {"top1": 75.4}})
    assert report._changes(report.read(run)) == []
    other = _write_run(tmp_path / "other", published={**PUBLISHED, "mask_ap": 1.0})
    assert not any("published" in row[0] for row in report._setting_table([report.read(run), report.read(other)]))


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("classify", ["test_van", "top-1 75.00 % of 20 images", "best top-1", "2.00 M", "Confusion matrix"]),
        ("detect", ["mask_rcnn on test_van", "mask AP 75.0", "box AP 90.0"]),
        ("segment", ["mIoU 75.0", "mean accuracy 90.0", "IoU"]),
    ],
)
def test_page_shows_the_scores(tmp_path, task, shown):
    text = _page(_write_run(tmp_path / "run", task)).text
    assert [words for words in shown if words not in text] == []


def test_names_are_escaped(tmp_path):
    page = _page(_write_run(tmp_path / "run", data={"root": f'"/>{HOSTILE}'}))
    assert "script" not in page.elements
    assert page.text.count(HOSTILE) > 3  # class, command, mistakes, setting


def test_page_asks_for_nothing_from_elsewhere(tmp_path):
    folder = _write_run(tmp_path / "run")
    (folder / "predictions.png").write_bytes(b"\x89PNG")
    sources = [value for name, value in _page(folder).attributes if name in ("src", "href")]
    assert len(sources) == 2
    assert all(source.startswith("data:") for source in sources)


def test_curves_have_a_dot_per_epoch(tmp_path):
    source = report.page(report.read(_write_run(tmp_path / "run", scores=(10.0, 30.0, 20.0))))
    chart = re.search(r"<figcaption>top-1</figcaption>.*?</figure>", source, re.DOTALL)[0]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart)]
    assert len(heights) == 3
    assert heights[1] < heights[2] < heights[0]
    assert "validation, epoch 2: 30" in chart


def test_one_epoch_is_enough_for_a_page(tmp_path):
    assert "top-1 40.00 %" in _page(_write_run(tmp_path / "run", scores=(40.0,))).text


def test_differences_from_the_recipe(tmp_path):
    recipe = {"model": "test_van", "seed": 0, "task": "classify", "run": None, "optim": {"lr": 0.5, "opt": "adamw"}}
    folder = _write_run(tmp_path / "run", recipe=recipe, model_kwargs={"drop_path_rate": 0.1})
    record = report.read(folder)
    assert report._changes(record) == [("optim.lr", 0.001, 0.5), ("model_kwargs.drop_path_rate", 0.1, None)]
    assert "What differs from recipe=imagenet/van_b0" in _page(folder).text


def test_matrix_and_mistakes(tmp_path):
    matrix = report._matrix(report.read(_write_run(tmp_path / "run")))
    assert [[cell["text"] for cell in row["cells"]] for row in matrix["rows"]] == [
        *(["100", "", ""], ["40", "60", ""], ["", "", ""])
    ]
    assert matrix["mistakes"] == [(HOSTILE, "cat", "4 of 10", 0.4)]


@pytest.mark.slow
def test_of_many_classes_the_mistaken_and_the_worst_are_shown(tmp_path):
    folder, many = _write_run(tmp_path / "run"), 300
    names = [f"class {i}" for i in range(many)]
    pairs = [[i, i, 10] for i in range(many)] + [[7, 250, 5]]
    scores = [100.0] * many
    scores[7] = 66.6
    run_folder.write_classes(folder, names, {"top1": scores}, [10] * many, "images", pairs)
    record = report.read(folder)
    matrix = report._matrix(record)
    assert len(matrix["names"]) == 40
    assert {"class 7", "class 250"} <= set(matrix["names"])
    assert report._class_table(record)["rows"][0]["name"] == "class 7"
    assert "The 40 of 300 classes" in _page(folder).text


def test_parts_of_a_step_are_means_with_the_slowest_first(tmp_path):
    steps = report._steps(report.read(_write_run(tmp_path / "run")))
    assert steps["updates"] == 4
    assert [(part["name"], round(part["ms"])) for part in steps["parts"][:2]] == [("backward", 300), ("forward", 100)]
    assert sum(part["share"] for part in steps["parts"]) == pytest.approx(1)


def test_killed_run_shows_what_there_is(tmp_path):
    text = _page(_write_run(tmp_path / "run", ended=False)).text
    assert "This run has not ended: the figures are those after update 20." in text
    assert "top-1 75.00 %" in text


def test_run_without_an_evaluation(tmp_path):
    folder = _write_run(tmp_path / "run", ended=False)
    for name in ("metrics.jsonl", "classes.json", "start.json"):
        (folder / name).unlink()
    text = _page(folder).text
    assert "it has not been evaluated yet" in text
    assert "There is no evaluation to draw yet." in text


def test_left_out_updates_and_images_are_named(tmp_path):
    folder = _write_run(tmp_path / "run")
    record = report.read(folder)
    record.history[0]["skipped_updates"] = 3
    record.summary["corrupt_images"] = ["a.jpg"]
    assert report._notes(record)[1:] == [
        "3 updates were skipped because their loss was not finite.",
        "Corrupt images were left out, 1 of them: a.jpg",
    ]


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.0, 2e-4, "0"),
        (4e-4, 2e-4, "4e-4"),
        (2.5, 2.5, "2.5"),
        (20.0, 20.0, "20"),
        (0.2, 0.1, "0.2"),
        (2e5, 1e5, "2e5"),
        (1.25e-3, 5e-5, "1.25e-3"),
    ],
)
def test_ticks(value, step, text):
    assert report._tick(value, step) == text


@pytest.mark.parametrize(("count", "shown"), [(5, False), (6, True)])
def test_top5_is_shown_of_more_than_five_classes(tmp_path, count, shown):
    folder = _write_run(tmp_path / "run")
    run_folder.write_classes(
        folder, [f"c{i}" for i in range(count)], {"top1": [50.0] * count}, [40] * count, "images", []
    )
    assert ("top-5" in _page(folder).text) == shown


@pytest.mark.parametrize(("images", "warned"), [(4, True), (99, True), (100, False)])
def test_scores_of_few_images_say_so(tmp_path, images, warned):
    folder = _write_run(tmp_path / "run", scores=(25.0,))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"val_images": images}))
    text = _page(folder).text
    assert f"top-1 25.00 % of {images} images" in text
    assert (f"The scores are from only {images} images" in text) == warned


def test_class_of_one_image_has_no_bar(tmp_path):
    folder = _write_run(tmp_path / "run")
    run_folder.write_classes(folder, ["a", "b"], {"top1": [100.0, 50.0]}, [1, 40], "images", [])
    assert "1 of the classes has fewer than 10" in _page(folder).text
    cells = re.findall('<td class="bar">(.*?)</td>', report.page(report.read(folder)))
    assert cells == ['<span class="note">of one image</span>', '<i style="width: 50.0%"></i>']


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 3, [1, 2, 3]),
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1, 300, [50, 100, 150, 200, 250, 300]),
        (8, 24, [10, 15, 20]),
        (0.5, 2.5, [1, 2]),
        (0, 0.067, [0, 0.02, 0.04, 0.06]),
    ],
)
def test_epochs_on_the_axis_are_whole(low, high, ticks):
    assert report._epochs(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "first"),
    [(100, 160, 0), (40, 90, 0), (90, 93, 90), (-1, 3, -1), (0, 0, 0), (5, 5, 0), (-5, -5, -5.6)],
)
def test_heights_start_at_zero_unless_values_differ_far_from_it(low, high, first):
    ticks = report._heights(low, high)
    assert ticks[0] == pytest.approx(first)
    assert ticks[-1] >= high


def test_speed_starts_at_zero_and_percentages_end_at_100(tmp_path):
    charts = report._charts([report.read(_write_run(tmp_path / "run", scores=(100.0, 100.0)))])
    ticks = {chart["title"]: [label for _, label in chart["y_ticks"]] for chart in charts}
    assert ticks["training images per second"][0] == "0"
    assert ticks["top-1"][-1] == "100 %"


def test_a_single_evaluation_is_a_dot_with_its_value_and_its_epoch(tmp_path):
    folder = _write_run(tmp_path / "run", "detect", scores=(37.5,))
    record = report.read(folder)
    record.history[0]["epoch"] = 10
    chart = report._charts([record])[1]
    assert [label for _, label in chart["x_ticks"]] == ["0", "2", "4", "6", "8", "10"]
    assert [line["alone"] for line in chart["lines"]] == ["37.5 %", "90 %"]
    assert ">37.5 %</text>" in report.page(record)


def test_values_of_points_that_are_close_do_not_overlap():
    chart = report._chart(
        "loss", [("a", [(20, 0.17)]), ("b", [(20, 0.16)]), ("c", [(1, 0.9), (2, 0.5)])], from_zero=True
    )
    upper, lower, _ = chart["lines"]
    assert upper["dots"][0]["y"] + 4 == upper["value_y"] == lower["value_y"] - 16


DAMAGED = [
    ("summary", {"seconds": 1}, "figures"),
    ("summary", {"metrics": {"top1": "high"}}, "figures"),
    ("history", [{"epoch": "one", "val_top1": 3}], "curves"),
    ("history", [{"epoch": 1, "lr": 1e308}, {"epoch": 2, "lr": -1e308}], "curves"),
    ("classes", {"classes": ["a"]}, "classes"),
    ("classes", {"classes": ["a"], "scores": {"top1": ["b"]}, "counts": [1], "unit": "images"}, "classes"),
    ("classes", {"classes": ["a"], "scores": {}, "counts": [], "unit": "images"}, "confusion matrix"),
    ("facts", {"data": 3}, "data"),
]


@pytest.mark.filterwarnings("ignore:.*in multiply:RuntimeWarning")
@pytest.mark.parametrize(("part", "content", "left_out"), DAMAGED)
def test_page_leaves_out_what_files_do_not_hold(tmp_path, part, content, left_out):
    record = replace(report.read(_write_run(tmp_path / "run")), **{part: content})
    text = _Reader(report.page(record)).text
    assert re.search(rf"Files are damaged or incomplete. [^.]* are left out: [^.]*\b{left_out}\b", text)
    assert "Configuration" in text


def test_comparison_leaves_out_what_files_do_not_hold(tmp_path):
    records = [report.read(_write_run(tmp_path / name)) for name in ("one", "two")]
    records[1].summary = {"seconds": 1}
    text = _Reader(report.comparison(records)).text
    assert "The parts that need them are left out: scores" in text
    assert "Settings that differ" in text


@pytest.fixture
def samples(tmp_path):
    """A run with two sample predictions and a legend."""
    folder = _write_run(tmp_path / "run")
    groups = [[sheet.Tile(Image.new("RGB", (30, 20), color), f"{color} {HOSTILE}")] for color in ("red", "green")]
    sheet.write(folder / "predictions.png", groups, title="Some of them.", legend=[("thing", "#00ff00")])
    return folder


def test_sample_predictions_are_pictures_with_captions(samples):
    page = _page(samples)
    assert page.elements.count("img") == 2
    assert [words for words in ("Some of them.", f"red {HOSTILE}", "thing") if words not in page.text] == []
    assert ("style", "background: #00ff00") in page.attributes


def test_colours_of_a_legend_are_nothing_else(samples, monkeypatch):
    found = sheet.read(samples / "predictions.png")
    monkeypatch.setattr(sheet, "read", lambda path: replace(found, legend=[("bad", "red; background: url(x)")]))
    assert "url(x)" not in report.page(report.read(samples))


def test_picture_without_captions_is_shown_whole(tmp_path):
    folder = _write_run(tmp_path / "run")
    Image.new("RGB", (30, 20)).save(folder / "predictions.png")
    assert _page(folder).elements.count("img") == 1


# Runs that write it.


def test_a_finished_run_has_its_report(finished):
    text = _Reader((finished / "report.html").read_text()).text
    assert "apple" in text
    assert "Sample predictions" in text
    assert "What differs from zoo-train without arguments" in text


def test_times_stand_in_the_metrics(finished):
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])["step_seconds"]
    assert first["updates"] == 1
    assert set(first) == {"updates", "rest", "waiting for images", "forward", "backward", "optimizer"}
    assert all(value > 0 for value in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_dense_runs_have_scores_of_classes_and_times(finished_dense, task):
    record = report.read(finished_dense[task])
    assert list(record.classes["scores"]) == (["mask_AP"] if task == "detect" else ["IoU", "accuracy"])
    assert len(record.classes["classes"]) == len(record.classes["counts"])
    assert (record.classes["confusion"] is None) == (task == "detect")
    steps = report._steps(record)
    assert steps["updates"] == 1
    assert all(part["ms"] > 0 for part in steps["parts"])


def test_a_report_that_fails_spoils_nothing(tmp_path, capsys, monkeypatch):
    logs.start_log(None, True)
    monkeypatch.setattr(report, "page", lambda record: 1 / 0)
    report.write_or_warn(_write_run(tmp_path / "run"))
    assert "The report could not be written (division by zero)" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run" / "report.html").exists()


def test_evaluation_has_a_page_of_its_own(tmp_path):
    facts = {"task": "classify", "model": "test_van", "weights": "w.pt", "metrics": {"top1": 12.5, "images": 8}}
    (tmp_path / "eval.json").write_text(json.dumps(facts | {"data": {"name": "digits", "root": None}}))
    text = _page(tmp_path).text
    assert "Evaluation of classification" in text
    assert "top-1 12.50 %" in text
    assert "w.pt" in text


def test_one_update_in_eleven_is_timed_from_the_second_on():
    times = timing.StepTimes(torch.device("cpu"))
    active = []
    for _ in range(25):
        times.begin()
        active.append(times.active)
        times.lap("forward")
    assert [i for i, on in enumerate(active) if on] == [1, 12, 23]
    assert times.take()["updates"] == 3
    assert times.take() == {"updates": 0}


def test_an_update_that_has_just_begun_counts_with_its_first_part():
    times = timing.StepTimes(torch.device("cpu"))
    times.begin()
    times.begin()
    assert times.take() == {"updates": 0}
    times.restart()
    times.lap("forward")
    times.lap("backward")
    assert times.take()["updates"] == 1


# Comparing.


def test_comparison_shows_scores_and_differing_settings_only(tmp_path):
    one = _write_run(tmp_path / "one")
    two = _write_run(tmp_path / "two", scores=(60.0, 80.0), optim={"lr": 2e-3, "opt": "adamw"})
    records = [report.read(one), report.read(two)]
    assert report._setting_table(records) == [("optim.lr", [0.001, 0.002])]
    rows = report._score_table(records)["rows"]
    assert [row["scores"][0] for row in rows] == [("75.00 %", False), ("80.00 %", True)]
    text = _Reader(report.comparison(records)).text
    assert "2 runs compared" in text
    assert "adamw" not in text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data": {"name": "folder", "root": "b"}}, "data.root: "),
        ({"data": {"name": "coco", "root": "a"}}, "data.name: folder / coco"),
        ({"data": {"name": "folder", "root": "a"}, "classes": ["x", "y", "z"]}, "the classes"),
    ],
)
def test_scores_of_different_data_are_not_ranked(tmp_path, other, said):
    one = _write_run(tmp_path / "one", data={"name": "folder", "root": "a"})
    two = _write_run(tmp_path / "two", scores=(60.0, 80.0), **other)
    records = [report.read(one), report.read(two)]
    assert not any(mark for row in report._score_table(records)["rows"] for _, mark in row["scores"])
    text = _Reader(report.comparison(records)).text
    assert "The runs were validated on different data" in text
    assert said in text
    assert "is bold" not in text


def test_another_number_of_validation_images_is_other_data(tmp_path):
    folders = [_write_run(tmp_path / name) for name in ("one", "two")]
    summary = json.loads((folders[1] / "summary.json").read_text())
    (folders[1] / "summary.json").write_text(json.dumps(summary | {"val_images": 21}))
    assert report._data_differences([report.read(folder) for folder in folders]) == ["validation images: 20 / 21"]


def test_one_folder_by_two_paths_is_the_same_data(tmp_path):
    roots = {"one": "a", "two": "./b/../a/"}
    folders = [_write_run(tmp_path / name, data={"root": root}) for name, root in roots.items()]
    assert report._data_differences([report.read(folder) for folder in folders]) == []


def test_comparison_lists_the_classes_that_differ_most_first(tmp_path):
    records = [report.read(_write_run(tmp_path / name)) for name in ("one", "two")]
    records[1].classes["scores"]["top1"] = [90.0, 90.0, None]
    table = report._class_differences(records)
    assert table["rows"][0] == (30.0, HOSTILE, [(60.0, None), (90.0, 30.0)])
    assert table["rows"][-1] == (0.0, "dog", [(None, None), (None, None)])


def test_settings_that_an_older_version_did_not_have_are_no_difference(tmp_path):
    records = [report.read(_write_run(tmp_path / "old")), report.read(_write_run(tmp_path / "new", data={"new": 1}))]
    assert report._setting_table(records) == []


def test_command_writes_and_says_where(tmp_path, capsys):
    folder = _write_run(tmp_path / "run")
    report.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_command_fails_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert ended.value.code == 1
    assert " ".join(capsys.readouterr().err.split()).startswith("zoo-report: error:")


@pytest.mark.slow
def test_pages_are_replaced(tmp_path):
    folders = [_write_run(tmp_path / name) for name in ("one", "two")]
    for _ in range(2):
        assert report.make(folders, tmp_path / "out.html") == tmp_path / "out.html"


# Messages.


def test_different_tasks_are_not_compared(tmp_path):
    folders = [_write_run(tmp_path / task, task) for task in ("classify", "segment")]
    with pytest.raises(UserError, match=r"no scores in common \(.*classify is task=classify and .* is task=segment\)"):
        report.make(folders, tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", r"summary.json is not JSON: Expecting"),
        (
            "start.json",
            "[]",
            r"start.json is not what zoo writes: the whole is \[\] and has to be a mapping;",
        ),
        ("metrics.jsonl", "{}\nx", r"metrics.jsonl, line 1, is not what zoo writes: the whole has no 'epoch'"),
        ("config.yaml", "a: [", r"config.yaml is not the configuration of a run \("),
        ("config.yaml", "a: 1", r"config.yaml is not the configuration of a run: it names no task and model"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    folder = _write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        report.make([folder], None)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run or an evaluation: it has neither config.yaml nor"):
        report.make([tmp_path], None)


def test_other_json_is_refused(tmp_path):
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=r"eval.json is not what zoo writes: the whole has no 'metrics'"):
        report.make([tmp_path], None)


def test_files_of_others_are_kept(tmp_path):
    folder, other = _write_run(tmp_path / "run"), tmp_path / "thesis.html"
    other.write_text("mine")
    with pytest.raises(UserError, match=r"thesis.html exists and is not a page of zoo-report"):
        report.make([folder], other)
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "message"),
    [(".", r"is a folder: give a file, -o"), ("none/out.html", r"the folder .*none does not exist: create it")],
)
def test_bad_output_is_refused(tmp_path, out, message):
    with pytest.raises(UserError, match=message):
        report.make([_write_run(tmp_path / "run")], tmp_path / out)
