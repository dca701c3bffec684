"""zoo-look: weights, pictures, every command and message. A minute."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

import zoo.checkpoints
from zoo.messages import UserError
from zoo.opening import OpenModel, open_model
from zoo.tools import look, look_attention, look_cam, look_draw, look_patterns, look_picture

MODELS = [name for family in zoo.FAMILIES for name in timm.list_models("test_*", module=family)]
SIZE = (75, 91)  # odd sides in most stages, and windows that do not divide them
PIXEL = (70, 40)


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(*size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))


def run(capsys, *arguments):
    """Exit code, output and errors of a command line."""
    torch.manual_seed(0)
    code = 0
    try:
        look.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def photo(tmp_path):
    """A picture of 40 x 60 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder as zoo-train leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    model = build("test_van", num_classes=3)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "2"]
    config = {"label_names": ["cat", "dog", "2"], "input_size": (3, 64, 64)}
    save_for_hf(model, str(folder), model_config=config, model_args={"num_classes": 3}, safe_serialization=True)
    return folder


# ---- which keys there are: each family's own test has them in plain words


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_shares(name):
    model = build(name)
    sites = look_attention.attention_modules(model, name)
    look_attention.run(model, images(*SIZE), sites)
    blocks = sorted({site.block for site in sites})
    shares = [keys for block in blocks for keys in look_attention.keys(model, name, images(*SIZE), PIXEL, block)]
    assert len(shares) == sum(len(site.info.groups) for site in sites)
    for keys in shares:
        assert keys.weights.sum().item() == pytest.approx(1 - keys.padding, abs=1e-5)
        assert keys.weights.min() >= 0


@torch.no_grad()
def test_weights_are_the_softmax():
    model = build("test_cswin")
    site = look_attention.attention_modules(model, "cswin")[-1]
    look_attention.run(model, images(*SIZE), [site])
    height, width = site.size
    heads = site.module.qkv(site.args[0]).reshape(height * width, 3, site.module.num_heads, -1).permute(1, 2, 0, 3)
    query, key, _ = heads
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(0)
    tokens = [(0, 0), (1, 2), (2, 1)]
    got = look_attention.attention(site.module, site.args, tokens)
    want = torch.stack([weights[y * width + x].reshape(height, width) for y, x in tokens])
    torch.testing.assert_close(got[:, 0], want)


@torch.no_grad()
def test_weights_have_the_bias():
    model = build("test_gc_vit")
    site = look_attention.attention_modules(model, "gc_vit")[0]
    nn.init.zeros_(site.module.qkv.weight)
    look_attention.run(model, images(64, 64), [site])
    got = look_attention.attention(site.module, site.args, [(5, 6)])[0, 0, 4:8, 4:8]
    table = site.module.bias_table.mean(0) if site.module.num_heads == 1 else site.module.bias_table[0]
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    want = table[1 - rows + 3, 2 - columns + 3].flatten().softmax(0).view(4, 4)
    torch.testing.assert_close(got, want)


def test_padding_is_counted():
    """A map of 2 x 2 in a neighbourhood of 3 x 3: with zero weights, five of nine keys are none of the picture's."""
    model = build("test_nat")
    nn.init.zeros_(model.stages[3].blocks[0].attn.bias_table)
    nn.init.zeros_(model.stages[3].blocks[0].attn.qkv.weight)
    *_, keys = look_attention.keys(model, "nat", images(64, 64), (33, 33))
    assert keys.padding == pytest.approx(5 / 9, abs=1e-5)
    torch.testing.assert_close(keys.weights, torch.full((2, 2), 1 / 9))


