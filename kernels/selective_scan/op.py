"""Selective scan: specification, checks and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.selective_scan import common, reference, torch_impl

Direction = Literal["rows", "columns", "rows_reversed", "columns_reversed"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    directions: Sequence[Direction] = ("rows",),
) -> Tensor:
    """The recurrence of a selective state-space model (Mamba) over the tokens of a map, along one or more directions.

    Each channel of a direction k has a state h of N numbers, 0 at first. It visits the tokens t in the order of the
    direction; `delta`, `B` and `C` depend on the token and on the direction, the decay exp(delta A) also on the number:

        delta'_t = delta_t + delta_bias, or softplus of it (x for x > 20) with `delta_softplus`
        h_t = exp(delta'_t A) h_(t-1) + delta'_t B_t x_t
        out_t = sum_k (C_t . h_t + D x_t)

    Args:
        x: (B, H, W, C), or (B, H, W, K, C) if each of the K directions has an input of its own. Tokens that are not a
            map are one of a single row, (B, 1, T, C).
        delta: (B, H, W, K, C). It has the dtype of `x`; float32 is allowed with half precision.
        A: (K, C, N), not positive, so that no state grows if delta' is not negative. Its dtype as for `delta`.
        B: (B, H, W, K, N).
        C: (B, H, W, K, N).
        D: (K, C), or None. Its dtype as for `delta`.
        delta_bias: (K, C), or None. Its dtype as for `delta`.
        delta_softplus: Whether delta' is a softplus.
        directions: K orders: "rows" visits the first row from left to right, then the second; "columns" the first
            column from top to bottom, then the second; "rows_reversed" and "columns_reversed" are the opposite orders.

    Returns:
        (B, H, W, C), the sum over the directions, in the dtype of `x`. States and sums are float32 for half precision.
        Under autocast, `x`, `B` and `C` are converted to its dtype.

    Raises:
        TypeError: an integer tensor, dtypes that differ, or an option of the wrong type.
        ValueError: a shape or an option other than those above, or devices that differ.

    Source: Mamba, arXiv 2312.00752, sections 3.2 and 3.3; the four directions: VMamba, arXiv 2401.10166, section 4.2.
    """
    checks.tensors({"x": x, "delta": delta, "A": A, "B": B, "C": C}, D=D, delta_bias=delta_bias)
    x, B, C = dispatch.autocast(x, B, C)
    checks.floating(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    orders = _directions(directions)
    count = len(orders)
    if x.ndim == 5:
        checks.shape(x, "x", (None, None, None, count, None), "(B, H, W, directions, C)")
    else:
        checks.shape(x, "x", (None,) * 4, "(B, H, W, C)")
    batch, height, width, *_, channels = checks.sizes(x)
    checks.map_size(height, width, "x")
    checks.count(channels, "channels")
    checks.shape(delta, "delta", (batch, height, width, count, channels), "(B, H, W, directions, C)")
    checks.shape(A, "A", (count, channels, None), "(directions, C, N)")
    d_state = checks.sizes(A)[2]
    checks.count(d_state, "d_state")
    for name, tensor in (("B", B), ("C", C)):
        checks.shape(tensor, name, (batch, height, width, count, d_state), "(B, H, W, directions, N)")
    for name, parameter in (("D", D), ("delta_bias", delta_bias)):
        if parameter is not None:
            checks.shape(parameter, name, (count, channels), "(directions, C)")
    if not isinstance(delta_softplus, bool):
        raise TypeError(f"Got {delta_softplus=}; give True or False.")
    implementation = dispatch.choose("selective_scan", x, 1)
    with dispatch.as_given(x):
        if implementation == "triton":
            return forward(x, delta, A, B, C, D, delta_bias, delta_softplus, common.numbers(orders))[0]
        compute = reference if implementation == "reference" else torch_impl
        return compute.selective_scan(
            x, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, directions=orders
        )


def _directions(directions: Sequence[str]) -> tuple[str, ...]:
    """`directions` as a tuple.

    Raises:
        TypeError: they are not a list or tuple.
        ValueError: there is none, or one is unknown.
    """
    if not isinstance(directions, tuple | list):
        raise TypeError(f"Got {directions=}; give a tuple of them.")
    known = get_args(Direction)
    if not directions or not all(isinstance(name, str) and name in known for name in directions):
        raise ValueError(f"Got {directions=}; give one or more of {', '.join(known)}.")
    return tuple(directions)


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::selective_scan")
def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, C), and for `backward` the states before each tile of tokens, (B, K, tiles, N, C)."""
    from zoo.kernels.selective_scan import triton_impl

    return triton_impl.forward(x, delta, A, B, C, D, delta_bias, softplus=delta_softplus, directions=directions)


@dispatch.triton_op("zoo::selective_scan_bwd")
def backward(
    grad: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    directions: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven tensors; those of D and delta_bias are empty if the tensors are None."""
    from zoo.kernels.selective_scan import triton_impl

    return triton_impl.backward(
        grad, x, delta, A, B, C, D, delta_bias, states, softplus=delta_softplus, directions=directions
    )


dispatch.register_autograd(forward, torch_impl.differentiated(backward), setup_context=torch_impl.save)
