"""Empty batches, rejected arguments, random calls and torch.jit.trace: the same in all implementations.

A minute; the tests with thousands of random calls are marked slow and take two minutes.
"""

import random
from importlib import import_module

import pytest
import torch

from zoo.kernels import OPERATORS, implementation

from .calls import call, make, of_images

IMPLEMENTATIONS = ("auto", "torch", "reference")
TESTS = {name: import_module(f"{__package__}.test_{name}") for name in OPERATORS}


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
def test_batch_of_no_images(name, choice):
    tensors = make(name, requires_grad=True)
    with implementation(choice):
        shape = call(name, *tensors).shape
        tensors = tuple(x[:0] if each else x for x, each in zip(tensors, of_images(tensors), strict=True))
        out = call(name, *tensors)
    assert out.shape == (0, *shape[1:])
    for grad in torch.autograd.grad(out.sum(), tensors, allow_unused=True, materialize_grads=True):
        assert (grad == 0).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("name", OPERATORS)
def test_traced_operator_takes_any_batch(name):
    tensors = make(name)
    traced = torch.jit.trace(lambda *tensors: call(name, *tensors), tensors)
    again = [x[:1].contiguous() if each else x for x, each in zip(tensors, of_images(tensors), strict=True)]
    torch.testing.assert_close(traced(*again), call(name, *again))


BAD = [(name, *row) for name, tests in TESTS.items() for row in tests.BAD]


@pytest.mark.parametrize("choice", [*IMPLEMENTATIONS, "triton"])
@pytest.mark.parametrize(("name", "change", "error", "message"), BAD, ids=[f"{row[0]}-{row[3][:40]}" for row in BAD])
def test_all_implementations_reject_the_same_input(choice, name, change, error, message):
    with implementation(choice), pytest.raises(error, match=message):
        TESTS[name].call(**change)


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
def test_valid_call_is_accepted(choice, name):
    with implementation(choice):
        assert torch.isfinite(TESTS[name].call()).all()


def outcome(choice, function, options):
    """The output and its gradients, or the message of the error."""
    given = {
        name: x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    try:
        with implementation(choice):
            out = function(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    inputs = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def check_random_calls(seed, number):
    rng = random.Random(seed)
    for _ in range(number):
        function, options = TESTS[rng.choice(OPERATORS)].random_call(rng)
        want = outcome("reference", function, options)
        for choice in ("auto", "torch"):
            found = outcome(choice, function, options)
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5) if isinstance(want, list) else None
            assert isinstance(want, list) or found == want, (function.__name__, options)


def test_random_calls():
    check_random_calls(seed=0, number=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_random_calls(seed):
    check_random_calls(seed, number=700)