def test_model_stays_as_it_was():
    model = build("test_biformer")
    before = model(images(*SIZE))
    list(look_attention.keys(model, "biformer", images(*SIZE), PIXEL))
    assert torch.equal(model(images(*SIZE)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_first_block_of_each_kind_is_shown():
    found = list(look_attention.keys(build("test_dinat"), "dinat", images(*SIZE), PIXEL))
    assert [(keys.stage, keys.block) for keys in found] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]
    found = list(look_attention.keys(build("test_dinat"), "dinat", images(*SIZE), PIXEL, -1))
    assert [(keys.stage, keys.block) for keys in found] == [(1, 2), (2, 2), (3, 2), (4, 2)]


# ---- the picture of the patterns


@pytest.mark.slow
def test_patterns_as_a_file(capsys, tmp_path):
    path = tmp_path / "patterns.png"
    code, out, _ = run(capsys, "patterns", "-o", path)
    assert (code, out) == (0, f"written: {path}\n")
    rows = -(-len(look_patterns.panels()) // 4)
    with Image.open(path) as picture:
        assert (picture.width, picture.height) == (4 * 392 + 3 * 40 + 8, rows * (392 + 156) + (rows - 1) * 40)
        pixels = np.asarray(picture)
    assert pixels.shape[2] == 4
    for bottom in range(392 + 156, pixels.shape[0] + 1, 392 + 156 + 40):  # the first panel of every row
        assert (pixels[bottom - 392 : bottom, :400, 3] > 0).mean() > 0.5
    # At the right and the bottom nothing is cut off, and outside of panels and text nothing is painted.
    assert not pixels[:, -4:, 3].any()
    assert path.stat().st_size < 15_000 * len(look_patterns.panels())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_patterns_of_a_family(capsys, tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = len(look_patterns.panels([family]))
    assert run(capsys, "patterns", family)[1] == f"written: {family}_patterns.png\n"
    assert Image.open(f"{family}_patterns.png").size == (count * 196 + (count - 1) * 20 + 4, (392 + 156) // 2)


def test_folder_to_write_into_is_made(capsys, tmp_path):
    code, _, _ = run(capsys, "patterns", "van", "-o", f"{tmp_path / 'new'}/")
    assert code == 0
    assert (tmp_path / "new" / "van_patterns.png").exists()


# ---- rollout, receptive field, class activation


@torch.no_grad()
def test_rollout_is_the_product():
    settings = {"embed_dims": (16,) * 4, "depths": (1,) * 4, "num_heads": (2,) * 4}
    model = build("vitrpb_small", **settings)
    total = look_attention.rollout(model, "vitrpb", images(48, 64)).reshape(12, 12)
    want = torch.eye(12)
    sites = look_attention.attention_modules(model, "vitrpb")
    look_attention.run(model, images(48, 64), sites)
    for site in sites:
        query, key, _ = site.module.qkv(site.args[0]).reshape(12, 3, 2, 8).permute(1, 2, 0, 3)
        table = zoo.checkpoints.resize_table(site.module.bias_table, (5, 7))
        rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
        bias = table[:, rows - rows[:, None] + 2, columns - columns[:, None] + 3]
        weights = (query @ key.mT * 8**-0.5 + bias).softmax(-1).mean(0)
        want = (weights + torch.eye(12)) / 2 @ want
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(total.sum(1), torch.ones(12))


@pytest.mark.parametrize("name", ["dinat_isotropic_small", "vitrpb_small"])
def test_attention_of_all_tokens_is_that_of_each(name):
    """Also where the map is smaller than the neighbourhood, and padded."""
    model = build(name, embed_dims=(16,) * 4, depths=(2, 1, 1, 1), num_heads=(2,) * 4, dilations=(2, 1, 1, 1))
    sites = look_attention.attention_modules(model, name)[:2]
    look_attention.run(model, images(*SIZE), sites)
    tokens = list(itertools.product(range(5), range(6)))
    for site in sites:
        nn.init.normal_(site.module.bias_table)
        want = look_attention.attention(site.module, site.args, tokens)[:, 0, :5, :6].flatten(1)
        got = look_attention.attention_matrix(site.module, site.args, site.size)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_rollout_runs_a_block_once_for_as_many_keys_as_a_head_has_channels():
    model = build("vitrpb_small", embed_dims=(16,) * 4, depths=(1,) * 4, num_heads=(2,) * 4)
    sizes = []
    model.stages[0].blocks[0].attn.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    look_attention.rollout(model, "vitrpb", images(*SIZE))
    assert sizes == [1] * (1 + 4)  # the model's own run; 5 x 6 keys, 8 at a time


def test_field_of_a_convolution():
    conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    nn.init.ones_(conv.weight)
    nn.init.ones_(conv.bias)
    with torch.no_grad():
        conv.weight[1:] = 0  # otherwise the signs can cancel
    (field,) = look_attention.field(lambda x: [conv(x)], 1, (20, 20), 3)
    want = torch.zeros(20, 20)
    want[9:12, 9:12] = 1 / 9
    torch.testing.assert_close(field, want)
    assert [look_attention.extent(field, share) for share in (0.05, 0.5, 0.99)] == [1, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_field_grows(name):
    model = build(name, features_only=True)
    fields = look_attention.field(model, 3, (64, 64), 1)
    assert [tuple(field.shape) for field in fields] == [(64, 64)] * 4
    reach = [(field > 0).sum() for field in fields]
    assert reach == sorted(reach)
    again = look_attention.field(model, 3, (64, 64), 1)
    assert all(map(torch.equal, fields, again))


@pytest.mark.parametrize("name", [*MODELS, "swin_s3_tiny_224"])
def test_class_activation_of_each_family(name):
    kwargs = {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24} if name.startswith("swin") else {}
    model = build(name, **kwargs)
    loaded = OpenModel(model, name, "random weights", {}, False)
    layer, channels = look_cam.layer(loaded, 3)
    heats = (look_cam.heat(model, images(64, 64), layer, channels, label) for label in range(9))
    heat = next(heat for heat in heats if heat.any())  # nothing speaks for some of the random classes
    assert heat.shape == (64, 64)
    assert heat.min() == 0
    assert heat.max() == pytest.approx(1, abs=1e-5)


# ---- the commands


def picture_size(path):
    """Width and height of a picture that is not blank, nor along a rim."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    assert len(picture.getcolors(1 << 24)) > 50
    assert all((rim < 255).any() for rim in (pixels[:16], pixels[-16:], pixels[:, :16], pixels[:, -16:]))
    return picture.size


@pytest.mark.slow
def test_keys_command(capsys, tmp_path, photo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "keys", "test_cswin", photo, "--pixel", 39, 0)
    assert code == 0
    assert out.endswith("written: test_cswin_keys.png\n")
    assert "random weights" in out
    assert picture_size("test_cswin_keys.png")[0] > 1000


@pytest.mark.slow
def test_keys_as_json(capsys, tmp_path, photo):
    code, out, _ = run(capsys, "keys", "test_nat", photo, "--pixel", 39, 0, "-o", tmp_path / "k.png", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["size"] == [64, 96]
    assert record["pixel"] == [63, 0]
    first = record["attention"][0]
    assert (first["stage"], first["block"], first["kind"]) == (1, 1, "3 x 3 neighbours")
    assert (first["keys"], first["key_pixels"]) == (9, 4)
    places = torch.tensor(first["weights"]).nonzero().tolist()
    assert places == [[y, x] for y in range(13, 16) for x in range(3)]
    assert record["file"] == str(tmp_path / "k.png")


@pytest.mark.slow
def test_run_folder(capsys, tmp_path, photo, finished):
    code, out, _ = run(capsys, "cam", finished, photo, "--class", "dog", "-o", tmp_path, "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["model"], record["weights"]) == ("mine", "its last weights")
    assert (record["class"], record["name"]) == (1, "dog")
    model = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    loaded = open_model(str(finished))
    shown = look_picture.read_picture(photo, loaded)
    with torch.no_grad():
        assert record["score"] == pytest.approx(model(shown.images)[0].softmax(0)[1].item())
    assert picture_size(tmp_path / "mine_cam.png")[0] > 900
    assert run(capsys, "keys", finished, photo, "-o", tmp_path)[0] == 0


@pytest.mark.slow
def test_cam_takes_what_the_model_sees(capsys, tmp_path, photo, finished):
    _, out, _ = run(capsys, "cam", finished, photo, "--stage", 2, "-o", tmp_path / "a.png", "--json")
    record = json.loads(out)
    assert record["score"] > 1 / 3
    assert record["name"] == ["cat", "dog", "2"][record["class"]]


@pytest.mark.slow
def test_weights_of_a_file(capsys, tmp_path, photo, finished):
    file = finished / "model.safetensors"
    code, out, _ = run(capsys, "cam", "test_van", photo, "--pretrained", file, "-o", tmp_path / "a.png", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["weights"] == "weights of model.safetensors"
    assert record["class"] < 3
    assert record["notes"] == []


@pytest.mark.slow
def test_field_command(capsys, tmp_path):
    path = tmp_path / "field.png"
    code, out, _ = run(capsys, "field", "test_resnet", "--size", 64, 96, "--images", 1, "-o", path, "--json")
    assert code == 0
    record = json.loads(out)
    assert [stage["stage"] for stage in record["stages"]] == [1, 2, 3, 4, 5]
    assert all(stage["half_within"] <= stage["95_percent_within"] for stage in record["stages"])
    assert picture_size(path)[0] > 1200


@pytest.mark.slow
def test_rollout_command(capsys, tmp_path, photo):
    arguments = ("rollout", "nat_isotropic_small", photo, "--size", 64, 64, "--pixel", 0, 0)
    code, out, _ = run(capsys, *arguments, "-o", tmp_path / "r.png", "--json")
    assert code == 0
    assert np.argmax(json.loads(out)["weights"]) == 0
    picture_size(tmp_path / "r.png")


def test_grey_pictures_and_sizes(tmp_path, photo):
    model = build("test_van", in_chans=1)
    loaded = OpenModel(model, "test_van", "", {**timm.data.resolve_model_data_config(model)}, False)
    loaded.config |= {"input_size": (1, 64, 64), "mean": (0.5,), "std": (0.5,)}
    picture = look_picture.read_picture(photo, loaded, (33, 50))
    assert picture.images.shape == (1, 1, 33, 50)
    assert picture.images.abs().max() <= 1
    assert (picture.pixel(None), picture.pixel((39, 59)), picture.pixel((0, 0))) == ((16, 25), (32, 49), (0, 0))


def test_pictures_are_drawn_with_the_file_s_own_pixels(photo):
    shown = look_picture.read_picture(photo, open_model("test_van"), (96, 96))
    assert shown.size == (96, 96)
    assert np.array_equal(shown.pixels, np.asarray(Image.open(photo)))


@pytest.mark.slow
def test_large_pictures_are_drawn_smaller_in_their_shape(tmp_path):
    Image.new("RGB", (2400, 1600)).save(tmp_path / "large.png")
    shown = look_picture.read_picture(tmp_path / "large.png", open_model("test_van"))
    assert shown.pixels.shape == (800, 1200, 3)
    assert shown.pixel((1599, 2399)) == (63, 95)


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved, in the order in which they are."""
    figures = []
    monkeypatch.setattr(look_draw, "_save", lambda _, grid: figures.append(grid.flat[0].figure))
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "cell", "reach"), [("of the largest", None, 64), ("share of a token", 20, 80)])
def test_heat_has_a_scale_and_the_file_s_shape(figure, photo, scale, cell, reach):
    picture = look_picture.read_picture(photo, open_model("test_van"), (64, 64))
    look_draw.draw_heat(photo, np.eye(4), picture, ("one", "two"), "title", scale, cell=cell)
    assert [axes.get_ylabel() for axes in figure[0].axes] == ["", "", scale]
    figure[0].draw_without_rendering()
    box = figure[0].axes[1].get_window_extent()
    assert box.height / box.width == pytest.approx(40 / 60, abs=0.01)
    assert figure[0].axes[1].images[-1].get_extent() == [0, reach, reach, 0]
    assert figure[0].axes[1].get_xlim() == (0, 64)


def test_field_has_a_scale_and_says_what_brightness_is(figure, tmp_path):
    look_draw.draw_field(tmp_path, [torch.rand(20, 20)] * 2, "title")
    assert figure[0].axes[-1].get_ylabel() == "influence, of the stage's largest"
    assert "brightness is the square root" in " ".join(figure[0].get_suptitle().split())


def test_model_of_one_size_gets_it(photo):
    loaded = open_model("test_vit")
    assert look_picture.read_picture(photo, loaded).images.shape == (1, 3, 160, 160)


@pytest.mark.slow
def test_zero_map_is_said(capsys, tmp_path, photo, finished, monkeypatch):
    monkeypatch.setattr(look_cam, "heat", lambda *_: np.zeros((64, 96)))
    _, out, _ = run(capsys, "cam", finished, photo, "--class", "cat", "-o", tmp_path / "a.png")
    assert "there is no evidence for cat: the map is zero everywhere." in out


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "test_vann", "PHOTO"], "there is no model 'test_vann': did you mean test_van?"),
        (["keys", "qqqqqqqq", "PHOTO"], "there is no model 'qqqqqqqq': zoo-models lists the models of zoo, "),
        (["keys", "runs/none", "PHOTO"], "there is no folder runs/none: "),
        (["keys", "van_b0.none", "PHOTO"], "van_b0 has no weights 'none': it has in1k, in1k_mmseg."),
        (["keys", "FOLDER", "PHOTO"], "FOLDER has no config.json and model.safetensors: give the folder"),
        (["keys", "RUN", "PHOTO", "--pretrained"], "RUN is a run folder, with its own weights"),
        (["keys", "hf-hub:a/b", "PHOTO", "--pretrained", "PHOTO"], "hf-hub:a/b has its own weights: leave out PHOTO"),
        (["keys", "test_van", "PHOTO", "--pretrained", "none.pth"], "there is no checkpoint none.pth: "),
        (["keys", "test_van", "PHOTO", "--pretrained", "PHOTO"], "PHOTO can't be read as a checkpoint: "),
        (["keys", "test_nat", "PHOTO", "--pretrained", "WEIGHTS"], "test_nat can't be created with WEIGHTS: "),
        (["keys", "test_van", "none.jpg"], "there is no file none.jpg: give a picture."),
        (["keys", "test_van", "WEIGHTS"], "WEIGHTS can't be read as a picture: "),
        (["keys", "test_van", "PHOTO", "--pixel", "40", "0"], "--pixel 40 0 is outside the picture of 40x60 pixels"),
        (
            ["keys", "test_van", "PHOTO", "--block", "3"],
            "no stage of test_van with attention has a block 3: its",
        ),
        (["keys", "test_van", "PHOTO", "--size", "16", "64"], "test_van can't run on images of 16x64 pixels: Got "),
        (
            ["keys", "test_resnet", "PHOTO"],
            "test_resnet has no attention module of zoo: use zoo-look cam or zoo-look field",
        ),
        (["rollout", "test_van", "PHOTO"], "rollout multiplies the attention of all blocks, so their tokens have to"),
        (
            ["cam", "RUN", "PHOTO", "--class", "cow"],
            "there is no class 'cow': give a number from 0 to 2, or one",
        ),
        (["cam", "RUN", "PHOTO", "--class", "3"], "there is no class '3': give a number from 0 to 2, or one of cat"),
        (["cam", "RUN", "PHOTO", "--stage", "5"], "mine has no stage 5: give a number from 1 to 4."),
        (["cam", "test_vit", "PHOTO"], "the features have the shape (1, 101, 64) and are not maps of 64 channels"),
        (["cam", "RUN", "PHOTO", "-o", "a.jpg"], "got -o a.jpg: its name has to end in .png."),
        (["cam", "RUN", "PHOTO", "-o", "PHOTO"], "PHOTO exists; --force replaces it."),
        (["patterns", "-o", "PHOTO/a.png"], "PHOTO/a.png can't be written: PHOTO is not a folder that you may write"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, photo, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"PHOTO": photo, "RUN": finished, "FOLDER": tmp_path, "WEIGHTS": finished / "model.safetensors"}

    def fill(text):
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    code, out, errors = run(capsys, *map(fill, arguments))
    assert (code, out) == (2 if "leave out" in errors else 1, "")
    assert errors.startswith(f"zoo-look: error: {fill(message)}")
    assert errors.count("\n") == 1
    assert not list(tmp_path.glob("*_*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "test_van", "x", "--pixel", "a", "1"], "--pixel: got 'a'; give a whole number of 0 or more"),
        (["keys", "test_van", "x", "--size", "0", "1"], "--size: got '0'; give a whole number of 1 or more"),
        (["keys", "test_van", "x", "--block", "0"], "--block: got '0'; give a whole number from 1, or -1 for the"),
        (["look"], "invalid choice: 'look'"),
        (["patterns", "resnet"], "invalid choice: 'resnet'"),
    ],
)
def test_bad_options(arguments, message, capsys):
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert message in errors


def test_cam_needs_a_package(capsys, tmp_path, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    code, _, errors = run(capsys, "cam", "test_van", photo, "-o", tmp_path)
    assert code == 1
    assert "zoo-look cam needs pytorch_grad_cam: run pip install 'backbone-zoo[examples]'." in errors


def test_other_refusals(photo):
    loaded = OpenModel(nn.Identity(), "mine", "", {"input_size": (4, 64, 64)}, False)
    with pytest.raises(UserError, match="mine takes images of 4 channels: zoo-look takes grey and RGB pictures"):
        look_picture.read_picture(photo, loaded)
    with pytest.raises(UserError, match="mine has no feature maps"):
        look_cam.layer(loaded, None)
    with pytest.raises(UserError, match="stage 1 does not depend on the image"):
        look_attention.field(lambda x: [0 * x], 1, (8, 8), 1)


def test_backbone_without_classifier(capsys, tmp_path, photo):
    folder = tmp_path / "backbone"
    save_for_hf(build("test_van", num_classes=0), str(folder), safe_serialization=True)
    code, _, errors = run(capsys, "cam", folder, photo, "-o", tmp_path / "a.png")
    assert code == 1
    assert "backbone has no classifier: use zoo-look keys or zoo-look field." in errors


@pytest.mark.slow
def test_narrow_pictures_keep_their_titles(tmp_path):
    """A very wide and a very high picture get figures of a usable shape."""
    for shape in ((40, 400, 3), (400, 40, 3)):
        path = tmp_path / "a.png"
        picture = look_picture.Picture(np.zeros(shape, dtype=np.uint8), torch.zeros(1, 3, *shape[:2]), shape[:2])
        look_draw.draw_heat(path, np.eye(4), picture, ("one", "two"), "title " * 30, "of the largest")
        width, height = picture_size(path)
        assert 0.2 < width / height < 5


@pytest.mark.slow
def test_help_needs_no_torch():
    code = "import zoo.tools.look as m, sys; m.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
