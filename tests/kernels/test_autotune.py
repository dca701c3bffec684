"""ZOO_AUTOTUNE=1: which launches the autotuner times. A second; only a GPU can show that the timing works."""

import pytest
import torch

pytest.importorskip("triton")

from zoo.kernels import triton_common
from zoo.kernels.window_attention import triton_impl

from . import compilation


@pytest.mark.parametrize("autotune", [False, True])
def test_launch_leaves_warps_and_stages_to_the_autotuner(autotune, monkeypatch):
    launched = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: launched.append((self.kernel, arguments))

    monkeypatch.setattr(triton_common, "AUTOTUNE", autotune)
    monkeypatch.setattr(triton_common, "wrap_triton", Kernel)
    with compilation.fake_cuda():
        qkv = torch.empty(1, 14, 14, 96, device="cuda", dtype=torch.float16)
        options = {"num_heads": 1, "wh": 7, "ww": 7, "grid": False, "key_minus_query": False, "scale": 1.0}
        triton_impl.forward(qkv, None, None, None, **options)
    ((kernel, arguments),) = launched
    assert ("num_warps" in arguments) is not autotune
    if autotune:
        assert {config.num_warps for config in kernel.configs} == {4, 8}
        assert "tokens" in kernel.keys
        assert "qkv_ptr" not in kernel.keys
        assert triton_common._autotuned(kernel.fn) is kernel
