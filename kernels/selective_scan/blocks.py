"""The selective scan on CPUs, forward and backward: states of a block of tokens at a time, which stay in the cache.

A loop over single tokens spends its time in calls, and the states of all tokens are N times as large as the map. A
block consists of chunks of successive tokens, which are scanned side by side:

    1. From states of 0, an operation for each place in the chunks leads to the last state of each chunk.
    2. From chunk to chunk, these and the decay of each chunk as a whole lead to the state before each chunk.
    3. From there, an operation for each place leads to all states.

If channels and their numbers are many, a block is a single chunk. Along columns, a chunk is a column, so no map is
copied. A reversed direction runs through the same chunks from their ends. The backward pass is given the state before
each chunk and computes the others again.

Letters: B images, H, W map, K directions, C channels, N numbers of a channel's state, T tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

# An operation on this many numbers takes twice as long as its call: fewer are computed side by side.
WIDE = 4096
# exp(x) is computed as exp2(x log2(e)), which takes half of the time or less, by torch's own vectorized code.
LOG2_E = 1 / log(2)
# Numbers of the states of a block; they and their decays fit into the cache.
BLOCK = 1 << 18


class Order:
    """The chunks of a direction of a map, counted from the upper left, whichever way it goes."""

    def __init__(self, direction: str, height: int, width: int, numbers: int) -> None:
        self.columns, self.reversed = direction.startswith("columns"), direction.endswith("reversed")
        self.tokens = height if self.columns else _chunk(height * width, numbers)
        self.length = height * width

    @property
    def chunks(self) -> int:
        """The number of chunks; the last one may be shorter."""
        return (self.length + self.tokens - 1) // self.tokens

    def blocks(self, numbers: int) -> list[Block]:
        """All blocks, in the order of the visit, for `numbers` of all images and channels that belong to a token."""
        whole, rest = divmod(self.length, self.tokens)
        count = 1 if numbers >= WIDE else max(1, BLOCK // (numbers * self.tokens))
        found = [Block(first, min(count, whole - first), self.tokens) for first in range(0, whole, count)]
        if rest:
            found.append(Block(whole, 1, rest))
        return found[::-1] if self.reversed else found

    def flat(self, tensor: Tensor) -> Tensor:
        """A map (B, H, W, ...) for `part`; a view, unless the rows of a slice are not evenly spaced."""
        return tensor if self.columns else tensor.flatten(1, 2)

    def part(self, tensor: Tensor, block: Block) -> Tensor:
        """(T, B, chunks, ...), a view of a block of a map that `flat` returned."""
        first, count, tokens = block
        if self.columns:
            return tensor[:, :, first : first + count].movedim(1, 0)
        start = first * self.tokens
        return tensor[:, start : start + count * tokens].unflatten(1, (count, tokens)).movedim(2, 0)

    def visited(self, tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The slices of a tensor along `dim` in the order of the visit."""
        parts = tensor.unbind(dim)
        return parts[::-1] if self.reversed else parts


class Block(NamedTuple):
    """Successive chunks of the same length."""

    first: int
    chunks: int
    tokens: int


def _chunk(tokens: int, numbers: int) -> int:
    """The tokens of a chunk of a direction along rows."""
    size = 16
    while numbers < WIDE and 4 * size * size <= tokens:
        size *= 2
    return size


