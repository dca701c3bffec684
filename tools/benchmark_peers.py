"""Who takes part in `zoo-bench kernels`: our implementations, and what one would write without them.

Letters: B images, H, W map, N heads, D head dim, T tokens of a window, K keys of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from zoo import kernels
from zoo.kernels import dispatch
from zoo.kernels.depthwise_conv import cases as depthwise_cases
from zoo.kernels.neighborhood_attention import cases as neighborhood_cases
from zoo.kernels.neighborhood_attention.common import neighbors
from zoo.kernels.routed_attention import cases as routed_cases
from zoo.kernels.window_attention import cases as window_cases
from zoo.kernels.window_attention.reference import expand_bias
from zoo.kernels.windows import partition, unpartition

Arguments = dict[str, Any]
# What an argument becomes before the clock starts; the gradient of the output comes as "grad".
Prepare = Callable[[str, Any], Any]


class CannotRunError(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator, called with the public function's arguments."""

    name: str
    compute: Callable[..., Tensor]
    prepare: Prepare = lambda name, value: value
    only_backward: bool = False


@dataclass(frozen=True)
class Operator:
    """A public function of zoo.kernels, its cases, and others' ways to compute it."""

    function: Callable[..., Tensor]
    cases: dict[str, Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]]
    peers: tuple[Contender, ...]
    flops: Callable[[Arguments], int]  # for each number of the output, forward
    backward_flops: float  # those of the backward pass, as a multiple

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Our implementations, then the others."""
        folder = self.function.__module__.rpartition(".")[0]
        names = ("triton", "torch", "reference") if find_spec(f"{folder}.triton_impl") else ("torch", "reference")
        return *(Contender(name, partial(call_ours, self.function, name)) for name in names), *self.peers


def call_ours(function: Callable[..., Tensor], choice: str, **arguments: Any) -> Tensor:
    """The public function with one of its implementations."""
    if choice == "triton":
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if (obstacle := dispatch.triton_obstacle(first)) is not None:
            raise CannotRunError(obstacle)
    with kernels.implementation(choice):
        return function(**arguments)


# Windows: what Swin's and MaxViT's authors write, with three ways to attend.


def _windows(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    """Cut into windows, copying; attend; put together, copying."""
    qkv, heads, size, layout = (given[name] for name in ("qkv", "num_heads", "window_size", "layout"))
    size = size if isinstance(size, tuple) else (size, size)
    parts = 3 if given["q"] is None else 2
    cut = partition(qkv, size, layout)  # (B, windows, T, C)
    count = cut.shape[1]
    *query, key, value = cut.flatten(0, 1).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if given["q"] is not None:
        shared = given["q"].unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, T, D)
        query = [shared[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)]
    bias = None
    if given["bias_table"] is not None:
        bias = expand_bias(given["bias_table"].to(qkv.dtype), size, given["bias_sign"])  # (N, T, T)
    if given["key_mask"] is not None:
        taken = partition(given["key_mask"][..., None], size, layout).flatten(0, 1)[..., 0][:, None, None]
        hidden = torch.zeros(taken.shape, dtype=qkv.dtype, device=qkv.device).masked_fill(~taken, -torch.inf)
        bias = hidden if bias is None else bias + hidden
    scale = query[0].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query[0], key, value, bias, scale).transpose(1, 2).flatten(-2).unflatten(0, (-1, count))
    return unpartition(out, size, tuple(qkv.shape[1:3]), layout)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _needs_no_mask(bias)
    scores = (query * scale) @ key.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ value


def _flex_windows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _flex_can(query)
    _needs_no_mask(bias)
    if bias is None:
        return _compiled_flex()(query, key, value, scale=scale)

    def added(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[h, q, k]

    return _compiled_flex()(query, key, value, score_mod=added, scale=scale)


def _needs_no_mask(bias: Tensor | None) -> None:
    if bias is not None and bias.dim() != 3:
        raise CannotRunError("not written for key_mask, where a window may have no key at all")


def _flex_can(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.requires_grad:
        raise CannotRunError("it has no backward pass on CPUs")


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _bias_fixed(name: str, value: Any) -> Any:
    return value.detach() if name == "bias_table" and value is not None else value


# Neighborhoods.


def _neighborhoods(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    _takes_no_key_mask(given)
    qkv, heads = given["qkv"], given["num_heads"]
    height, width = qkv.shape[1:3]
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # B N HW D
    axes = tuple(
        (length, *options)
        for length, *options in zip(
            (height, width),
            *(_pair(given[name]) for name in ("kernel_size", "dilation", "stride", "is_causal")),
            strict=True,
        )
    )
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query, key, value, given["bias_table"], scale, axes)
    return out.transpose(1, 2).flatten(-2).unflatten(1, (height, width))


def _takes_no_key_mask(given: dict[str, Any]) -> None:
    if given["key_mask"] is not None:
        raise CannotRunError("not written for key_mask")


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _unfold(query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, scale: float, axes: Any) -> Tensor:
    """Each query's keys and values side by side in memory."""
    index, down, right, valid = _neighbor_index(axes, query.device)  # (HW, K) each
    key, value = key[:, :, index], value[:, :, index]  # (B, N, HW, K, D)
    scores = (query * scale)[..., None, :] @ key.transpose(-2, -1)  # (B, N, HW, 1, K)
    if table is not None:
        scores = scores + table.to(scores.dtype)[:, down, right][:, :, None]
    if not valid.all():
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
    return (scores.softmax(-1) @ value)[..., 0, :]


