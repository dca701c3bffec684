"""The cache of masks and indices: its bound, its order, and when it is bypassed. Seconds."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import constants
from zoo.kernels.constants import constant

LIKE = torch.zeros(3)
made = Counter()


def numbers(count, device):
    made[count] += 1
    return torch.arange(count, dtype=torch.float32, device=device)


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(constants, "_kept", type(constants._kept)())
    made.clear()


def test_is_made_once():
    first, second = constant(numbers, 4, like=LIKE), constant(numbers, 4, like=torch.nn.Parameter(LIKE.double()))
    assert first is second
    assert torch.equal(first, torch.arange(4.0))
    assert made == {4: 1}


def test_is_made_for_each_device():
    constant(numbers, 4, like=LIKE)
    assert constant(numbers, 4, like=LIKE.to("meta")).device.type == "meta"


def test_the_longest_unused_goes_first(monkeypatch):
    monkeypatch.setattr(constants, "MAX_BYTES", 12 * 4)
    for count in (3, 4, 5, 3, 2):  # 4, 5, 3 are full; 3 is used again; 2 takes the place of 4
        constant(numbers, count, like=LIKE)
    assert [args for _, args, _ in constants._kept] == [(5,), (3,), (2,)]


def test_bound_is_in_bytes(monkeypatch):
    monkeypatch.setattr(constants, "MAX_BYTES", 100)
    for count in range(1, 20):
        constant(numbers, count, like=LIKE)
        assert sum(x.nbytes for x in constants._kept.values()) <= 100
    assert constants._kept


def test_what_is_larger_than_the_bound_drives_nothing_out(monkeypatch):
    monkeypatch.setattr(constants, "MAX_BYTES", 20)
    constant(numbers, 4, like=LIKE)
    assert constant(numbers, 6, like=LIKE).shape == (6,)
    assert [args for _, args, _ in constants._kept] == [(4,)]


def use_it(x):
    return x * constant(numbers, 3, like=x)


def compiled(x):
    return torch.compile(use_it, fullgraph=True, backend="aot_eager")(x)


def exported(x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return use_it(x)

    return torch.export.export(Module(), (x,)).module()(x)


def faked(x):
    with FakeTensorMode() as mode:
        use_it(mode.from_tensor(x))
    return use_it(x)


def faked_around_a_real_tensor(x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        use_it(x)
    return use_it(x)


WATCHED = {
    "compile": compiled,
    "export": exported,
    "fake": faked,
    "fake-mode": faked_around_a_real_tensor,
    "make_fx": lambda x: make_fx(use_it)(x)(x),
    "make_fx-symbolic": lambda x: make_fx(use_it, tracing_mode="symbolic")(x)(x),
    "grad": torch.func.grad(lambda x: use_it(x).sum()),
    "jvp": lambda x: torch.func.jvp(use_it, (x,), (torch.ones(3),))[1],
    "vmap": lambda x: torch.vmap(use_it)(x[None])[0],
}


@pytest.mark.parametrize("name", WATCHED)
def test_nothing_is_kept_from_a_trace(name):
    WATCHED[name](torch.ones(3))
    kept = list(constants._kept.values())
    assert all(type(x) is torch.Tensor for x in kept)
    assert len(kept) == (name in ("fake", "fake-mode"))  # by the plain call afterwards


@pytest.mark.parametrize("name", WATCHED)
def test_nothing_is_taken_into_a_trace(name):
    constant(numbers, 3, like=LIKE)
    torch.testing.assert_close(WATCHED[name](torch.ones(3)), torch.arange(3.0))
    assert made[3] > 1


def test_a_mode_that_watches_sees_the_operations():
    with FlopCounterMode(display=False):
        constant(numbers, 3, like=LIKE)
    assert not constants._kept


def test_made_in_inference_and_used_in_training():
    with torch.inference_mode():
        constant(numbers, 3, like=LIKE)
    x = torch.ones(3, requires_grad=True)
    use_it(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(3.0))
    assert made == {3: 1}


def test_wants_no_gradient():
    def squares(count, device):
        return torch.ones(count, device=device, requires_grad=True) ** 2

    assert not constant(squares, 3, like=LIKE).requires_grad
