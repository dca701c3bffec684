"""The parts that the operators' PyTorch implementations share."""

import pytest
import torch

from zoo.kernels.attention import _products


@pytest.mark.slow
def test_compiled_products_have_contiguous_gradients():
    torch._dynamo.reset()
    query, key = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 7, 4, requires_grad=True)
    compiled = torch.compile(_products, fullgraph=True, backend="aot_eager")
    found, want = (
        torch.autograd.grad(function(query, key).sin().sum(), (query, key)) for function in (compiled, _products)
    )
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(compiled(query, key), query @ key.mT)
    assert all(grad.is_contiguous() for grad in found)
    assert not want[1].is_contiguous()  # else PyTorch no longer needs help
