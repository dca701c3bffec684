"""zoo-embed: features of any images in files, and their table. Seconds; slow ones 15 s, the long one minutes."""

import csv
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from zoo.messages import UserError
from zoo.recipes.classify import embed as work
from zoo.recipes.commands import embed as command
from zoo.recipes.embeddings import State, Table
from zoo.recipes.npy_rows import NpyRows

IDENTITY = {"model": "x", "weights": 64 * "a", "features": "pooled", "preprocessing": {"crop_pct": 0.9}}


@pytest.fixture
def embed(monkeypatch, capsys, finished):
    """Run zoo-embed in this process with the classifier `finished`; returns the exit code and the output."""

    def run(*words):
        words = (f"run={finished}", "device=cpu", "data.num_workers=0", "trainer.batch_size=4", *words)
        monkeypatch.setattr(sys, "argv", ["zoo-embed", *map(str, words)])
        code = 0
        try:
            command.main()
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def photos(images, tmp_path):
    """A copy of the 15 validation images that a test may change."""
    return shutil.copytree(images / "val", tmp_path / "photos")


def values(out):
    return np.load(out / "features.npy")


def names(out):
    with open(out / "names.csv", newline="", encoding="utf-8") as file:
        return [row["image"] for row in csv.DictReader(file)]


def about(out):
    return json.loads((out / "embed.json").read_text())


# The command.


