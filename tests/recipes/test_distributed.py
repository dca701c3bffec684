"""Two processes under torchrun on the CPU: the same weights, figures and messages as one. Slow 1 min, long 3 min."""

import os
import re
import signal
import time

import pytest
import timm
import torch

from zoo.freezing import freeze
from zoo.recipes.seeding import seed_all

pytestmark = pytest.mark.slow

ARGS = (
    "model=test_convnext",  # no BatchNorm, whose statistics depend on the batch of each process
    "data=imagefolder",
    "data.img_size=32",
    "data.num_workers=0",
    "augment=none",
    "optim=sgd",
    "optim.lr=0.05",
    "schedule.warmup_epochs=0",
    "trainer.device=cpu",
    "trainer.epochs=2",
    "trainer.effective_batch_size=8",
    "log.wandb=disabled",
)
KINDS = ("ddp", "fsdp")
CASES = {
    "plain": ("trainer.batch_size=4",),
    "averaged": (
        *("trainer.batch_size=2", "trainer.ema_decay=0.8"),
        *("augment.repeats=3", "optim.lr_factors={head:0.1}", "trainer.freeze=1"),
    ),
}
# The second one also accumulates two batches for an update.
TRIED = [("ddp", "plain"), ("ddp", "averaged"), ("fsdp", "averaged")]


@pytest.fixture(scope="module")
def train(run_cli, train_here, images):
    """Train in `processes` processes (1: in this one) below a folder; returns the run folder."""

    def call(cwd, processes, *more):
        words = (*ARGS, f"data.root={images}", "run=run", *more)
        if processes == 1:
            train_here(cwd, *words)
            return cwd / "run"
        code, output = run_cli(*words, cwd=cwd, processes=processes)
        assert code == 0, output
        return cwd / "run"

    return call


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """Runs of one process with the same images per update."""
    done = {}

    def get(case):
        if case not in done:
            more = [word for word in CASES[case] if "batch_size" not in word]
            done[case] = train(tmp_path_factory.mktemp("alone"), 1, "trainer.batch_size=8", *more)
        return done[case]

    return get


@pytest.fixture(scope="module")
def together(train, tmp_path_factory):
    """Runs of two processes."""
    done = {}

    def get(kind, case="averaged"):
        if (kind, case) not in done:
            cwd = tmp_path_factory.mktemp("together")
            done[kind, case] = train(cwd, 2, f"trainer.parallel={kind}", *CASES[case])
        return done[kind, case]

    return get


@pytest.mark.parametrize(("kind", "case"), [pytest.param(*TRIED[0], marks=pytest.mark.long), *TRIED[1:]])
def test_weights_are_those_of_one_process(alone, together, weights, kind, case):
    one, two = weights(alone(case)), weights(together(kind, case))
    assert one.keys() == two.keys()
    # The same images summed in another order: rounding in float32, 6e-8 relative, amplified by six updates.
    assert [name for name in one if not torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5)] == []


@pytest.mark.long
@pytest.mark.parametrize(("kind", "case"), TRIED)
def test_figures_are_those_of_one_process(alone, together, summary, kind, case):
    one, two = summary(alone(case)), summary(together(kind, case))
    assert two["metrics"]["top1"] == one["metrics"]["top1"]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)
    assert (two["updates"], two["val_images"], two["processes"]) == (6, 15, 2)


def test_processes_are_said(together):
    text = (together("ddp") / "train.log").read_text()
    assert "8 images per update = 2 images x 2 processes (ddp) x 2 passes, accumulated" in text