@cache
def _neighbor_index(axes: Any, device: torch.device) -> tuple[Tensor, ...]:
    """For each position, by row and then by column: its neighbours, their entries in the table, which count."""
    (rows, down, row_valid), (columns, right, column_valid) = (neighbors(*axis, device) for axis in axes)
    index = rows[:, None, :, None] * axes[1][0] + columns[None, :, None, :]
    down = (down + axes[0][1] - 1)[:, None, :, None].expand_as(index)
    right = (right + axes[1][1] - 1)[None, :, None, :].expand_as(index)
    valid = row_valid[:, None, :, None] & column_valid[None, :, None, :]
    return tuple(x.flatten(2).flatten(0, 1) for x in (index, down, right, valid))


def _flex_neighborhoods(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, scale: float, axes: Any
) -> Tensor:
    _flex_can(query)
    block_mask, down, right = _flex_mask(axes, query.device)
    width = axes[1][0]

    def added(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[h, down[q // width, k // width], right[q % width, k % width]]

    bias = None if table is None else added
    return _compiled_flex()(query, key, value, score_mod=bias, block_mask=block_mask, scale=scale)


@cache
def _flex_mask(axes: Any, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    allowed, offsets = [], []
    for length, kernel, *rest in axes:
        found, offset, valid = neighbors(length, kernel, *rest, device)
        takes = torch.zeros(length, length, dtype=torch.bool, device=device)
        query = torch.arange(length, device=device)[:, None].expand_as(found)
        takes[query[valid], found[valid]] = True
        entry = torch.zeros(length, length, dtype=torch.int32, device=device)
        entry[query[valid], found[valid]] = (offset[valid] + kernel - 1).to(torch.int32)
        allowed.append(takes)
        offsets.append(entry)
    (rows, columns), (height, width) = allowed, (axis[0] for axis in axes)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rows[q // width, k // width] & columns[q % width, k % width]

    block_mask = create_block_mask(seen, None, None, height * width, height * width, device=device)
    return block_mask, *offsets


def _natten(**given: Any) -> Tensor:
    try:
        from natten import na2d
    except ImportError:
        raise CannotRunError("the package natten is not installed") from None
    _takes_no_key_mask(given)
    query, key, value = given["qkv"].unflatten(-1, (3, given["num_heads"], -1)).unbind(3)
    names = ("kernel_size", "dilation", "stride", "is_causal", "scale")
    return na2d(query, key, value, **{name: given[name] for name in names}).flatten(-2)


def _without_bias(name: str, value: Any) -> Any:
    return None if name == "bias_table" else value


# Routed regions: what BiFormer's authors write.


def _gather(attend: Callable[..., Tensor], **given: Any) -> Tensor:
    q, regions, heads = given["q"], given["regions"], given["num_heads"]

    def cut(x: Tensor) -> Tensor:
        return partition(x, (x.shape[1] // regions, x.shape[2] // regions), "block")  # (B, regions, T, C)

    image = torch.arange(q.shape[0], device=q.device)[:, None, None]
    key, value = (cut(given[name])[image, given["routes"]].flatten(2, 3) for name in ("k", "v"))
    query, key, value = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (cut(q), key, value))
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    out = attend(query, key, value, None, scale).transpose(1, 2).flatten(-2).unflatten(0, (-1, regions**2))
    size = (q.shape[1] // regions, q.shape[2] // regions)
    return unpartition(out, size, tuple(q.shape[1:3]), "block")


# Depth-wise convolution.


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Any) -> Tensor:
    steps = _pair(dilation)
    padding = tuple(d * (k // 2) for d, k in zip(steps, weight.shape[2:], strict=True))
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=padding, dilation=steps, groups=x.shape[-1])
    return out.movedim(1, -1)


def _planes(name: str, value: Any) -> Any:
    """A network in NCHW has its maps so; the copy is not timed."""
    if name not in ("x", "grad"):
        return value
    return value.detach().movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_(value.requires_grad)


def _target(size: int, channels: int, option: str, *, batch: int, dtype: Any, device: Any, requires_grad: bool) -> Any:
    """Windows or neighborhoods of 7 x 7 on a map, heads of 32 channels, with a bias: the project's yardstick."""
    generator = torch.Generator().manual_seed(0)
    heads = channels // 32
    qkv = torch.randn(batch, size, size, 3 * channels, generator=generator).to(device, dtype)
    table = torch.randn(heads, 13, 13, generator=generator).to(device, dtype)
    options = {"num_heads": heads, option: 7, "bias_table": table.requires_grad_(requires_grad)}
    return (qkv.requires_grad_(requires_grad),), options


def _cases(module: Any, option: str | None = None) -> dict[str, Callable[..., Any]]:
    sizes = ((56, 64), (14, 256)) if option else ()
    targets = {f"target-{size}x{size}x{c}": partial(_target, size, c, option) for size, c in sizes}
    return targets | {name: partial(module.inputs, case) for name, case in module.CASES.items()}


def _region_tokens(a: Arguments) -> int:
    return a["k"].shape[1] * a["k"].shape[2] // a["regions"] ** 2


def _product(value: Any) -> int:
    return _pair(value)[0] * _pair(value)[1]


# An attention's backward pass is five matrix products to the forward pass's two, a convolution's two to one.
OPERATORS = {
    "window": Operator(
        kernels.window_attention,
        _cases(window_cases, "window_size"),
        (
            Contender("sdpa", partial(_windows, _sdpa)),
            Contender("softmax", partial(_windows, _softmax)),
            Contender("flex", partial(_windows, _flex_windows)),
            Contender("flex, bias fixed", partial(_windows, _flex_windows), _bias_fixed, only_backward=True),
        ),
        lambda a: 4 * _product(a["window_size"]),
        2.5,
    ),
    "neighborhood": Operator(
        kernels.neighborhood_attention,
        _cases(neighborhood_cases, "kernel_size"),
        (
            Contender("unfold", partial(_neighborhoods, _unfold)),
            Contender("flex", partial(_neighborhoods, _flex_neighborhoods)),
            Contender(
                "flex, bias fixed", partial(_neighborhoods, _flex_neighborhoods), _bias_fixed, only_backward=True
            ),
            Contender("natten, no bias", _natten, _without_bias),
        ),
        lambda a: 4 * _product(a["kernel_size"]),
        2.5,
    ),
    "routed": Operator(
        kernels.routed_attention,
        _cases(routed_cases),
        (
            Contender("gather, sdpa", partial(_gather, _sdpa)),
            Contender("gather, softmax", partial(_gather, _softmax)),
        ),
        lambda a: 4 * a["routes"].shape[2] * _region_tokens(a),
        2.5,
    ),
    "depthwise": Operator(
        kernels.depthwise_conv2d_nhwc,
        _cases(depthwise_cases),
        (Contender("conv2d NCHW", _conv2d, _planes), Contender("conv2d NHWC", _conv2d)),
        lambda a: 2 * _product(tuple(a["weight"].shape[2:])),
        2.0,
    ),
}
