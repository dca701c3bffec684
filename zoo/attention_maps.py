"""What attention modules attend to, computed from the modules themselves; `zoo-look` draws it.

An attention module describes itself with a method `attention_info()`, which returns an `AttentionInfo`. Its last layer
is a linear layer `proj`; without one, its output is the weighted sum of the values. Parameters `lepe.*` belong to a
convolution of the values, whose output is added to the attention's; `AttentionInfo.silent` names other such parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["AttentionInfo", "Pattern", "attended", "attention", "attention_matrix", "info"]


@dataclass(frozen=True)
class AttentionInfo:
    """What a module attends to, and where its weights come from.

    Attributes:
        groups: For each group of heads, in the order of their channels, what its queries attend to, in words.
        values: The layer whose output ends with the values; None for a module without attention weights.
        gated: Whether a gate, as wide as the values, follows them in that output and multiplies their weighted sum. The
            weights are those without it.
        signed: Whether weights can be negative, and need not have the sum 1.
        kernel: For a module without attention weights, the function that computes the gate from its input (B, C, H, W).
        key_size: Side of a key, in tokens; above 1 where the keys are means of windows.
        spread: For a module whose keys each stand for several tokens that are apart, the function that divides weights
            of keys (..., h, w) among the tokens of a map of the given sides (..., H, W).
        silent: The first parts of the names of parameters that are set to zero, so that what is added to the attention
            is left out.
        fixed: The names of modules whose outputs make the weights, for values that they also read: these outputs are
            held fixed.
        class_token: If the tokens are a sequence (1, 1, H W + 1, C), where in it the class token is, among those of the
            map: "middle" for H W // 2, "last" for H W. Empty without one.
    """

    groups: tuple[str, ...]
    values: nn.Module | None = None
    gated: bool = False
    signed: bool = False
    kernel: Callable[[Tensor], Tensor] | None = None
    key_size: int = 1
    spread: Callable[[Tensor, tuple[int, int]], Tensor] | None = None
    silent: tuple[str, ...] = ("lepe.",)
    fixed: tuple[str, ...] = ()
    class_token: str = ""


@dataclass(frozen=True)
class Pattern:
    """A panel of `zoo-look patterns`: what one token attends to.

    Attributes:
        title: What is shown.
        lines: Two lines of text. If there are two maps, each line describes one of them and has its colour.
        maps: One or two maps with values from 0 to 1: (H, W), or (h, w) if the keys are means of windows.
        queries: The row and column of each token that attends.
    """

    title: str
    lines: tuple[str, str]
    maps: tuple[Tensor, ...]
    queries: tuple[tuple[int, int], ...]


def info(module: nn.Module) -> AttentionInfo | None:
    """The `AttentionInfo` of an attention module; None for any other module."""
    describe = getattr(module, "attention_info", None)
    return describe() if callable(describe) else None


def attention(module: Any, args: Sequence[Tensor], tokens: Sequence[tuple[int, int]]) -> Tensor:
    """The weights with which chosen tokens attend to the keys, from the module's own output.

    The input of the last linear layer is the weighted sum of the values. So its derivative with respect to a value is
    the weight of that value, channel by channel, for every operator and implementation. LePE, a convolution of the
    values that is added to the sum, is set to zero for this, and a gate to one. The derivative of an activation before
    the sum is a factor of the weights.

    Args:
        module: An attention module with `attention_info`.
        args: Its inputs for one image: tokens (1, H, W, C), or (1, C, H, W) if it has a kernel; then any others.
        tokens: Rows and columns of the Q queries.

    Returns:
        (Q, G, h, w), averaged over the heads of each of the G groups. The keys are the tokens or the means of windows.
        If the map is padded before the linear layer, they include the padding at the bottom and the right. For a
        kernel, the weights are each token's share of the kernel's absolute weights, over all channels.
    """
    described = module.attention_info()
    rows, columns = torch.tensor(tokens).unbind(1)
    count = torch.arange(len(tokens))
    args = tuple(x.detach().expand(len(tokens), *x.shape[1:]) for x in args)
    with torch.enable_grad():
        if described.kernel is not None:
            x = args[0].clone().requires_grad_()
            gate = described.kernel(x)[count, :, rows, columns]
            share = torch.autograd.grad(gate.sum(), x)[0].abs().sum(1, keepdim=True)
            return share / share.sum((2, 3), keepdim=True)
        values = []

        def watch_values(qkv: Tensor) -> Tensor:
            values.append(qkv.detach().requires_grad_())
            return values[-1]

        out = _weighted_sum(module, args, watch_values)
        weights = torch.autograd.grad(out[count, rows, columns].sum(), values[0])[0][..., -out.shape[-1] :]
    weights = weights.unflatten(-1, (len(described.groups), -1)).mean(-1).permute(0, 3, 1, 2)
    return weights if described.spread is None else described.spread(weights, (args[0].shape[1], args[0].shape[2]))


@torch.no_grad()
def attention_matrix(module: Any, args: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The weights with which all tokens attend to all tokens, averaged over heads: (H W, H W), queries by keys.

    They equal those of `attention` for all tokens, but are computed much faster. In each channel of a head, the values
    are set to one at a single token, a different one for each channel, and to zero elsewhere. The weighted sum then
    consists of the weights of as many keys as a head has channels.

    Args:
        module: An attention module with a single group of heads, whose keys are its tokens.
        args: Its inputs for one image, as for `attention`.
        size: Height and width of the map of tokens, without padding.
    """
    heads: int = module.num_heads
    head_dim = args[0].shape[-1] // heads
    parts = []
    for keys in torch.arange(size[0] * size[1]).split(head_dim):

        def set_values(qkv: Tensor, keys: Tensor = keys) -> Tensor:
            values = qkv.new_zeros(*qkv.shape[1:3], heads, head_dim)
            values[keys // size[1], keys % size[1], :, torch.arange(len(keys))] = 1
            return torch.cat((qkv[..., : -heads * head_dim], values.flatten(2)[None]), -1)

        out = _weighted_sum(module, args, set_values)[0, : size[0], : size[1]]
        parts.append(out.unflatten(-1, (heads, head_dim)).mean(2)[..., : len(keys)])
    return torch.cat(parts, -1).flatten(0, 1)


def attended(module: Any, token: tuple[int, int], *args: Tensor) -> tuple[Tensor, ...]:
    """For each group of heads, the keys that a token attends to: maps (h, w) with 1 for them and 0 for the others."""
    return tuple((weights > 0).float() for weights in attention(module, args, [token])[0])


def _weighted_sum(module: Any, args: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    """The input of the last linear layer, or the output if there is none, if `change` is applied to the values.

    The last channels of the output of the layer `values` are the values, or a gate after them. The gate and what the
    parameters `silent` add are left out.
    """
    outputs: list[Tensor] = []
    described = module.attention_info()

    def changed(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not described.gated:
            return change(out)
        gate = torch.ones_like(out[..., : module.proj.in_features])
        return torch.cat((change(out[..., : -gate.shape[-1]]), gate), -1)

    hooks = [described.values.register_forward_hook(changed)]
    if hasattr(module, "proj"):
        hooks.append(module.proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0])))
    hooks += [module.get_submodule(name).register_forward_hook(_held_fixed) for name in described.fixed]
    silent = {name: torch.zeros_like(x) for name, x in module.named_parameters() if name.startswith(described.silent)}
    try:
        outputs.append(functional_call(module, silent, tuple(args)))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[0]


def _held_fixed(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.detach()
