"""Features of frozen models: what they are, and their cache. 15 s."""

import os
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from zoo.messages import UserError
from zoo.recipes import cache, features
from zoo.recipes.classify.data import open_data
from zoo.recipes.classify.model import build_model, input_config
from zoo.recipes.features import Extractor, split_features, weights_hash
from zoo.recipes.npy_rows import NpyRows


@pytest.fixture(autouse=True)
def cached(monkeypatch, tmp_path):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zoo" / "features"


@pytest.fixture
def computed(compose):
    """The features of a split of an image folder, by test_vit; `state` are its weights."""

    def call(root, split="train", *overrides, kind="pooled", state=None):
        words = ("model=test_vit", "data.img_size=32", "data=imagefolder", f"data.root={root}", "data.num_workers=0")
        cfg = compose(*words, "trainer.batch_size=5", *overrides)
        data = open_data(cfg.data, cfg.seed)
        torch.manual_seed(0)
        model = build_model(cfg, len(data.classes))
        if state:
            model.load_state_dict(state)
        return split_features(cfg, model, data, split, kind)

    return call


@pytest.fixture
def photos(images, tmp_path):
    """A copy of the image folder that a test may change."""
    return shutil.copytree(images, tmp_path / "photos")


# What they are.


@pytest.mark.parametrize("name", ["test_van", "test_maxvit", "test_vim", "test_vit", "test_resnet"])
def test_pooled_features_are_those_without_a_classifier(name, compose):
    cfg = compose(f"model={name}", "data.img_size=64")
    model = build_model(cfg, 7)
    config = input_config(model, cfg.data)
    pixels = torch.randint(256, (2, *config["input_size"]), dtype=torch.uint8)
    extractor = Extractor(model, config)
    found, maps = extractor(pixels), Extractor(model, config, "map")(pixels)
    assert maps.shape[:2] == found.shape == (2, *extractor.shape)
    assert maps.ndim == 4
    model.reset_classifier(0)
    with torch.no_grad():
        expected = model(extractor._normalize(pixels)).numpy()
    np.testing.assert_array_equal(found, expected)


def test_pooled_features_of_a_split_are_those_of_its_files(computed, images):
    found = computed(images)
    assert (found.values.shape, found.values.dtype) == ((24, 64), np.float32)
    assert [name.split("/")[-2] for name in found.names] == [found.classes[label] for label in found.labels]
    assert found.names == sorted(map(str, (images / "train").rglob("*.jpg")))
    alone = computed(images, "val")
    assert len(alone.values) == len(alone.names) == 15
    assert not set(alone.names) & set(found.names)


def test_features_of_images_that_are_held_out(computed, images):
    train, val = (computed(images / "train", split, "data.val_fraction=0.25") for split in ("train", "val"))
    assert (len(train.values), len(val.values)) == (18, 6)
    assert sorted(train.names + val.names) == sorted(map(str, (images / "train").rglob("*.jpg")))
    assert sorted([*train.positions, *val.positions]) == list(range(24))


def test_labels_and_positions_of_digits(compose):
    cfg = compose("model=test_vit", "data.img_size=32", "data=digits")
    data = open_data(cfg.data, cfg.seed)
    data.val_indices = range(3, 360, 40)
    found = split_features(cfg, build_model(cfg, 10), data, "val")
    assert found.labels.tolist() == data.val.targets[3::40].tolist()
    assert found.positions.tolist() == list(range(3, 360, 40))
    assert found.names[:2] == ["image 3", "image 43"]


def test_image_that_can_not_be_read_is_left_out(computed, photos, caplog):
    broken = photos / "train" / "banana" / "1_03.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    found = computed(photos)
    assert len(found.values) == len(found.labels) == len(found.names) == 23
    assert str(broken) not in found.names
    assert 11 not in found.positions
    assert found.corrupt[0].startswith(f"{broken} (")
    with pytest.raises(
        UserError, match=r"1 images are corrupt, more than data.max_corrupt=0, beginning with .*1_03.jpg"
    ):
        computed(photos, "train", "data.max_corrupt=0", "data.crop_pct=1")


def test_stream_is_read_once_and_in_order(compose, images, tmp_path):
    import webdataset

    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards" / "train.tar")) as shard:
        for number in range(10):
            pixels = Image.new("RGB", (40, 40), (20 * number, 0, 0))
            shard.write({"__key__": f"{number:04}", "jpg": pixels, "cls": number % 3})
    shutil.copy(tmp_path / "shards" / "train.tar", tmp_path / "shards" / "val.tar")
    where = ("data.name=wds/x", f"data.root={tmp_path / 'shards'}", "data.num_classes=3", "data.num_workers=0")
    split = ("data.train_split=train.tar", "data.val_split=val.tar", "data.num_samples=10", "data.val_num_samples=10")
    cfg = compose("model=test_vit", "data.img_size=32", *where, *split, "trainer.batch_size=4")
    data, model = open_data(cfg.data, cfg.seed), build_model(cfg, 3)
    train, val = (split_features(cfg, model, data, split) for split in ("train", "val"))
    assert train.labels.tolist() == [number % 3 for number in range(10)]
    np.testing.assert_array_equal(train.values, val.values)


