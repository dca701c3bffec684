"""Files that are no checkpoints are refused in one sentence and soon, by every command that reads them. About 10 s."""

import collections
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from zoo.messages import UserError
from zoo.opening import open_model, weights_file
from zoo.recipes.classify.model import build_model
from zoo.recipes.config import Config
from zoo.tools import convert


@pytest.fixture(scope="module")
def weights():
    return timm.create_model("test_van").state_dict()


def saved(change):
    """A file of test_van's weights after `change`, which edits them or returns something else."""

    def make(path, weights):
        weights = dict(weights)
        changed = change(weights)
        torch.save(weights if changed is None else changed, path)

    return make


def with_tensor(tensor):
    return saved(lambda weights: weights.update({"head.weight": tensor(weights["head.weight"])}))


def endless(weights):
    weights["state_dict"] = weights


def endless_pair(weights):
    outer = {"model": {"state_dict": {}}}
    outer["model"]["state_dict"] = outer
    return outer


def endless_average(weights):
    outer = collections.OrderedDict(state_dict=weights)
    outer["model_ema"] = outer
    return outer


def spoiled(value, count=3):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[:count] = value
        return tensor

    return spoil


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def rewritten(member, change):
    """A file of torch with one of its members changed."""

    def make(path, weights):
        torch.save(dict(weights), path)
        with zipfile.ZipFile(path) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, change(content) if name.endswith(member) else content)

    return make


