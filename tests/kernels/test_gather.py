"""Gathering with gradients in compiled programs. Half a minute."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from zoo.kernels.gather import take

INDEX = torch.tensor([3, 0, 3, 3, 1])  # several times, and not all


def value_and_gradient(function, x, dim):
    x = x.clone().requires_grad_()
    out = function(x, dim, INDEX)
    return out, torch.autograd.grad(out.sin().sum(), x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_agrees_with_index_select(dim):
    torch._dynamo.reset()
    compiled = torch.compile(take, fullgraph=True, backend="aot_eager")
    for size in (4, 5):
        x = torch.randn(size, size, size)
        want = value_and_gradient(torch.index_select, x, dim)
        torch.testing.assert_close(value_and_gradient(take, x, dim), want)
        torch.testing.assert_close(value_and_gradient(compiled, x, dim), want)


@pytest.mark.slow
def test_inductor_adds_without_atomic_operations():
    torch._dynamo.reset()
    x = torch.randn(4, 16)
    found, code = run_and_get_code(value_and_gradient, torch.compile(take, fullgraph=True), x, 0)
    torch.testing.assert_close(found, value_and_gradient(take, x, 0))
    assert not any("atomic_add" in part for part in code)
    assert any("zoo.index_add" in part for part in code)


@pytest.mark.slow
def test_sum_is_a_proper_operator():
    torch.library.opcheck(torch.ops.zoo.index_add.default, (torch.randn(2, 5, 3), 1, INDEX, 4))


def test_programs_to_export_have_plain_operators():
    class Gather(torch.nn.Module):
        def forward(self, x):
            return take(x, 0, INDEX)

    program = torch.export.export(Gather(), (torch.randn(4, 2, requires_grad=True),))
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.index_select.default
    ]
