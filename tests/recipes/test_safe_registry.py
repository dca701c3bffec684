"""No command calls a function because a configuration or a file of a run folder names it."""

import json
import pickle
import re
import shutil
from contextlib import suppress

import mmengine
import pytest
import torch
import yaml
from mmengine.registry import DATASETS, HOOKS, MODELS, TASK_UTILS, init_default_scope

from zoo.messages import UserError
from zoo.recipes.dense import prepare, safe_registry

# Places of a type in `mm`; {} is replaced by the call.
MODEL = {
    "neck": {"model": {"neck": "{}"}},
    "data_preprocessor": {"model": {"data_preprocessor": "{}"}},
    "backbone": {"model": {"backbone": "{}"}},
    "nested": {"model": {"roi_head": {"bbox_head": {"loss_cls": "{}"}}}},
    "model": {"model": "{}"},
}
RUNNER = {
    "hook": {"custom_hooks": ["{}"]},
    "default hook": {"default_hooks": {"timer": "{}"}},
    "visualizer": {"visualizer": "{}"},
    "log processor": {"log_processor": "{}"},
    "sampler": {"val_dataloader": {"sampler": "{}"}},
    "data set": {"val_dataloader": {"dataset": "{}"}},
    "pipeline": {"val_dataloader": {"dataset": {"pipeline": ["{}"]}}},
    "collate": {"val_dataloader": {"collate_fn": "{}"}},
    "metric": {"val_evaluator": "{}"},
    "loop": {"val_cfg": "{}"},
}
TRAINING = {
    "optimizer wrapper": {"optim_wrapper": "{}"},
    "wrapper's constructor": {"optim_wrapper": {"constructor": "os.system"}},
    "schedule": {"param_scheduler": ["{}"]},
    "training sampler": {"train_dataloader": {"sampler": "{}"}},
    "training loop": {"train_cfg": "{}"},
}


def _filled(value, call):
    if value == "{}":
        return {"_delete_": True, **call}
    if isinstance(value, dict):
        return {key: _filled(item, call) for key, item in value.items()}
    return [{k: v for k, v in _filled(item, call).items() if k != "_delete_"} for item in value] if isinstance(
        value, list) else value  # fmt: skip


@pytest.fixture
def canary(tmp_path):
    """A file that does not exist, and a call that would write it."""
    return tmp_path / "canary", {"type": "os.system", "command": f"touch {tmp_path / 'canary'}"}


@pytest.fixture
def foreign(finished_dense, tmp_path):
    """A copy of a finished run with other settings."""

    def make(task="detect", **settings):
        folder = tmp_path / "run"
        shutil.copytree(finished_dense[task], folder)
        content = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(content | settings))
        return folder

    return make


def _refused(result, path):
    code, output = result
    assert not path.exists()
    assert code == 1, output
    assert re.search(r"^zoo-\w+: error: .*", output, re.M)
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("place", list(MODEL | RUNNER))
def test_eval_calls_nothing(command, foreign, canary, place):
    path, call = canary
    _refused(command("eval", foreign(mm=_filled((MODEL | RUNNER)[place], call))), path)


@pytest.mark.slow
@pytest.mark.parametrize("place", list(MODEL))
def test_predict_calls_nothing(command, foreign, digit_scenes, canary, place):
    path, call = canary
    run = foreign(mm=_filled(MODEL[place], call))
    image = next((digit_scenes / "images" / "val").iterdir())
    _refused(command("predict", f"run={run}", image, "out"), path)


@pytest.mark.slow
@pytest.mark.parametrize("place", list(MODEL | RUNNER | TRAINING))
def test_train_calls_nothing(fit_dense, canary, place, tmp_path):
    path, call = canary
    mm = re.sub(r'"(\w+)":', r"\1:", json.dumps(_filled((MODEL | RUNNER | TRAINING)[place], call)))  # as Hydra has it
    with pytest.raises(UserError):
        fit_dense(tmp_path / "run", f"++mm={mm}")
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command_name", ["report", "export", "look"])
def test_commands_that_build_nothing_of_mm(command, foreign, canary, command_name):
    path, call = canary
    run = foreign(mm=_filled(MODEL["neck"], call))
    words = {"report": [run], "export": [run, "--out", "model.pt2"], "look": ["attention", run]}[command_name]
    _, output = command(command_name, *words)
    assert not path.exists()
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"architecture": 3}', '{"architecture": "os.system", "pretrained_cfg": {}}'], ids=str
)
def test_strange_description_of_a_classifier(command, finished, tmp_path, content):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    code, output = command("export", tmp_path / "run", "--out", tmp_path / "model.pt2")
    assert code == 1, output
    assert re.search(r"^zoo-export: error: [^\n]*\n\Z", output, re.M)
    assert "Traceback" not in output


# Places where MMEngine resolves names or would run code.


@pytest.fixture
def _guarded():
    prepare("detect")
    init_default_scope("mmdet")


NAMES = [
    "os.system",
    "subprocess.check_call",
    "builtins.exec",
    "exec",
    "torch.load",
    "torch.nn.Linear",
    "mmengine.utils.package_utils.install_package",
    "mmdet.models.detectors.kd_one_stage.Config.fromfile",
    "mmdet.os.system",
    "antigravity.x",
    "",
    ".",
]


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", NAMES)
def test_name_that_is_not_registered_is_not_found(name):
    with pytest.raises(KeyError, match="registry"):
        MODELS.build({"type": name})


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("settings", [{"type": "strange.Thing"}, {"type": "FPN", "_scope_": "strange"}], ids=str)
def test_scope_is_not_imported(settings, tmp_path, monkeypatch):
    package = tmp_path / "strange"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (package / "registry.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with suppress(KeyError, TypeError):
        MODELS.build(settings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", ["mmdet.ResNet", "mmengine.TimmBackbone", "TimmBackbone"])
def test_registered_name_is_found(name):
    assert MODELS.get(name).__name__ == name.rpartition(".")[2]


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", safe_registry._LEFT_OUT)
def test_what_evaluates_texts_is_left_out(name):
    for registry in (HOOKS, DATASETS, TASK_UTILS, MODELS):
        with pytest.raises(KeyError, match=name):
            registry.build({"type": name})


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("kind", ["pkl", "yaml", "py"])
def test_file_that_a_configuration_names_is_no_program(kind, tmp_path):
    ran = tmp_path / "ran"
    content = {
        "pkl": pickle.dumps(Call(ran)),
        "yaml": f"!!python/object/apply:os.system ['touch {ran}']".encode(),
        "py": f"open({str(ran)!r}, 'w')".encode(),
    }
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content[kind])
    with pytest.raises((UserError, yaml.YAMLError)):
        mmengine.Config.fromfile(path) if kind == "py" else mmengine.load(path)
    assert not ran.exists()


class Call:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", ["__import__('os').getpid", "batched_nms", "torch.load", "print"])
def test_non_maximum_suppression_is_not_evaluated(name):
    from mmcv.ops import batched_nms

    with pytest.raises(UserError, match="it has to be nms or soft_nms"):
        batched_nms(torch.rand(3, 4), torch.rand(3), torch.zeros(3), {"type": name, "iou_threshold": 0.5})


@pytest.mark.usefixtures("_guarded")
@pytest.mark.parametrize("name", ["nms", "soft_nms"])
def test_non_maximum_suppression(name):
    from mmcv.ops import batched_nms

    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9.5], [20, 20, 30, 30]])
    kept, _ = batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), {"type": name, "iou_threshold": 0.5})
    assert len(kept) == {"nms": 2, "soft_nms": 3}[name]
