"""Opening models by name, checkpoint and run folder. 5 s."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from zoo.messages import OptionError, UserError
from zoo.opening import check_name, open_model, takes_one_size, weights_file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with three classes, and its model."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    model = timm.create_model("test_van", num_classes=3)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config_for_hf(model, str(folder / "config.json"))
    return folder, model


def same(model, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pretrained", ["folder", "file"])
def test_weights_of_a_run_bring_their_classes(run, pretrained):
    folder, model = run
    opened = open_model("test_van", str(folder if pretrained == "folder" else folder / "model.safetensors"))
    assert same(opened.model, model)
    assert not opened.model.training


def test_run_folder_is_a_model(run):
    folder, model = run
    opened = open_model(str(folder))
    assert same(opened.model, model)
    assert (opened.name, opened.weights, opened.one_size) == ("mine", "its last weights", False)


@pytest.mark.parametrize("settings", [{"pretrained": True}, {"num_classes": 3}, {"num_classes": 0}])
def test_run_folder_has_its_own_weights_and_classes(run, settings):
    with pytest.raises(OptionError, match="is a run folder, with its own weights and classes: leave out the "):
        open_model(str(run[0]), **settings)


def test_arguments_reach_the_model():
    assert open_model("test_van", num_classes=7).model.num_classes == 7
    with pytest.raises(UserError, match=r"^test_van can't be created with colour='red': .*colour"):
        open_model("test_van", colour="red")


def test_only_models_of_one_size_get_the_size():
    assert takes_one_size("test_vit")
    assert open_model("test_vit", size=96).model.patch_embed.img_size == (96, 96)
    assert not open_model("test_van", size=96).one_size


@pytest.mark.parametrize("name", ["test_van", "van_b0.in1k", "hf-hub:me/mine"])
def test_name_that_is_known(name):
    check_name(name)


def test_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors or best\.safetensors: is it the folder of a run\?"):
        weights_file(tmp_path)