def test_one_process_writes(together):
    """The lines of the second process would double those of the first."""
    text = (together("ddp") / "train.log").read_text()
    assert text.count("24 training and 15 validation images") == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_every_image_once(run_cli, together, summary, tmp_path, kind):
    folder = together(kind)
    code, output = run_cli(
        f"run={folder}", f"out={tmp_path / 'out'}", "trainer.device=cpu", cwd=tmp_path, module="eval", processes=2
    )
    assert code == 0, output
    assert f"top-1 {summary(folder)['metrics']['top1']:.2f} %" in output
    assert "on 15 images" in output


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_run_continues(train, together, tmp_path, weights, kind):
    more = (f"trainer.parallel={kind}", *CASES["averaged"])
    train(tmp_path, 2, *more, "trainer.max_updates=4")
    one, two = weights(together(kind)), weights(train(tmp_path, 2, *more))
    # As above: reductions between processes sum in another order.
    assert [name for name in one if not torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-5)] == []


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_part_stays_as_it_was(compose, together, kind):
    """Of the weights and of their averages, bit by bit; other parameters change.

    Not the weights of 1 of the blocks' norms: a block's output is scaled by 1e-6 at first, and so are its gradients.
    """
    seed_all(compose().seed)
    before = timm.create_model("test_convnext", num_classes=3)
    freeze(before, "test_convnext", "1")
    frozen = {name for name, parameter in before.named_parameters() if not parameter.requires_grad}
    state = torch.load(together(kind) / "last.pt", weights_only=True)["training"]
    for weights in (state["model"], state["ema"]):
        same = {name for name, value in before.named_parameters() if torch.equal(value, weights[name])}
        assert frozen <= same
        assert [name for name in same - frozen if not name.endswith("norm.weight")] == []


@pytest.mark.long
def test_two_processes_learn_digits(run_cli, tmp_path, summary):
    args = ("trainer.device=cpu", "log.wandb=disabled", "trainer.batch_size=16", "trainer.epochs=4", "run=run")
    code, output = run_cli(*args, cwd=tmp_path, processes=2)
    assert code == 0, output
    assert summary(tmp_path / "run")["metrics"]["top1"] >= 90


# Failures.

LONG = ("trainer.epochs=500", "trainer.save_minutes=0", "trainer.batch_size=4", "model=test_vit")


def _ranks(pid):
    """The processes that torchrun started, oldest first."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def _wait_for_checkpoint(process, folder):
    while not (folder / "last.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture
def long_run(start_cli, images, tmp_path):
    process = start_cli(*ARGS, *LONG, f"data.root={images}", "run=run", cwd=tmp_path, processes=2)
    try:
        _wait_for_checkpoint(process, tmp_path / "run")
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_lost_process_ends_the_run_and_keeps_the_checkpoint(long_run, tmp_path):
    os.kill(_ranks(long_run.pid)[-1], signal.SIGKILL)
    output, _ = long_run.communicate(timeout=600)
    assert long_run.returncode != 0
    assert re.search(r"lost another process|Stopped by SIGTERM", output), output
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["update"] >= 1


@pytest.mark.long
def test_sigterm_to_torchrun_saves(long_run, tmp_path):
    long_run.send_signal(signal.SIGTERM)
    output, _ = long_run.communicate(timeout=600)
    update = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]["update"]
    assert f"Stopped by SIGTERM after update {update}, and saved." in output


def test_bad_data_is_one_error(run_cli, tmp_path):
    code, output = run_cli(*ARGS, "data.root=none", "trainer.batch_size=4", cwd=tmp_path, processes=2)
    assert code != 0
    assert "data.root=none does not exist" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_sweep_goes_on_after_a_run_that_fails(run_cli, summary, tmp_path):
    """Both processes refuse the first run; neither leaves while the other one still connects to it."""
    small = ("model=test_vit", "data.img_size=32", "trainer.max_updates=1", "trainer.device=cpu", "log.wandb=disabled")
    code, output = run_cli("-m", "data.csv=none.csv,null", *small, cwd=tmp_path, processes=2)
    assert code == 1
    assert "1 of 2 runs failed." in output
    (done,) = tmp_path.glob("runs/*/summary.json")
    assert done.parent.name.endswith("-test_vit-data.csv=null")
    assert summary(done.parent)["processes"] == 2
