"""Input of a classifier from images of all kinds, in training, evaluation and prediction. A few seconds."""

import errno
import io
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from zoo.messages import UserError
from zoo.recipes.classify.data import Samples, Stream, build_transform, open_data
from zoo.recipes.config import AugmentConfig, DataConfig


def _size(channels=3, side=8):
    return {"input_size": (channels, side, side), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def _samples(root, channels=3, **options):
    data = open_data(DataConfig(root=str(root), **options), 0)
    most = {"max_pixels": options["max_pixels"]} if "max_pixels" in options else {}
    return Samples(data.train, build_transform(None, _size(channels)), 0, False, (channels, 8, 8), **most)


def _means(samples):
    """The mean of every image, by label."""
    return {samples[0, i][1]: samples[0, i][0].float().mean().item() for i in range(len(samples))}


@pytest.fixture
def deep(tmp_path):
    """Class folders of grey images of 16 bits: one class is dark, the other bright."""
    for name, value in (("dark", 3000), ("white", 40000)):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((10, 12), value, np.uint16)).save(tmp_path / "deep" / name / f"{i}.png")
    return tmp_path / "deep"


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_images_are_scaled(deep, channels):
    assert _means(_samples(deep, channels)) == {0: 3000 // 256, 1: 40000 // 256}


def test_deep_images_of_torchvision_folders_are_scaled(deep):
    assert _means(
        _samples(deep, name="torch/image_folder", train_split="none", val_split="none", same_images=True)
    ) == {0: 11, 1: 156}


def test_deep_images_in_tar_files_are_scaled(deep, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(deep, ".")
    assert _means(_samples(tmp_path / "a.tar", name="tar")) == {0: 11, 1: 156}


class _Images(torch.utils.data.IterableDataset):
    def __init__(self, *images):
        self.images = images

    def __iter__(self):
        yield from ((image, label) for label, image in enumerate(self.images))


def _stream(*images, training=False):
    samples = Samples(_Images(*images), build_transform(None, _size()), 0, training, (3, 8, 8))
    return list(Stream(_Images(*images), samples))


def test_deep_images_of_streams_are_scaled():
    [(image, label, corrupt)] = _stream(Image.fromarray(np.full((8, 8), 40000, np.uint16)))
    assert (image.unique().tolist(), label, corrupt) == ([156], 0, [])


BAD = Image.fromarray(np.full((8, 8), 1e6, np.float32))


def test_image_of_a_stream_that_can_not_be_used_is_skipped_and_named():
    [(_, label, corrupt)] = _stream(BAD, Image.new("RGB", (8, 8)), training=True)
    assert label == 1
    assert corrupt[0].startswith("image 0 of the stream (its numbers range from")


def test_image_of_a_stream_that_can_not_be_used_does_not_count():
    first, second = _stream(BAD, Image.new("RGB", (8, 8)))
    assert (first[1], len(first[2]), second[1], second[2]) == (-1, 1, 1, [])


class _Broken(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield Image.new("RGB", (8, 8)), 0
        raise OSError("connection lost")


def test_stream_that_breaks_off_is_said():
    samples = Samples(_Broken(), build_transform(None, _size()), 0, False, (3, 8, 8))
    with pytest.raises(UserError, match="the data set can't be read to its end: connection lost"):
        list(Stream(_Broken(), samples))


# Channels.


def _write(tmp_path, image, name="1.png", **options):
    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / kind / name, **options)
    (tmp_path / "data" / "a" / "2.png").write_bytes((tmp_path / "data" / "a" / name).read_bytes())
    return tmp_path / "data"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_images_of_all_kinds_for_models_of_all_kinds(tmp_path, mode, channels):
    samples = _samples(_write(tmp_path, Image.new(mode, (10, 12))), channels)
    image, _, corrupt = samples[0, 0]
    assert (tuple(image.shape), corrupt) == ((channels, 8, 8), [])


def test_transparency_reaches_a_model_of_four_channels(tmp_path):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    assert _samples(_write(tmp_path, image), 4)[0, 0][0][:, 0, 0].tolist() == [10, 20, 30, 40]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 5])
def test_models_of_other_channels_are_refused(fit, images, tmp_path, channels):
    with pytest.raises(UserError, match=f"takes images of {channels} channels, but .* set model_kwargs.in_chans to on"):
        fit(tmp_path / "run", images, f"+model_kwargs.in_chans={channels}")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_train(fit, images, tmp_path, channels):
    result = fit(tmp_path / "run", images, f"+model_kwargs.in_chans={channels}", "trainer.max_updates=1")
    assert (result["updates"], result["corrupt_images"]) == (1, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "std"])
