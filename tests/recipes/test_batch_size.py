"""`trainer.batch_size=auto`, with a stand-in for a GPU that runs out of memory. Seconds."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from zoo.messages import UserError
from zoo.recipes import config
from zoo.recipes.classify import batch_size
from zoo.recipes.classify.data import open_data
from zoo.recipes.classify.train import ClassifyRun, train
from zoo.recipes.classify.train_state import TrainState

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Leave what exists out of the search for garbage that follows each trial."""
    gc.collect()
    gc.freeze()


class Device:
    """A step that runs out of memory with more than `memory` images, and knows what is still held."""

    def __init__(self, memory, kind=torch.OutOfMemoryError, text="CUDA out of memory"):
        self.memory, self.kind, self.text, self.tried, self.held = memory, kind, text, [], []

    def __call__(self, size):
        assert [one for one in self.held if one() is not None] == []  # an earlier trial is freed
        images = torch.zeros(size)
        self.held.append(weakref.ref(images))
        self.tried.append(size)
        if size > self.memory:
            raise self.kind(self.text)


@pytest.mark.parametrize(("memory", "found"), [(0, 0), (1, 1), (100, 96), (5000, 96), (64, 64), (47, 32)])
def test_largest_batch(memory, found):
    device = Device(memory)
    assert batch_size.largest(device, batch_size.candidates(None, 800, False)) == found
    assert device.tried == sorted(device.tried)
    assert len(device.tried) < 16


@pytest.mark.parametrize("text", ["CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_other_libraries_run_out_of_memory_too(text):
    assert batch_size.largest(Device(10, RuntimeError, text), [1, 8, 16]) == 8


def test_other_errors_are_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        batch_size.largest(Device(10, RuntimeError, "shapes differ"), [8, 16])


@pytest.mark.parametrize(
    ("effective", "images", "pairs", "sizes"),
    [
        (None, 200, False, [1, 2, 3, 4, 6, 8, 12, 16, 24]),  # eight updates in an epoch
        (None, 200, True, [2, 4, 6, 8, 12, 16, 24]),
        (None, 3, True, [2]),
        (96, 10**6, False, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]),
        (20, 10**6, True, [2, 4, 10, 20]),
    ],
)
def test_sizes_that_are_tried(effective, images, pairs, sizes):
    assert batch_size.candidates(effective, images, pairs) == sizes


@pytest.fixture
def resolve(compose, images, tmp_path, monkeypatch):
    """Resolve the batch size for a GPU, on which a forward pass of more than `most` images runs out of memory."""
    monkeypatch.setattr(batch_size, "_limited", lambda device: nullcontext())
    forward = TrainState.forward

    def call(most, *words):
        def limited(self, inputs, labels):
            if len(inputs) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, inputs, labels)

        monkeypatch.setattr(TrainState, "forward", limited)
        small = ("model=test_vit", "data.img_size=32", "data=imagefolder", f"data.root={images}", "data.num_workers=0")
        cfg = compose(*small, "trainer.batch_size=auto", *words)
        data = open_data(cfg.data, 0)
        start = lambda cfg, folder: ClassifyRun(cfg, data, CPU, folder)  # noqa: E731
        return batch_size.resolve(cfg, GPU, tmp_path / "run", 24, start)

    return call


@pytest.mark.slow
def test_effective_batch_size_is_kept(resolve):
    cfg, [note] = resolve(9, "trainer.effective_batch_size=24", "augment.mixup=0.5", "trainer.ema_decay=0.9")
    assert (cfg.trainer.batch_size, cfg.trainer.effective_batch_size) == (8, 24)
    assert note == "trainer.batch_size=auto: 8 images fit in 90% of the free memory of cuda."


@pytest.mark.slow
def test_without_an_effective_batch_size_the_learning_rate_is_not_scaled(resolve, compose, fit, images, tmp_path):
    cfg, [note] = resolve(2)
    assert (cfg.trainer.batch_size, cfg.optim.lr) == (2, None)
    assert "An update has as many, and optim.lr is not scaled" in note
    fit(tmp_path / "run", images, "trainer.batch_size=2", "trainer.max_updates=1")
    cfg, notes = resolve(3)  # more would fit
    assert (cfg.trainer.batch_size, notes) == (2, ["trainer.batch_size=auto: 2 images, as before."])


@pytest.mark.slow
def test_too_little_memory(resolve):
    with pytest.raises(UserError, match=r"auto: not even 1 image fits in 90% of .*: use trainer.grad_checkpointing"):
        resolve(0)


def test_cpu(compose, tmp_path):
    with pytest.raises(
        UserError, match=r"auto finds the largest batch .* on a GPU, but this run is on cpu: give a num"
    ):
        train(compose("trainer.batch_size=auto", f"run={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["task=segment"], ["probe=linear"]])
def test_only_the_training_of_a_classifier_has_it(compose, words):
    with pytest.raises(UserError, match=r"trainer.batch_size=auto is for the training of a classifier: give a number"):
        config.check(compose("trainer.batch_size=auto", *words))


def test_evaluation_has_it_not(compose):
    with pytest.raises(UserError, match=r"trainer.batch_size=auto is for the training"):
        config.check(compose("trainer.batch_size=auto", name="eval"))


def test_other_words(compose):
    with pytest.raises(UserError, match=r"trainer.batch_size=many is not allowed: it has to be 1 or more, or auto\.$"):
        config.check(compose("trainer.batch_size=many"))
