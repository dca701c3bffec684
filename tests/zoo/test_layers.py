"""Shared layers: the MLP against that of timm, and the rates of stochastic depth. A second."""

import copy

import pytest
import timm
import torch
from torch import nn

from zoo.layers import Mlp, dot_product_attention, stage_rates


def test_mlp_is_timms():
    torch.manual_seed(0)
    ours = Mlp(12, 20, approximate="tanh").double()
    theirs = timm.layers.Mlp(12, 20, act_layer=lambda: nn.GELU("tanh")).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_mlp_drops_after_both_layers():
    torch.manual_seed(0)
    mlp = Mlp(12, 20, drop=1.0)
    hidden = copy.deepcopy(mlp)
    hidden.drop2 = nn.Identity()
    x = torch.randn(3, 12)
    assert mlp(x).count_nonzero() == 0
    torch.testing.assert_close(hidden(x), mlp.fc2.bias.expand(3, -1))


def test_rates_of_stochastic_depth_grow_over_all_blocks():
    rates = stage_rates(0.3, (1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 2, 1]
    assert [rate for stage in rates for rate in stage] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_exported_attention_has_strides_of_its_own():
    """Those of PyTorch's operator depend on the machine and on gradients; a later view would rely on them."""

    class Attention(nn.Module):
        def forward(self, x):
            return dot_product_attention(x, x, x)

    x = torch.randn(2, 3, 4, 8)
    program = torch.export.export(Attention(), (x,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.index(torch.ops.aten.clone.default) < targets.index(torch.ops.aten.flatten.using_ints)
    torch.testing.assert_close(program.module()(x), Attention()(x))
