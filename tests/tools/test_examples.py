"""Each file of docs/examples runs and does what it says. Half a minute, and the compiled server half a minute more."""

import io
import json
import runpy
import shutil
import sys
import threading
import urllib.error
import urllib.request
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.models import push_to_hf_hub, save_for_hf

import zoo  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example in an empty folder; its variables."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def run(name, *arguments, run_name="__main__"):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)

    return run


def test_every_example_is_run():
    source = Path(__file__).read_text()
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if f'run("{name}"' not in source] == []


@pytest.mark.parametrize("path", EXAMPLES.glob("*.py"), ids=lambda path: path.stem)
def test_example_is_short(path):
    assert 10 <= len(path.read_text().splitlines()) <= 45


def test_bias_factors_are_the_biases(run):
    example = run("bias_factors", run_name="example")
    for side, columns in ((7, [4, 14, 4]), (8, [4, 16, 4])):
        q, k, v = torch.randn(3, 2, 3, side**2, 16, dtype=torch.float64)
        found = example["biases"](side)
        assert [q_b.shape[1] for _, q_b, _ in found.values()] == columns
        for bias, q_b, k_b in found.values():
            torch.testing.assert_close(q_b @ k_b.T, bias)
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            torch.testing.assert_close(example["factored"](q, k, v, q_b, k_b), want)


def test_free_bias_table_has_no_factors():
    """As docs/operators.md says: any number of columns less than that of tokens leaves something out."""
    table, place = torch.randn(13, 13, dtype=torch.float64), torch.cartesian_prod(torch.arange(7), torch.arange(7))
    y, x = (place - place[:, None] + 6).unbind(2)
    assert torch.linalg.matrix_rank(table[y, x]) == 49


@pytest.mark.slow
def test_smp_unet_learns(run):
    done = run("smp_unet")
    assert done["losses"][-1] < done["losses"][0] - 0.05
    with torch.no_grad():
        assert done["model"].eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 4, 64, 96)


@pytest.mark.slow
def test_hf_segmentation_trains_and_loads(run):
    found = run("hf_segmentation")["found"]
    assert list(found) == ["UperNet", "Mask2Former"]
    for done in found.values():
        assert 0 < done["loss"] < 1000
        assert done["same"]
        without = [name for name, weight in done["model"].named_parameters() if weight.grad is None]
        assert not [name for name in without if "_backbone" in name]


@pytest.mark.slow
def test_faster_rcnn_trains_every_part(run):
    done = run("faster_rcnn")
    assert all(loss.isfinite() for loss in done["losses"].values())
    without = [name for name, weight in done["backbone"].named_parameters() if weight.grad is None]
    assert without == []
    assert all(objects["boxes"].shape[1] == 4 for objects in done["found"])
    strides = [200 // maps.shape[3] for maps in done["backbone"](torch.zeros(1, 3, 160, 200)).values()]
    assert strides[:3] == [4, 8, 15]


@pytest.mark.slow
def test_grad_cam_draws(run, tmp_path):
    heat = run("grad_cam")["heat"]
    assert heat.shape == (224, 320)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1, abs=1e-3)
    assert Image.open(tmp_path / "cam.png").size == (320, 224)


def test_onnx_boxes_are_in_pixels_of_the_photo(run, tmp_path):
    """The file returns four objects of a photo of 48 x 96 pixels, which it gets with 64 x 128."""
    scores, boxes = np.zeros((1, 3, 2), np.float32), np.zeros((1, 3, 4), np.float32)
    scores[0] = [[0.9, 0.6], [0.8, 0.1], [0.1, 0.7]]
    boxes[0] = [[0, 0, 64, 32], [2, 0, 66, 32], [64, 32, 130, 64]]  # the first two overlap
    outputs = {"scores": scores, "boxes": boxes}
    nodes = [
        onnx.helper.make_node("Constant", [], [k], value=onnx.numpy_helper.from_array(outputs[k])) for k in outputs
    ]
    describe, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    described = [describe(name, kind, value.shape) for name, value in outputs.items()]
    graph = onnx.helper.make_graph(nodes, "boxes", [describe("images", kind, (1, 3, 64, 128))], described)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    facts = {"classes": ["cat", "dog"], "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}, "short_side": 64}
    facts |= {"max_size": 128, "size_divisor": 32, "iou_threshold": 0.5, "max_per_image": 100}
    onnx.helper.set_model_props(model, {"zoo": json.dumps(facts)})
    onnx.save(model, tmp_path / "model.onnx")
    Image.new("RGB", (96, 48), "white").save(tmp_path / "photo.png")
    found = run("onnx_boxes", "model.onnx", "photo.png", "found.png")["found"]
    assert [name for name, _, _ in found] == ["cat", "dog", "dog"]
    np.testing.assert_allclose([score for _, score, _ in found], [0.9, 0.7, 0.6])
    np.testing.assert_allclose([box for _, _, box in found], [[0, 0, 48, 24], [48, 24, 96, 48], [0, 0, 48, 24]])
    assert Image.open(tmp_path / "found.png").getpixel((48, 30)) == (255, 0, 0)


@pytest.mark.slow
def test_hugging_face_folder(run):
    done = run("hugging_face")
    assert done["same"]
    assert list(done["again"].pretrained_cfg["label_names"]) == ["cat", "dog", "owl"]


class LocalHub:
    """As much of huggingface_hub.HfApi as timm's push takes, on a folder."""

    root: Path

    def __init__(self, **kwargs):
        pass

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **kwargs):
        return False

    def upload_folder(self, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.root / repo_id)


@torch.no_grad()
def test_hugging_face_push_and_pull(monkeypatch, tmp_path):
    """The calls that the example names in comments, on a hub that is a folder."""

    def download(repo_id, filename, **kwargs):
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(LocalHub, "root", tmp_path, raising=False)
    monkeypatch.setattr("timm.models._hub.HfApi", LocalHub)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model("test_van", num_classes=3).eval()
    push_to_hf_hub(model, "me/van-pets", model_config={"label_names": ["cat", "dog", "owl"]}, safe_serialization=True)
    again = timm.create_model("hf-hub:me/van-pets", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert (tmp_path / "me/van-pets/README.md").is_file()


@pytest.fixture
def server(run, tmp_path):
    """Address and model of the example, on a free port."""
    names = {"label_names": ["apple", "banana", "cherry"]}
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_van", num_classes=3), tmp_path / "run", names, safe_serialization=True)
    done = run("inference_server", f"local-dir:{tmp_path / 'run'}", run_name="server")
    with HTTPServer(("localhost", 0), done["Handler"]) as server:
        done["Handler"].log_message = lambda *args: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}", done
        server.shutdown()


@pytest.mark.long
@pytest.mark.slow
def test_inference_server_answers(server):
    address, done = server
    image = Image.new("RGB", (90, 70), (200, 40, 40))
    image.save(file := io.BytesIO(), format="PNG")
    with urllib.request.urlopen(urllib.request.Request(address, data=file.getvalue())) as answer:
        got = json.load(answer)
    with torch.no_grad():
        want = done["model"](done["transform"](image)[None])[0].softmax(0).tolist()
    assert got == pytest.approx(dict(zip(["apple", "banana", "cherry"], want, strict=True)), abs=1e-4)


@pytest.mark.slow
def test_inference_server_refuses_text(server):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(server[0], data=b"no image"))