def test_features_that_are_not_finite_are_refused(computed, images, cached):
    state = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
    state["norm.bias"].fill_(float("nan"))
    with pytest.raises(UserError, match=r"the features of .*0_00.jpg are not finite: check the weights\."):
        computed(images, state=state)
    assert list(cached.iterdir()) == []


def test_unknown_kind(computed, images):
    with pytest.raises(UserError, match="features=maps is not allowed: it has to be pooled or map"):
        computed(images, kind="maps")


# The cache.


def test_features_are_computed_once(computed, images, monkeypatch):
    first = computed(images)
    monkeypatch.setattr(features, "_compute", None)
    again = computed(images, "train", "trainer.batch_size=3")
    np.testing.assert_array_equal(again.values, first.values)
    assert (again.names, again.classes) == (first.names, first.classes)
    assert not again.values.flags.writeable


CHANGES = {
    "file": lambda photos: os.utime(photos / "train" / "apple" / "0_00.jpg", (1, 1)),
    "content": lambda photos: Image.new("RGB", (40, 40)).save(photos / "train" / "apple" / "0_00.jpg"),
    "another image": lambda photos: shutil.copy(photos / "train" / "apple" / "0_00.jpg", photos / "train/apple/9.jpg"),
    "another class": lambda photos: (photos / "train" / "apple").rename(photos / "train" / "pear"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_the_data_is_noticed(computed, photos, cached, change):
    computed(photos)
    CHANGES[change](photos)
    shutil.rmtree(photos / "val")
    computed(photos, "train", "data.val_fraction=0.1", "data.val_split=train", "data.same_images=true")
    assert len(list(cached.iterdir())) == 2


@pytest.mark.parametrize(
    "overrides",
    [["data.crop_pct=0.5"], ["data.mean=[0.1]"], ["data.interpolation=nearest"], ["trainer.amp=bf16"]],
    ids=str,
)
def test_change_of_the_preprocessing_is_noticed(computed, images, cached, overrides):
    computed(images, "val")
    computed(images, "val", *overrides)
    assert len(list(cached.iterdir())) == 2


def test_change_of_the_weights_is_noticed_but_not_of_the_classifier(computed, images, cached):
    state = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
    computed(images, "val", state=state)
    computed(images, "val", state=state | {"head.weight": state["head.weight"] + 1})
    assert len(list(cached.iterdir())) == 1
    computed(images, "val", state=state | {"norm.bias": state["norm.bias"] + 1e-6})
    assert len(list(cached.iterdir())) == 2


def test_every_kind_of_weights_has_a_hash():
    model = timm.create_model("test_resnet")  # its BatchNorm counts batches in a number without dimensions
    before = weights_hash(model)
    assert before == weights_hash(model)
    model.bn1.num_batches_tracked += 1
    assert weights_hash(model) != before


def test_cache_that_can_not_be_written(computed, images, cached):
    cached.parent.parent.write_text("")
    with pytest.raises(UserError, match=r"can't be written to .* environment variable XDG_CACHE_HOME"):
        computed(images)


def test_features_that_another_process_has_published(computed, images, monkeypatch):
    publish = cache.publish

    def twice(folder, write):
        publish(folder, write)
        publish(folder, write)

    monkeypatch.setattr(cache, "publish", twice)
    assert len(computed(images).values) == 24


def test_damaged_cache(computed, images, cached):
    computed(images)
    [folder] = cached.iterdir()
    (folder / "features.npy").write_bytes(b"")
    with pytest.raises(UserError, match=f"the cached features in {folder} can't be read .*: delete it"):
        computed(images)


# The file that grows.


def test_rows_are_a_readable_file_at_any_time(tmp_path):
    path, values = tmp_path / "a.npy", np.arange(60, dtype=np.float32).reshape(10, 2, 3)
    with NpyRows(path, (2, 3)) as rows:
        assert np.load(path).shape == (0, 2, 3)
        for start in (0, 3, 6):
            rows.append(values[start : start + 3])
            np.testing.assert_array_equal(np.load(path), values[: start + 3])
    with NpyRows(path, (2, 3)) as rows:
        assert len(rows) == 9
        rows.truncate(7)
        rows.append(values[7:])
        rows.replace(0, -values[0])
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), [-values[0], *values[1:]])
    with pytest.raises(ValueError, match="rows of the shape"):
        NpyRows(path, (6,))


def test_header_of_rows_has_room_for_any_number(tmp_path):
    with NpyRows(tmp_path / "a.npy", (4,)) as rows:
        rows.append(np.ones((1, 4), np.float32))
        rows.count = 10**12
        rows._write_header()
        rows.truncate(1)
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 1, 1, 1]]
