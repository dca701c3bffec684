"""`trainer.freeze`: what is frozen, what stays as it was, and what is refused. Seconds."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file

from zoo import costs
from zoo.freezing import freeze
from zoo.messages import UserError
from zoo.recipes.classify.train_state import TrainState

CASES = [
    ("test_van", "2", 4, r"stages\.[23]\.|head\."),
    ("test_van", "0", 4, r"stages\.|head\."),
    ("test_van", "4", 4, r"head\."),
    ("resnet10t", "1", 4, r"layer[234]\.|fc\."),
    ("test_vit", "3", 6, r"blocks\.[3-5]\.|norm\.|fc_norm\.|head\."),  # its embeddings belong to the stem
    ("swin_tiny_patch4_window7_224", "backbone", None, r"norm\.|head\."),
    ("casvit_xs", "backbone", None, r"head\."),  # two classifiers
    ("pit_ti_224", "backbone", None, r"head\."),  # does not say what its stages are
    ("qwen3_vit_306m", "backbone", None, r"head\."),  # timm counts its last block as a part of the head
]


@pytest.mark.parametrize(("name", "what", "stages", "trained"), CASES)
def test_what_is_trained(name, what, stages, trained):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    said = freeze(model, name, what)
    expected = "all but the head" if stages is None else rf"the stem(, and none| and {what}) of {stages} stages"
    assert re.fullmatch(expected, said)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == bool(re.match(trained, key)), key
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_frozen_modules_keep_their_statistics_and_have_no_drop_path(compose):
    model = timm.create_model("test_van", num_classes=3, drop_path_rate=0.5)
    freeze(model, "test_van", "2")
    training = TrainState(compose("optim.weight_decay=0.5"), model, 3, 4, torch.device("cpu"))
    training.eval_model().eval()  # an evaluation comes between two epochs
    training.train_mode()
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(mode for name, mode in modes.items() if name.startswith(("stem", "stages.0", "stages.1")))
    assert all(mode for name, mode in modes.items() if name.startswith(("stages.2", "stages.3", "head")))
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.slow
def test_frozen_part_stays_as_it_was(command, images, tmp_path):
    """A first run gives the weights; a second one freezes two stages, is continued, and is not continued otherwise."""
    words = (
        *("model=test_van", "data=imagefolder", f"data.root={images}", "data.img_size=32", "data.num_workers=0"),
        *("trainer.batch_size=8", "log.wandb=disabled", "trainer.device=cpu", "schedule.warmup_epochs=0"),
    )
    code, output = command("train", *words, "trainer.epochs=1", f"run={tmp_path / 'first'}")
    assert code == 0, output
    habits = ("trainer.ema_decay=0.5", "optim.layer_decay=0.8", "trainer.epochs=2", "optim.lr=1e-2")
    frozen = (*words, *habits, f"pretrained={tmp_path / 'first'}", f"run={tmp_path / 'second'}")
    code, output = command("train", *frozen, "trainer.freeze=2", "trainer.max_updates=2")
    assert code == 0, output
    assert re.search(r"Frozen: the stem and 2 of 4 stages; [\d,]+ of [\d,]+ parameters are trained", output)
    assert "random weights" not in output
    assert re.search(r"Parameters by layer: stem 2.4 K \(frozen\), .*, head 291\. Multiply-adds .*: 2.\d+ M\.", output)
    code, output = command("train", *frozen, "trainer.freeze=2")
    assert code == 0, output
    assert "Continues in epoch 1 after update 2" in output

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith(("stem.", "stages.0.", "stages.1."))]
    assert any(name.endswith("running_mean") for name in changed)
    assert any(name.startswith("stages.2.") for name in changed)
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    model = timm.create_model("test_van", num_classes=3)
    parts = (model.stages[2], model.stages[3], model.norm, model.head)
    assert summary["trained_params"] == sum(p.numel() for part in parts for p in part.parameters())
    assert summary["trained_params"] < summary["params"]
    assert summary["multiply_adds"] == costs.multiply_adds(model, (3, 32, 32))
    assert "trained, the others frozen" in (tmp_path / "second" / "report.html").read_text()

    code, output = command("train", *frozen, "trainer.freeze=backbone", "trainer.epochs=3")
    assert code == 1
    assert "second holds a run with trainer.freeze '2', not 'backbone': choose another run=<folder>" in output


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        (
            "test_van",
            "5",
            r"trainer.freeze=5: test_van has 4 stages, so it has to be from 0 \(the stem alone\) to 4, or",
        ),
        ("pit_ti_224", "2", r"trainer.freeze=2: pit_ti_224 does not say what its stages are: give .*freeze=backbone"),
        ("rdnet_tiny", "2", r"rdnet_tiny does not say what its stages are"),  # has groups of layers only
    ],
)
def test_stages_that_there_are_not(name, what, message):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    with pytest.raises(UserError, match=message):
        freeze(model, name, what)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.freeze=head"], r"trainer.freeze=head is not allowed: it has to be a number of stages, or backbone"),
        (["dense.frozen_stages=2"], r"dense.frozen_stages=2 has no effect with task=classify: use trainer.freeze=2"),
        (["trainer.freeze=2", "task=detect"], r"no effect with task=detect: use dense.frozen_stages=<number>"),
    ],
)
def test_keys_that_can_not_be_used(compose, words, message):
    from zoo.recipes import config
    from zoo.recipes.dense import settings

    cfg = compose(*words)
    with pytest.raises(UserError, match=message):
        (config if cfg.task == "classify" else settings).check(cfg)


def test_learning_rate_factor_of_a_frozen_part(compose):
    model = timm.create_model("test_van", num_classes=3)
    freeze(model, "test_van", "0")
    cfg = compose("++optim.lr_factors={stem:0.5}")
    with pytest.raises(UserError, match=r"optim.lr_factors has 'stem', but no trained parameter has that in its name"):
        TrainState(cfg, model, 3, 4, torch.device("cpu"))
