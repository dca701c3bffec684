"""The models with tools that hook, prune, parametrize, quantize or replace their modules. 30 s."""

import copy
import warnings
from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from zoo import cpu

MODELS = [name for name in timm.list_models("test_*") if timm.model_entrypoint(name).__module__.startswith("zoo.")]

every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


def images(batch=2, side=48):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def weighted(model):
    """The modules that have a weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def outputs(model, x):
    """The logits; of a model with several exits, those of all."""
    return torch.cat(list(model.forward_exits(x))) if getattr(model, "num_exits", 1) > 1 else model(x)


def kinds(model):
    """One module for each place in a block or stem, by name."""
    return {
        name.rpartition("blocks.")[2].lstrip("0123456789"): (name, module) for name, module in weighted(model).items()
    }


@every_model
@torch.no_grad()
def test_forward_hooks_fire(name):
    model, fired = build(name), set()
    for module_name, module in weighted(model).items():
        module.register_forward_hook(lambda *_, module_name=module_name: fired.add(module_name))
    outputs(model, images())
    assert fired == weighted(model).keys()


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_forward_hooks_take_effect(name):
    model = build(name)
    x, before = images(side=64), outputs(model, images(side=64))
    idle = []
    for module_name, module in kinds(model).values():
        hook = module.register_forward_hook(lambda module, inputs, output: output * 3 + 1)
        idle += [module_name] if torch.equal(outputs(model, x), before) else []
        hook.remove()
    assert not idle
    assert torch.equal(outputs(model, x), before)


@every_model
@torch.no_grad()
def test_hooks_see_all_images(name, monkeypatch):
    monkeypatch.setattr(cpu, "WIDE", 0)
    calls = {}
    for batch in (1, 3):
        model, calls[batch] = build(name), Counter()
        for module_name, module in weighted(model).items():
            module.register_forward_hook(lambda *_, key=(batch, module_name): calls[key[0]].update([key[1]]))
        model(images(batch))
    assert calls[3] == calls[1]


@every_model
def test_global_hooks_fire(name):
    model, seen = build(name), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.add(module))
    try:
        model(images())
    finally:
        handle.remove()
    assert seen >= set(weighted(model).values())


@pytest.mark.slow
@every_model
def test_pruned_weights_are_used(name):
    model, reference = build(name), build(name)
    for module_name, module in weighted(model).items():
        prune.random_unstructured(module, "weight", 0.3)
        module.weight_orig.data *= 1.5  # as in a training step; `weight` is updated when the module is called
        with torch.no_grad():
            reference.get_submodule(module_name).weight.copy_(module.weight_orig * module.weight_mask)
    torch.testing.assert_close(model(images()), reference(images()), rtol=1e-4, atol=1e-4)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 1.1


@every_model
def test_parametrized_weights_are_used(name):
    model, reference = build(name), build(name)
    for module_name, module in weighted(model).items():
        parametrize.register_parametrization(module, "weight", Scaled())
        reference.get_submodule(module_name).weight.data *= 1.1
    torch.testing.assert_close(model(images()), reference(images()), rtol=1e-4, atol=1e-4)


@every_model
@pytest.mark.parametrize("which", ["weight_norm", "spectral_norm", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_parametrizations_learn(name, which):
    model = build(name)
    for module in weighted(model).values():
        if isinstance(module, nn.Linear | nn.Conv2d):
            getattr(parametrizations, which)(module, "weight")
    model(images(side=32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Adapter(nn.Module):
    """Replaces a module and has none of its attributes, as LoRA does: W x + B A x."""

    def __init__(self, base, scale):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        out = self.base(x)
        return out + self.scale * out


def adapted(model, scale):
    for module_name, module in weighted(model).items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            model.set_submodule(module_name, Adapter(module, scale))
    return model


@pytest.mark.slow
@every_model
def test_modules_can_be_replaced(name):
    model, reference = adapted(build(name), 0.5), build(name)
    for module in weighted(reference).values():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= 1.5
            if module.bias is not None:
                module.bias.data *= 1.5
    out = model(images())
    torch.testing.assert_close(out, reference(images()), rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert all(adapter.scale.grad is not None for adapter in adapters)


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_dynamic_quantization_sees_linear_layers(name):
    model = build(name)
    count = sum(type(module) is nn.Linear for module in model.modules())
    assert count == sum(isinstance(module, nn.Linear) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        done = sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in quantized.modules())
        out = quantized(images())
    assert done == count
    want = model(images())
    assert (out - want).norm() < 0.1 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_van", "test_cswin"])  # they pass weights to operators
def test_compiled_model_obeys_hooks(name):
    model = build(name)
    for module in weighted(model).values():
        module.register_forward_hook(lambda module, inputs, output: output * 1.5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.slow
@every_model
def test_gradients_of_each_image(name):
    model = build(name)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, image):
        return torch.func.functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images())
    for i, image in enumerate(images()):
        want = torch.autograd.grad(loss(parameters, image), parameters.values())
        torch.testing.assert_close([grad[i] for grad in got.values()], list(want), rtol=1e-3, atol=1e-4)
