"""Untrusted checkpoints in MMEngine: no code in them runs, and MMEngine's own checkpoints load. A few seconds."""

import builtins
import http.server
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import checkpoint
from torch import nn

from zoo.messages import UserError
from zoo.recipes.dense import safe_loading


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Reach:
    """Reads an attribute of any object when it is unpickled."""

    def __init__(self, owner, name):
        self.arguments = owner, name

    def __reduce__(self):
        return getattr, self.arguments


@pytest.fixture(autouse=True)
def _refusing(monkeypatch):
    for name in ("_safe_torch_load", "load_url"):
        monkeypatch.setattr(checkpoint, name, getattr(checkpoint, name))
    safe_loading.refuse_unpickling()


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint, and what it creates if it is unpickled."""
    torch.save({"state_dict": {"weight": torch.ones(1), "bomb": Bomb(tmp_path / "ran")}}, tmp_path / "hostile.pth")
    return tmp_path / "hostile.pth", tmp_path / "ran"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address under which the files of tmp_path can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_file_is_hostile(hostile):
    path, ran = hostile
    torch.load(path, weights_only=False)["state_dict"]["bomb"].close()
    assert ran.exists()


@pytest.mark.slow
def test_mmengine_alone_runs_it(hostile):
    path, ran = hostile
    code = "import sys; from mmengine.runner import load_checkpoint; load_checkpoint(None, sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False)
    assert ran.exists()


def test_local_checkpoint_is_refused(hostile):
    path, ran = hostile
    message = r"hostile\.pth can't be loaded without running code .*GLOBAL _?io\.open was not"  # _io in 3.12
    with pytest.raises(UserError, match=message):
        checkpoint.load_checkpoint(nn.Linear(1, 1), str(path), map_location="cpu")
    assert not ran.exists()


def test_message_is_one_sentence(hostile):
    with pytest.raises(UserError) as raised:
        checkpoint.CheckpointLoader.load_checkpoint(str(hostile[0]))
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("): give a file with tensors.")
    assert len(str(raised.value)) < 400


def test_explicit_wish_to_unpickle_is_refused(hostile):
    path, ran = hostile
    with pytest.raises(UserError, match="running code"):
        checkpoint._safe_torch_load(str(path), weights_only=False)
    assert not ran.exists()


def test_downloaded_checkpoint_is_refused(hostile, server):
    _, ran = hostile
    for _ in range(2):  # the second comes from the cache
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+/hostile\.pth can't be loaded"):
            checkpoint.load_checkpoint(nn.Linear(1, 1), f"{server}/hostile.pth")
    assert not ran.exists()


def test_downloaded_weights_load(tmp_path, server):
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, tmp_path / "good.pth")
    loaded = checkpoint.load_checkpoint(nn.Linear(1, 1), f"{server}/good.pth", map_location="cpu")
    assert set(loaded["state_dict"]) == {"weight", "bias"}


@pytest.mark.parametrize("legacy", [True, False])
def test_bare_pickles_are_refused(tmp_path, legacy):
    path = tmp_path / "bare.pth"
    if legacy:
        torch.save(Bomb(tmp_path / "ran"), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError, match=r"bare\.pth can't be loaded without running code"):
        checkpoint.load_checkpoint(nn.Linear(1, 1), str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(HistoryBuffer.mean, "__globals__"), (HistoryBuffer, "__init__"), (len, "__self__")]
)
def test_attributes_out_of_reach(tmp_path, owner, name):
    # MMEngine's list of safe globals has getattr, which gives a file access to any module.
    torch.save({"state_dict": Reach(owner, name)}, tmp_path / "reach.pth")
    with pytest.raises(UserError, match=r"reach\.pth can't be loaded without running code"):
        checkpoint.load_checkpoint(nn.Linear(1, 1), str(tmp_path / "reach.pth"))


class Swap:
    """Changes Python itself when it is unpickled, using only getattr."""

    def __reduce__(self):
        return getattr, (Reach(getattr, "__self__"), "__dict__"), None, None, iter([("swapped", 1)])


def test_python_stays_as_it_is(tmp_path):
    torch.save({"state_dict": Swap()}, tmp_path / "swap.pth")
    with pytest.raises(UserError, match=r"swap\.pth can't be loaded without running code .*attribute '__self__'"):
        checkpoint.load_checkpoint(nn.Linear(1, 1), str(tmp_path / "swap.pth"))
    assert not hasattr(builtins, "swapped")


def test_damaged_file(tmp_path):
    torch.save({"state_dict": nn.Linear(9, 9).state_dict()}, tmp_path / "half.pth")
    data = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"half\.pth can't be read as a checkpoint \(.+\): give another file"):
        checkpoint.load_checkpoint(nn.Linear(9, 9), str(tmp_path / "half.pth"))


def test_checkpoints_of_mmengine_load(tmp_path):
    hub = MessageHub("test")
    for value in (0.5, np.float32(0.25), torch.tensor(0.125)):
        hub.update_scalar("train/loss", value)
    hub.update_info("epoch", 3)
    hub.update_info("array", np.arange(3))
    meta = {"cfg": "text", "dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3)]}}
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    state = {"state_dict": nn.Linear(2, 2).state_dict(), "message_hub": hub.state_dict(), "meta": meta}
    torch.save(state | {"optimizer": optimizer.state_dict()}, tmp_path / "epoch_3.pth")
    loaded = checkpoint.load_checkpoint(nn.Linear(2, 2), str(tmp_path / "epoch_3.pth"), map_location="cpu")
    assert loaded["meta"] == meta
    curve = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert curve.data[0].tolist() == [0.5, 0.25, 0.125]
    assert curve.statistics("mean", 2) == pytest.approx(0.1875)
    assert loaded["message_hub"]["runtime_info"]["array"].tolist() == [0, 1, 2]


def test_twice_changes_nothing():
    before = checkpoint._safe_torch_load, checkpoint.load_url
    safe_loading.refuse_unpickling()
    assert (checkpoint._safe_torch_load, checkpoint.load_url) == before