def bomb(path, weights):
    torch.save({"head.weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(2**24))


def deep(content):
    """A hundred thousand nested dicts, pickled."""
    return b"\x80\x02" + b"}X\x0a\x00\x00\x00state_dict" * 100_000 + b"}" + b"s" * 100_000 + b"."


def safetensors(header, size=None):
    def make(path, weights):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + bytes(64))

    return make


def entry(shape, offsets):
    return {"head.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


def huge(path, weights):
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04" + bytes(512))
        file.truncate(2**42)


DAMAGED = "is damaged, incomplete or not a checkpoint"
FILES = {
    "itself": (saved(endless), "contains itself under 'state_dict'"),
    "one-another": (saved(endless_pair), "contains itself under 'state_dict'"),
    "average-of-itself": (saved(endless_average), "contains itself under 'model_ema'"),
    "deep": (rewritten("data.pkl", deep), "holds no tensors, only state_dict"),
    "long-prefix": (saved(lambda sd: {"module." * 100_000 + key: sd[key] for key in list(sd)[:3]}), "does not fit"),
    "integer-keys": (saved(lambda sd: dict(enumerate(sd.values()))), r"\d+ tensors under a key of type int, "),
    "one-integer-key": (saved(lambda sd: sd.update({0: sd["head.bias"]})), "1 tensors under a key of type int, not"),
    "none-key": (saved(lambda sd: {None: sd["head.bias"]}), "1 tensors under a key of type NoneType, not under names"),
    "bytes-key": (saved(lambda sd: {b"head": sd["head.bias"]}), "under a key of type bytes, not under names"),
    "meta": (with_tensor(lambda x: x.to("meta")), r"1 tensors of the checkpoint have no values \(head\.weight\)"),
    "sparse": (with_tensor(lambda x: x.to_sparse()), "head.weight is sparse or nested"),
    "sparse-rows": (with_tensor(lambda x: x.to_sparse_csr()), "head.weight is sparse or nested"),
    "quantized": (with_tensor(quantized), "head.weight is quantized"),
    "complex": (with_tensor(lambda x: torch.complex(x, x)), "head.weight is complex"),
    "integers": (with_tensor(lambda x: x.to(torch.int8)), r"head.weight is of torch\.int8"),
    "float8": (with_tensor(lambda x: x.to(torch.float8_e4m3fn)), r"head.weight is of torch\.float8_e4m3fn"),
    "bool": (with_tensor(lambda x: x > 0), r"head.weight is of torch\.bool"),
    "nan": (with_tensor(spoiled(float("nan"))), r"1 tensors .* are NaN or infinite \(3 in head\.weight\)"),
    "all-nan": (saved(lambda sd: {k: x * float("nan") if x.is_floating_point() else x for k, x in sd.items()}),
                r"\d\d\d tensors of the checkpoint have values that are NaN or infinite"),
    "inf": (with_tensor(spoiled(float("inf"), 1)), r"1 tensors .* are NaN or infinite \(1 in head\.weight\)"),
    "half-inf": (with_tensor(lambda x: spoiled(float("-inf"))(x.half())), r"\(3 in head\.weight\)"),
    "expanded": (with_tensor(lambda x: torch.zeros(1).expand(10**6, 10**6)), "expands 4 bytes to 4,000,000,0"),
    "scalar": (with_tensor(lambda x: torch.tensor(1.0)), "does not fit test_van"),
    "zero-size": (saved(lambda sd: sd.update({"stages.0.norm.weight": torch.zeros(0)})), "does not fit test_van"),
    "no-tensors": (saved(lambda sd: {"state_dict": [1, 2], "model": None}), "holds no tensors, only state_dict, model"),
    "empty": (lambda path, weights: path.touch(), "the file is empty"),
    "list": (saved(lambda sd: list(sd.values())), "holds a list, not a state dict"),
    "tensor": (saved(lambda sd: sd["head.weight"]), "holds a Tensor, not a state dict"),
    "bomb": (bomb, "unpacks to more than eight times its size"),
    "cut": (lambda path, weights: path.write_bytes(b"PK\x03\x04" + bytes(600)), DAMAGED),
    "lying-size": (rewritten("data.pkl", lambda x: x.replace(b"M\xe8\x03", b"M\xe8\x7f")), DAMAGED),
    "safetensors-header-of-terabytes": (safetensors({}, 2**42), DAMAGED),
    "safetensors-of-terabytes": (safetensors(entry([2**40], [0, 2**42])), DAMAGED),
    "safetensors-other-shape": (safetensors(entry([3, 3], [0, 64])), DAMAGED),
    "safetensors-complex": (safetensors({"head.weight": {"dtype": "C64", "shape": [8], "data_offsets": [0, 64]}}),
                            "head.weight is complex"),
    "larger-than-memory": (huge, r"the file has 4,096 GiB, more than the \d+ GiB of memory here"),
    "pipe": (lambda path, weights: os.mkfifo(path), "this is a pipe or device, not a checkpoint file"),
    "device": (lambda path, weights: path.symlink_to("/dev/zero"), "this is a pipe or device, not a checkpoint file"),
    "folder": (lambda path, weights: path.mkdir(), "this is a folder, not a checkpoint file|is it the folder of a run"),
    "endless-link": (lambda path, weights: path.symlink_to(path), "Too many levels of symbolic links"),
}  # fmt: skip

SLOW = ("deep", "long-prefix", "zero-size")  # the last two compare with all models


def by_timm(path):
    overlay = {"file": str(path), "num_classes": 1000}
    timm.create_model("test_van", pretrained=True, pretrained_cfg_overlay=overlay)


def by_zoo_convert(path):
    convert.convert(path, "test_van")


def by_zoo_export(path):  # and zoo-look
    open_model("test_van", str(path))


def by_zoo_train(path):  # and zoo-eval
    build_model(Config(model="test_van", pretrained=str(path)), num_classes=1000)


READERS = {
    "create_model": (by_timm, (ValueError, RuntimeError, OSError)),
    "zoo-convert": (by_zoo_convert, (UserError, OSError)),
    "zoo-export": (by_zoo_export, UserError),
    "zoo-train": (by_zoo_train, UserError),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FILES])
def test_is_refused_in_a_sentence(name, reader, tmp_path, weights):
    make, message = FILES[name]
    make(tmp_path / "model.pth", weights)
    load, errors = READERS[reader]
    with pytest.raises(errors, match=message) as raised:
        load(tmp_path / "model.pth")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "nul"])
def test_no_file_can_have_this_name(name):
    with pytest.raises(UserError, match="there is no checkpoint"):
        weights_file(Path(name))


def test_files_for_other_models_of_timm_are_refused_too(tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    weights["head.weight"] = weights["head.weight"] * float("nan")
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"are NaN or infinite \(\d+ in head\.weight\)"):
        build_model(Config(model="test_vit", pretrained=str(tmp_path / "model.pth")), num_classes=1000)


def test_small_expanded_tensors_load(tmp_path, weights):
    torch.save(weights | {"head.bias": torch.zeros(1).expand(1000)}, tmp_path / "model.pth")
    by_timm(tmp_path / "model.pth")
