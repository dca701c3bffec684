"""Random constructor arguments of all families give a model that runs, or a sentence that names the argument. 20 s."""

import inspect
import random
import re

import numpy as np
import pytest
import timm
import torch

import zoo  # noqa: F401

MODELS = [name for name in timm.list_models("test_*") if timm.model_entrypoint(name).__module__.startswith("zoo.")]
BY_NAME = {name: type(timm.create_model(name, device="meta")) for name in MODELS}

NUMBERS = [0, 1, -1, 2, 3, 7, 1e6, 1e-9, 0.5, 10**9, True, None, float("nan"), float("inf"), "3", "", [], {}, b"3"]
WORDS = ["avg", "", "max", "nat", "swin", "isotropic", "stl", "Stl", None, 3, "\n"]


def lists(rng):
    if rng.random() < 0.2:
        return rng.choice(NUMBERS)
    values = [
        rng.choice([1, 2, 4, 8, 16, 32, *NUMBERS]) if rng.random() < 0.3 else rng.choice([1, 2, 4, 16])
        for _ in range(rng.choice([4, 4, 4, 3, 5, 0]))
    ]
    return rng.choice([list, tuple])(values)


def calls(count):
    """Seeded calls of all families: a model and one or two random arguments."""
    rng = random.Random(0)
    for number in range(count):
        name = MODELS[number % len(MODELS)]
        own = list(inspect.signature(BY_NAME[name].__init__).parameters.items())[1:]
        chosen = rng.sample(
            [(key, p.default) for key, p in own if key not in ("device", "dtype")], rng.choice([1, 1, 2])
        )
        kwargs = {}
        for key, default in chosen:
            if isinstance(default, tuple):
                kwargs[key] = lists(rng)
            else:
                kwargs[key] = rng.choice(WORDS if isinstance(default, str) else NUMBERS)
        yield pytest.param(name, kwargs, id=f"{name}-{number}")


def either_runs_or_says_why(name, kwargs):
    cls = BY_NAME[name]
    settings = inspect.getmodule(cls).VARIANTS[name] | kwargs
    try:
        model = cls(**settings).eval()
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert re.fullmatch("Got .*", message)  # a single line
        assert any(key in message for key in kwargs), message
        return
    in_chans = settings.get("in_chans", 3)
    with torch.no_grad():
        model(torch.zeros(1, in_chans, 32, 32)) if model.num_classes and model.global_pool else model.forward_features(
            torch.zeros(1, in_chans, 32, 32)
        )


@pytest.mark.parametrize(("name", "kwargs"), calls(120))
def test_random_arguments(name, kwargs):
    either_runs_or_says_why(name, kwargs)


@pytest.mark.slow
def test_more_random_arguments():
    for call in calls(600):
        either_runs_or_says_why(*call.values)


@pytest.mark.parametrize(
    "name", [name for name, cls in BY_NAME.items() if "mlp_ratio" in inspect.signature(cls).parameters]
)
def test_a_ratio_for_each_stage_is_taken_or_refused(name):
    either_runs_or_says_why(name, {"mlp_ratio": (2, 2, 2, 2)})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_chans": 0}, "Got in_chans=0; it has to be a whole number from 1 to 16,384."),
        ({"num_classes": -1}, "Got num_classes=-1; it has to be a whole number from 0 to 10,000,000."),
        ({"num_classes": True}, "Got num_classes=True; it has to be a whole number"),
        ({"global_pool": "max"}, "Got global_pool='max'; it has to be one of 'avg', 'ep', ''."),
        ({"drop_path_rate": float("nan")}, "Got drop_path_rate=nan; it has to be a number from 0 to 1."),
        ({"drop_rate": "0.1"}, "Got drop_rate='0.1'; it has to be a number from 0 to 1."),
        ({"depths": "2222"}, "Got depths='2222'; give a list with one value per stage."),
        ({"depths": (1, 1, 1.5, 1)}, "Got depths=(1, 1, 1.5, 1); it has to be whole numbers from 1 to 1,000"),
        ({"embed_dims": (10**6,) * 4}, "; it has to be whole numbers from 1 to 16,384, one per stage."),
        ({"embed_dims": 16}, "Got embed_dims=16; give a list with one value per stage."),
        ({"out_indices": (0, 9), "features_only": True}, "Got out_indices=(0, 9); it has to be a list of"),
        ({"out_indices": 0, "features_only": True}, "Got out_indices=0; it has to be a list of stages"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_messages(name, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_have_a_hint(name):
    with pytest.raises(
        TypeError, match=f"^Got drop_pathrate=0.1, which {name} does not take; did you mean drop_path_rate?"
    ):
        timm.create_model(name, drop_pathrate=0.1)
    with pytest.raises(TypeError, match=f"^Got xyz=1, which {name} does not take; it takes in_chans, num_classes, "):
        timm.create_model(name, xyz=1)


def test_numbers_of_numpy_are_numbers():
    model = timm.create_model("test_van", num_classes=np.int64(5), drop_rate=np.float32(0)).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"depths=.*; give a list with one value per stage"):
        timm.create_model("test_van", depths=np.ones(4, int))


def test_lists_of_a_configuration_are_lists():
    from omegaconf import OmegaConf

    kwargs = OmegaConf.create({"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 16, 16]})
    assert timm.create_model("test_van", **kwargs).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