@pytest.mark.slow
def test_folder_is_embedded(embed, photos, tmp_path, monkeypatch):
    code, output = embed(photos, tmp_path / "out")
    assert code == 0, output
    assert "pooled features, 64, of 15 images" in output
    assert f"{tmp_path / 'out' / 'features.npy'}: 15x64; the images of the rows are in" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embed.json", "features.npy", "names.csv"]
    assert names(tmp_path / "out") == sorted(map(str, photos.rglob("*.jpg")))
    assert about(tmp_path / "out")["images"] == 15
    # Each alone, as a list of files.
    embed("trainer.batch_size=1", *sorted(photos.rglob("*.jpg")), tmp_path / "alone")
    np.testing.assert_allclose(values(tmp_path / "alone"), values(tmp_path / "out"), atol=1e-5)
    monkeypatch.setattr(work, "_compute", None)
    code, output = embed(photos, tmp_path / "out")
    assert code == 0, output
    assert f"Nothing to compute: {tmp_path / 'out'} has the features of all 15 images." in output


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_continued(embed, photos, tmp_path, monkeypatch, workers):
    add, calls = Table.add, []

    def stop(table, *arguments):
        add(table, *arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    words = (f"data.num_workers={workers}", photos, tmp_path / "out")
    monkeypatch.setattr(Table, "add", stop)
    code, output = embed(*words)
    assert code == 130
    assert f"Stopped: {tmp_path / 'out'} has the features of 8 images. The same command goes on." in output
    assert values(tmp_path / "out").shape == (8, 64)
    code, output = embed(*words)
    assert code == 0, output
    assert f"of 7 images; {tmp_path / 'out'} has the other 8" in output
    assert names(tmp_path / "out") == sorted(map(str, photos.rglob("*.jpg")))
    embed(photos, tmp_path / "whole")
    np.testing.assert_allclose(values(tmp_path / "out"), values(tmp_path / "whole"), atol=1e-5)


@pytest.mark.slow
def test_images_that_are_new_or_have_changed(embed, photos, tmp_path, monkeypatch):
    out, first = tmp_path / "out", photos / "apple" / "0_00.jpg"
    embed(photos, out)
    before = values(out)
    shutil.copy(photos / "cherry" / "2_00.jpg", first)
    shutil.copy(photos / "cherry" / "2_01.jpg", photos / "new.jpg")
    (photos / "banana" / "1_00.jpg").unlink()
    monkeypatch.chdir(tmp_path)
    code, output = embed("photos", first, "out")  # the images have other names in the command
    assert code == 0, output
    assert "of 2 images; out has the other 14" in output
    assert names(out)[:15] == sorted([*map(str, photos.glob("*/*.jpg")), str(photos / "banana" / "1_00.jpg")])
    assert names(out)[15:] == [str(photos / "new.jpg")]
    after = values(out)
    np.testing.assert_allclose(after[[0, 15]], before[[10, 11]], atol=1e-5)
    np.testing.assert_array_equal(after[1:15], before[1:])


@pytest.mark.slow
def test_damaged_images_are_named_and_left_out(embed, photos, tmp_path, monkeypatch):
    (photos / "cut.jpg").write_bytes((photos / "apple" / "0_00.jpg").read_bytes()[:300])
    (photos / "text.png").write_text("no image")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    Image.new("RGB", (40, 40)).save(photos / "black.png")
    compute = work.Extractor.__call__

    def fail(extractor, pixels):
        if len(pixels) and any(image.max() == 0 for image in pixels) and monkeypatched:
            raise RuntimeError("it is too dark")
        return compute(extractor, pixels)

    monkeypatched = []
    monkeypatch.setattr(work.Extractor, "__call__", fail)
    init = work.Extractor.__init__
    monkeypatch.setattr(work.Extractor, "__init__", lambda *args: (init(*args), monkeypatched.append(1))[0])
    code, output = embed(photos, tmp_path / "out")
    assert code == 1
    for name in ("cut.jpg", "text.png", "loop.jpg"):
        assert f"{photos / name} can't be read as an image (" in output
    assert f"{photos / 'black.png'} is left out: the model can't take it (it is too dark)." in output
    assert "3 of 19 files can't be read as images, beginning with" in output
    assert len(names(tmp_path / "out")) == len(values(tmp_path / "out")) == 15
    assert {Path(path).name for path in about(tmp_path / "out")["left_out"]} == {
        *("cut.jpg", "text.png", "loop.jpg", "black.png")
    }


@pytest.mark.slow
def test_maps_and_copies_in_other_formats(embed, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    embed("features=map", "format=parquet", photos / "apple", out)
    embed("features=map", "format=safetensors", photos / "apple", out)
    code, output = embed("features=map", photos, out)
    assert code == 0, output
    assert values(out).shape == (15, 64, 2, 2)
    np.testing.assert_array_equal(load_file(out / "features.safetensors")["features"], values(out))
    table = parquet.read_table(out / "features.parquet")
    assert table.column("image").to_pylist() == names(out)
    found = np.array(table.column("features").to_pylist(), np.float32)
    shape = json.loads(table.schema.metadata[b"shape"])
    np.testing.assert_array_equal(found.reshape(-1, *shape), values(out))
    code, output = embed(photos, out)
    assert code == 1
    assert f'{out} was written with features="map", not "pooled": choose another output folder.' in output


@pytest.mark.slow
def test_weights_of_a_file_in_place_of_a_run(embed, finished, photos, tmp_path):
    code, output = embed(
        *("run=", "model=test_vit", f"pretrained={finished}", "data.img_size=32", photos / "apple", tmp_path / "out")
    )
    assert code == 0, output
    embed(photos / "apple", tmp_path / "run")
    np.testing.assert_array_equal(values(tmp_path / "out"), values(tmp_path / "run"))


@pytest.mark.slow
def test_disk_that_is_full(embed, photos, tmp_path, monkeypatch):
    append = NpyRows.append

    def full(rows, features):
        if len(rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(rows, features)

    with monkeypatch.context() as patch:
        patch.setattr(NpyRows, "append", full)
        code, output = embed(photos, tmp_path / "out")
    assert code == 1
    assert f"could not write to {tmp_path / 'out'}: No space left on device; the features before are kept." in output
    code, output = embed(photos, tmp_path / "out")
    assert code == 0, output
    assert "of 11 images" in output


WRONG = {
    "photos out": "nothing says which model: give run=<folder of a run>, or model=<name> with pretrained=true",
    "run=r model=van_b0 photos out": "run=r and model=van_b0 are both given: leave out one of them",
    "run=r out": "give the images (files or folders) and then the output folder",
    "run=r photos out": "there is no run folder r",
    "run=r pretrained=true photos out": "pretrained is for model=, but r is a run, with its own",
    "run=r model_kwargs.in_chans=1 photos out": "model_kwargs is for model=, but r is a run",
    "run=r checkpoint=first photos out": "checkpoint=first is not allowed: it has to be last or best",
    "run=r features=cls photos out": "features=cls is not allowed: it has to be pooled or map",
    "run=r format=csv photos out": "format=csv is not allowed: it has to be npy, parquet or safetensors",
    "run=r feature=map photos out": "there is no key 'feature': did you mean features?",
    "run=r data.root=x photos out": "data.root does not affect features: leave it out",
    "model=van_b0 photos out": "model=van_b0 alone has random weights, whose features mean nothing",
    "model=van_b9 photos out": "there is no model 'van_b9': did you mean van_b",
    "model=van_b0 pretrained=x.pth photos out": "pretrained=x.pth does not exist",
    "model=photos photos out": "model=photos is a folder: write run=photos.",
    "model=van_b0 pretrained=true nowhere out": "nowhere does not exist",
    "--features map photos out": "write features=map for --features",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save("photos/a.png")
    monkeypatch.setattr(sys, "argv", ["zoo-embed", *words.split()])
    with pytest.raises(SystemExit):
        command.main()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("zoo-embed: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_run_of_a_detector_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    Path("r/config.yaml").write_text("task: detect\nmodel: van_b0\n")
    monkeypatch.setattr(sys, "argv", ["zoo-embed", "run=r", "photos", "out"])
    with pytest.raises(SystemExit):
        command.main()
    assert "r is a run of task=detect: give that of a classifier, or model=<name>." in capsys.readouterr().err


def test_parquet_without_its_package(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="format=parquet needs pyarrow: run pip install pyarrow"):
        command.parse(["run=r", "format=parquet", "photos", "out"])


# The table.

ODD = ["a.jpg", "b,c.jpg", 'd"e.jpg', "f\ng.jpg", "h\r\n,1,2\n.jpg", "Фото.jpg"]


def fill(folder, images=ODD, identity=IDENTITY):
    """Write a table with a batch for each two images: image n has the size n and the features (n, n, n)."""
    folder.mkdir(exist_ok=True)
    with Table(folder, identity, (3,)) as table:
        for start in range(0, len(images), 2):
            part = [image for image in images[start : start + 2] if table.state(Path(image)) is None]
            sizes = [images.index(image) for image in part]
            features = np.repeat(np.array(sizes, np.float32)[:, None], 3, axis=1)
            table.add([Path(image) for image in part], [State(size, 7) for size in sizes], features)
    return folder


def test_table_has_names_of_all_kinds(tmp_path):
    assert names(fill(tmp_path)) == ODD
    np.testing.assert_array_equal(values(tmp_path), np.repeat(np.arange(6)[:, None], 3, axis=1))
    with Table(tmp_path, IDENTITY, (3,)) as table:
        assert [table.state(Path(image)) for image in ODD] == [State(size, 7) for size in range(6)]


@pytest.mark.parametrize("rows", [0, 1, 13, 24, 30])  # bytes that are missing of features.npy
def test_table_that_was_cut_off_anywhere_goes_on(tmp_path, rows):
    fill(tmp_path / "whole")
    content = (tmp_path / "whole" / "names.csv").read_bytes()
    for length in range(0, len(content), 4):
        cut = shutil.copytree(tmp_path / "whole", tmp_path / f"cut{length}")
        (cut / "names.csv").write_bytes(content[:length])
        with open(cut / "features.npy", "r+b") as file:
            file.truncate((cut / "features.npy").stat().st_size - rows)
        fill(cut)
        assert names(cut) == ODD, length
        np.testing.assert_array_equal(values(cut), values(tmp_path / "whole"))


def test_table_after_a_power_failure(tmp_path):
    content = (fill(tmp_path) / "names.csv").read_bytes()
    (tmp_path / "names.csv").write_bytes(content[:-20] + bytes(40))
    assert names(fill(tmp_path)) == ODD


REFUSED = {
    "another model": ({**IDENTITY, "model": "y"}, 'was written with model="x", not "y": choose another output folder'),
    "another crop": ({**IDENTITY, "preprocessing": {"crop_pct": 1.0}}, r"was written with crop_pct=0\.9, not 1\.0"),
    "other weights": (
        {**IDENTITY, "weights": 64 * "b"},
        "was written with weights=aaaaaaaaaaaa..., not bbbbbbbbbbbb...:",
    ),
    "one more setting": ({**IDENTITY, "amp": "bfloat16"}, 'was written with amp=null, not "bfloat16"'),
}


@pytest.mark.parametrize(("identity", "message"), REFUSED.values(), ids=REFUSED)
def test_other_features_are_refused(tmp_path, identity, message):
    fill(tmp_path)
    with pytest.raises(UserError, match=message):
        Table(tmp_path, identity, (3,))
    assert names(tmp_path) == ODD


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "features.npy").write_text("mine")
    with pytest.raises(UserError, match=r"features.npy exists, but no embed.json says what it is: choose another"):
        Table(tmp_path, IDENTITY, (3,))
    assert (tmp_path / "features.npy").read_text() == "mine"


@pytest.mark.parametrize(
    "edit", [lambda lines: lines[:2] + lines[3:], lambda lines: lines[::-1], lambda lines: lines[1:]]
)
def test_names_that_were_edited_are_refused(tmp_path, edit):
    fill(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    lines = (tmp_path / "names.csv").read_text().splitlines(keepends=True)
    (tmp_path / "names.csv").write_text("".join(edit(lines)))
    with pytest.raises(
        UserError, match=r"names.csv is not as zoo-embed wrote it \(.*\): restore it, or choose another"
    ):
        Table(tmp_path, IDENTITY, (3,))
    assert len(values(tmp_path)) == 4


def test_features_that_were_replaced_are_refused(tmp_path):
    np.save(fill(tmp_path) / "features.npy", np.zeros((6, 4), np.float32))
    with pytest.raises(UserError, match=r"features.npy can't be continued \(it has rows of the shape \(4,\)"):
        Table(tmp_path, IDENTITY, (3,))


def test_folder_that_has_moved_with_its_images(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        fill(Path("out"), ["photos/a.jpg"]) if name == "here" else shutil.copytree("../here/out", "out")
        with Table(Path("out"), IDENTITY, (3,)) as table:
            assert table.state(Path("photos/a.jpg")) == State(0, 7)
            assert table.state(tmp_path / "here" / "photos" / "a.jpg") == State(0, 7)
            assert table.state(Path("a.jpg")) is None


# Many images.


def make_images(folder: Path, count: int) -> Path:
    """Write `count` JPEGs of 64x64 pixels in seconds, each of another colour."""
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"{number // 1000:02}").mkdir(parents=True)
        colour = (number % 256, number // 256, 128)
        Image.new("RGB", (64, 64), colour).save(folder / f"{number // 1000:02}" / f"{number:05}.jpg", quality=95)
    return folder


def memory(pid: int) -> float:
    """The memory of a process in MiB, without the files that it has mapped; 0 if it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_20000_images_interrupted_killed_and_continued(start_cli, tmp_path):
    """Their features take 80 MiB, and their pixels 234 MiB."""
    make_images(tmp_path / "photos", 20_000)
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "weights.safetensors")
    model = ("model=test_vit", "pretrained=weights.safetensors", "data.img_size=64", "device=cpu")
    words = (*model, "data.num_workers=1", "features=map", "photos", "out")
    peaks = []
    for number, target in enumerate((1_000, 8_000, 14_000, 20_000)):
        process = start_cli(*words, cwd=tmp_path, module="commands.embed", program="pass")
        peak = 0.0
        while process.poll() is None:
            time.sleep(0.2)
            lines = tmp_path / "out" / "names.csv"
            done = lines.read_bytes().count(b"\n") - 1 if lines.exists() else 0
            if process.poll() is None and done:
                peak = max(peak, memory(process.pid))
            if target <= done < 20_000:
                process.send_signal(signal.SIGKILL if number == 1 else signal.SIGINT)
                break
        output, _ = process.communicate(timeout=600)
        assert process.returncode == (130, -signal.SIGKILL, 130, 0)[number], output
        assert len(values(tmp_path / "out")) >= target
        peaks.append(peak)
    assert names(tmp_path / "out") == [f"photos/{n // 1000:02}/{n:05}.jpg" for n in range(20_000)]
    assert values(tmp_path / "out").shape == (20_000, 64, 4, 4)
    assert max(peaks) - peaks[0] < 40
    some = [f"photos/{n // 1000:02}/{n:05}.jpg" for n in range(7, 20_000, 997)]
    process = start_cli(*words[:-2], *some, "some", cwd=tmp_path, module="commands.embed", program="pass")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    np.testing.assert_allclose(values(tmp_path / "some"), values(tmp_path / "out")[7::997], atol=1e-4)