def test_normalisation_of_another_number_of_channels_is_refused(fit, images, tmp_path, name):
    with pytest.raises(UserError, match=rf"data.{name}=\[0.5, 0.5\] has 2 numbers, but the model takes 3 channels"):
        fit(tmp_path / "run", images, f"data.{name}=[0.5,0.5]")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["rand-m10-n9-inc1", "v0"], ids=["strongest", "v0"])
def test_every_augmentation_works(policy, channels):
    """timm's policies need colours, and Pillow 13 refuses the arguments of their strongest posterizing."""
    transform = build_transform(AugmentConfig(auto_augment=policy), _size(channels))
    random.seed(0)
    shapes = {transform(Image.new("L" if channels == 1 else "RGB", (30, 30), 99)).shape for _ in range(100)}
    assert shapes == {(channels, 8, 8)}


def test_augmentation_of_four_channels_is_refused():
    with pytest.raises(UserError, match=r"augment.auto_augment=original .* takes 4: set it to null"):
        build_transform(AugmentConfig(auto_augment="original"), _size(4))


# Orientation, size and damage.


@pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.tif", "1.webp"])
def test_images_are_turned(tmp_path, name):
    image = Image.fromarray(np.repeat([[255], [0]], 4, 1).repeat(4, 0)[..., None].repeat(3, -1).astype(np.uint8))
    image = image.resize((8, 16), Image.Resampling.NEAREST)
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter turn: the white top is on the right
    samples = _samples(_write(tmp_path, image, name, exif=exif))
    pixels = samples[0, 0][0][0].float()
    assert pixels[:, :3].mean() < 50
    assert pixels[:, 5:].mean() > 200


def test_very_long_images_are_evaluated(tmp_path):
    samples = _samples(_write(tmp_path, Image.new("RGB", (60_000, 1), (9, 9, 9))))
    assert samples[0, 0][0].unique().tolist() == [9]


def test_images_above_the_limit_are_named_with_its_key(tmp_path):
    samples = _samples(_write(tmp_path, Image.new("RGB", (10, 12))), max_pixels=119)
    assert samples[0, 0][2] == [f"{tmp_path}/data/a/1.png (it has more than data.max_pixels=119 pixels)"]


@pytest.mark.slow
def test_limit_reaches_training(fit, images, tmp_path):
    with pytest.raises(UserError, match=r"more than data\.max_pixels=100 pixels"):
        fit(tmp_path / "run", images, "data.max_pixels=100")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", "half"], ids=["empty", "head", "half"])
def test_damaged_images_in_tar_files_are_named(images, tmp_path, content):
    path = sorted((images / "train").rglob("*.jpg"))[0]
    content = path.read_bytes()[:400] if content == "half" else content
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(images / "train", ".")
        info = tarfile.TarInfo("apple/0.jpg")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    samples = _samples(tmp_path / "a.tar", name="tar")
    [corrupt] = [names for i in range(len(samples)) for names in [samples[0, i][2]] if names]
    assert corrupt[0].startswith("apple/0.jpg (")


class _Rows(Reader):
    """Rows of a table, as readers of Hugging Face and others return them: the second row has no image."""

    def __getitem__(self, index):
        if index:
            raise AssertionError("no image")
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        file.seek(0)
        return file, 1

    def __len__(self):
        return 2

    def _filename(self, index, basename=False, absolute=False):
        return f"row {index}"


@pytest.mark.parametrize("training", [True, False])
def test_rows_without_an_image_are_named(training):
    samples = Samples(ImageDataset("", reader=_Rows()), build_transform(None, _size()), 0, training, (3, 8, 8))
    _, label, corrupt = samples[0, 1]
    assert label == (1 if training else -1)
    assert corrupt == ["row 1 (it has no image (AssertionError: no image))"]


def test_want_of_file_descriptors_is_no_damage(images, monkeypatch):
    samples = _samples(images)

    def open_none(self, index):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(type(samples.dataset.reader), "__getitem__", open_none)
    with pytest.raises(OSError, match="Too many open files"):
        samples[0, 0]