class _Space:
    """Memory for blocks, used again for each block of the same shape."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.empty = like.new_empty(0, dtype=dtype)
        self.kept: dict[tuple[str, tuple[int, ...]], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor with any contents, which it keeps until the next call with this name."""
        return self.with_tokens(name, *shape)[0]

    def with_tokens(self, name: str, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The tensor, and its slices along the first dimension."""
        if (name, shape) not in self.kept:
            tensor = self.empty.new_empty(shape)
            self.kept[name, shape] = tensor, tensor.unbind(0)
        return self.kept[name, shape]


class _Loaded(NamedTuple):
    """What `_Direction` computes for a block: delta' and delta' x (T, B, chunks, C), the rest (T, B, chunks, N, C)."""

    step: Tensor
    product: Tensor
    decays: Tensor
    states: Tensor
    before: Tensor  # the states before each token, in the same memory
    each_decay: tuple[Tensor, ...]  # in the order of the visit
    each_state: tuple[Tensor, ...]  # the state before the block comes first


class _Direction:
    """The tensors of one direction and some images, and the steps that both passes share."""

    def __init__(
        self,
        order: Order,
        space: _Space,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        bias: Tensor | None,
        softplus: bool,
    ) -> None:
        self.order, self.space = order, space
        self.x, self.delta, self.B, self.C = (order.flat(tensor) for tensor in (x, delta, B, C))
        self.A, self.bias, self.softplus = A, bias, softplus  # A: (N, C)
        self.binary = A * LOG2_E
        self.images = x.shape[0]
        self.blocks = order.blocks(self.images * A.numel())
        # The steps are few beside the states of several numbers, and are computed for all tokens at once.
        self.steps = self._steps(self.delta, self.x) if len(A) > 1 else None

    def load(self, block: Block) -> _Loaded:
        """The factors of a block, and delta' B x in the place of the states."""
        shape = (block.tokens, self.images, block.chunks)
        numbers, channels = self.A.shape
        if self.steps is None:
            step, product = self._steps(self.order.part(self.delta, block), self.order.part(self.x, block))
        else:
            step, product = (self.order.part(tensor, block) for tensor in self.steps)
        decays, each_decay = self.space.with_tokens("decays", *shape, numbers, channels)
        torch.mul(step[..., None, :], self.binary, out=decays).exp2_()
        states, each_state = self.space.with_tokens("states", block.tokens + 1, *shape[1:], numbers, channels)
        if self.order.reversed:
            here, before = states[:-1], states[1:]
            each_decay, each_state = each_decay[::-1], each_state[::-1]
        else:
            here, before = states[1:], states[:-1]
        torch.mul(product[..., None, :], self.order.part(self.B, block)[..., None], out=here)
        return _Loaded(step, product, decays, here, before, each_decay, each_state)

    def _steps(self, delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """delta' and delta' x of some tokens."""
        step, product = (self.space.take(name, *delta.shape) for name in ("step", "product"))
        if self.bias is None:
            step.copy_(delta)
        else:
            torch.add(delta, self.bias, out=step)
        if self.softplus:
            torch.ops.aten.softplus.out(step, out=step)
        return step, torch.mul(step, x, out=product)

    def total_decay(self, step: Tensor) -> Tensor:
        """The decays of whole chunks, (B, chunks, N, C)."""
        return torch.mul(step.sum(0)[..., None, :], self.binary).exp2_()


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    directions: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """The output, and the state before each chunk of all directions, (B, chunks, N, C)."""
    batch, height, width, *_, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    d_state = A.shape[2]
    space = _Space(x, dtype)
    A, D, bias = _parameters(A, D, bias, dtype)
    orders = [Order(name, height, width, d_state * channels) for name in directions]
    kept = x.new_empty(batch, sum(order.chunks for order in orders), d_state, channels, dtype=dtype)
    out = x.new_zeros(batch, height, width, channels, dtype=dtype)  # contiguous, in contrast to D x
    if D is not None and x.ndim == 4:
        torch.mul(D.sum(0), x, out=out)
    elif D is not None:
        out.copy_(torch.einsum("bhwkc,kc->bhwc", x.to(dtype), D))
    for images in _groups(batch, height * width * d_state * channels):
        before = 0
        for k, order in enumerate(orders):
            own = _Direction(
                order,
                space,
                x[images] if x.ndim == 4 else x[images, :, :, k],
                delta[images, :, :, k],
                A[k],
                B[images, :, :, k],
                C[images, :, :, k],
                None if bias is None else bias[k],
                softplus,
            )
            _forward_direction(own, order.flat(out[images]), kept[images, before : before + order.chunks])
            before += order.chunks
    return out.to(x.dtype), kept


def _forward_direction(own: _Direction, out: Tensor, kept: Tensor) -> None:
    """Add the output of a direction to `out`, and write the states before its chunks to `kept`."""
    order = own.order
    state = torch.zeros_like(kept[:, 0])
    for block in own.blocks:
        loaded = own.load(block)
        each_decay, each_state = loaded.each_decay, loaded.each_state[1:]
        before = kept[:, block.first : block.first + block.chunks]
        starts = order.visited(before, 1)
        starts[0].copy_(state)
        if block.chunks > 1:
            ends = each_state[0].clone()
            for decay, added in zip(each_decay[1:], each_state[1:], strict=True):
                torch.addcmul(added, decay, ends, out=ends)
            each_end, factors = (order.visited(tensor, 1) for tensor in (ends, own.total_decay(loaded.step)))
            for i in range(block.chunks - 1):
                torch.addcmul(each_end[i], factors[i], starts[i], out=starts[i + 1])
        last = before
        for decay, current in zip(each_decay, each_state, strict=True):
            last = current.addcmul_(decay, last)
        state.copy_(order.visited(last, 1)[-1])
        weights = order.part(own.C, block)
        target = order.part(out, block)
        if weights.shape[-1] == 1:
            target.addcmul_(weights, loaded.states[..., 0, :])
        else:
            target.add_(_products(weights[..., None, :], loaded.states).squeeze(-2))


def backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    softplus: bool,
    directions: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C, D and bias; the last two are empty if the tensors are None."""
    batch, height, width, *_, channels = x.shape
    dtype = kept.dtype
    d_state = A.shape[2]
    space = _Space(x, dtype)
    types = [None if tensor is None else tensor.dtype for tensor in (A, D, bias)]
    A, D, bias = _parameters(A, D, bias, dtype)
    orders = [Order(name, height, width, d_state * channels) for name in directions]
    shared = x.ndim == 4
    gradient = grad.to(dtype).contiguous()
    if D is None:
        x_grad = x.new_zeros(x.shape, dtype=dtype)
        D_grad = x.new_empty(0)
    else:
        x_grad = gradient * D.sum(0) if shared else gradient[:, :, :, None] * D
        D_grad = torch.einsum("bhwc,bhwc->c" if shared else "bhwc,bhwkc->kc", gradient, x.to(dtype))
        D_grad = D_grad.expand(D.shape).to(types[1]).contiguous()
    delta_grad, B_grad, C_grad = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (delta, B, C))
    A_grad = torch.zeros_like(A)
    bias_grad = x.new_zeros(0 if bias is None else len(orders), channels, dtype=dtype)
    for images in _groups(batch, height * width * d_state * channels):
        before = 0
        for k, order in enumerate(orders):
            own = _Direction(
                order,
                space,
                x[images] if shared else x[images, :, :, k],
                delta[images, :, :, k],
                A[k],
                B[images, :, :, k],
                C[images, :, :, k],
                None if bias is None else bias[k],
                softplus,
            )
            _backward_direction(
                own,
                kept[images, before : before + order.chunks],
                order.flat(gradient[images]),
                order.flat(x_grad[images] if shared else x_grad[images, :, :, k]),
                order.flat(delta_grad[images, :, :, k]),
                A_grad[k],
                order.flat(B_grad[images, :, :, k]),
                order.flat(C_grad[images, :, :, k]),
                None if bias is None else bias_grad[k],
            )
            before += order.chunks
    A_grad = A_grad.transpose(1, 2).contiguous().to(types[0])
    bias_grad = x.new_empty(0) if bias is None else bias_grad.to(types[2])
    return x_grad.to(x.dtype), delta_grad, A_grad, B_grad, C_grad, D_grad, bias_grad


def _backward_direction(
    own: _Direction,
    kept: Tensor,
    grad: Tensor,
    x_grad: Tensor,
    delta_grad: Tensor,
    A_grad: Tensor,
    B_grad: Tensor,
    C_grad: Tensor,
    bias_grad: Tensor | None,
) -> None:
    """Write the gradients of a direction, or add them to those of x, A and the bias.

    With the gradient g_t of a state: g_t = C_t dout_t + exp(delta'_(t+1) A) g_(t+1), from the last token to the first.
    """
    order = own.order
    arriving = torch.zeros_like(kept[:, 0])  # the gradient of the state after the block
    for block in own.blocks[::-1]:
        step, product, decays, here, before, each_decay, each_state = own.load(block)
        last = each_state[0].copy_(kept[:, block.first : block.first + block.chunks])
        for decay, current in zip(each_decay, each_state[1:], strict=True):
            last = current.addcmul_(decay, last)

        out_grad, weights = order.part(grad, block), order.part(own.C, block)
        grads, each_grad = own.space.with_tokens("grads", *decays.shape)
        torch.mul(out_grad[..., None, :], weights[..., None], out=grads)
        each_grad = each_grad if order.reversed else each_grad[::-1]
        each_decay = each_decay[::-1]
        ends = own.space.take("ends", *arriving.shape[:1], block.chunks, *arriving.shape[1:])
        each_end = order.visited(ends, 1)[::-1]
        each_end[0].copy_(arriving)
        if block.chunks > 1:
            first = each_grad[0].clone()
            for decay, added in zip(each_decay[:-1], each_grad[1:], strict=True):
                torch.addcmul(added, decay, first, out=first)
            first.mul_(each_decay[-1])
            firsts, factors = (order.visited(t, 1)[::-1] for t in (first, own.total_decay(step)))
            for i in range(block.chunks - 1):
                torch.addcmul(firsts[i], factors[i], each_end[i], out=each_end[i + 1])
        later = each_grad[0].add_(ends)
        for decay, current in zip(each_decay[:-1], each_grad[1:], strict=True):
            later = current.addcmul_(decay, later)
        torch.mul(order.visited(each_decay[-1], 1)[0], order.visited(later, 1)[0], out=arriving)

        single = weights.shape[-1] == 1
        of_C, of_B = order.part(C_grad, block), order.part(B_grad, block)
        if single:
            of_C.copy_((here[..., 0, :] * out_grad).sum(-1, keepdim=True))
            of_B.copy_((grads[..., 0, :] * product).sum(-1, keepdim=True))
            of_product = torch.mul(grads[..., 0, :], order.part(own.B, block), out=product)
        else:
            of_C.copy_(_products(here, out_grad[..., None]).squeeze(-1))
            of_B.copy_(_products(grads, product[..., None]).squeeze(-1))
            of_product = _products(order.part(own.B, block)[..., None, :], grads).squeeze(-2)
        of_exponent = decays.mul_(before).mul_(grads)
        A_grad.add_(torch.mul(of_exponent, step[..., None, :], out=grads).sum((0, 1, 2)))
        of_exponent.mul_(own.A)
        of_step = of_exponent[..., 0, :] if single else of_exponent.sum(-2)
        of_step.addcmul_(of_product, order.part(own.x, block))
        order.part(x_grad, block).addcmul_(of_product, step)
        if own.softplus:
            of_step.mul_(step.neg_().expm1_().neg_())
        if bias_grad is not None:
            bias_grad.add_(of_step.sum((0, 1, 2)))
        order.part(delta_grad, block).copy_(of_step)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of matrices (T, B, chunks, ., .), by one call, in the dtype of the states, one of the two."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return torch.bmm(left.flatten(0, 2).to(dtype), right.flatten(0, 2).to(dtype)).unflatten(0, left.shape[:3])


def _parameters(
    A: Tensor, D: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A as (K, N, C), and all in `dtype`."""
    A = A.to(dtype).transpose(1, 2).contiguous()
    return A, None if D is None else D.to(dtype), None if bias is None else bias.to(dtype)


def _groups(batch: int, numbers: int) -> list[slice]:
    """Images that are computed together, given the numbers of the states of one."""
    count = max(1, BLOCK // numbers)
    return [slice(first, min(first + count, batch)) for first in range(0, batch, count)]
