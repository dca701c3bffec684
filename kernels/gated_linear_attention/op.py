"""Gated linear attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.gated_linear_attention import reference, torch_impl


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gates: Tensor,
    reverse_log_gates: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Linear attention to all earlier tokens of a sequence, whose keys fade by the gates of the tokens in between.

    The state S (d_k, d_v) of an image and head starts at 0. The tokens are visited in order; token t makes

        S_t = diag(exp(log_gates_t)) S_{t-1} + k_t^T v_t
        out_t = scale * q_t S_t

    so a token attends to itself, undecayed. With `reverse_log_gates`, the output is the sum of this and of the same
    recurrence from the last token to the first, with those gates; each token attends to itself twice.

    Args:
        q: (B, T, N, d_k), T tokens and N heads. A map is the sequence of its rows.
        k: As `q`.
        v: (B, T, N, d_v).
        log_gates: As `q`: the logarithms of the gates, at most 0; -inf forgets all earlier tokens. They have the dtype
            of `q`; float32 is allowed with half precision, and autocast leaves them as they are.
        reverse_log_gates: As `log_gates`, or None for the first direction alone.
        scale: Factor of the output; d_k ** -0.5 if None.

    Returns:
        (B, T, N, d_v), in the dtype of `v`. Gates, states and sums are float32 for half precision. Under autocast, `q`,
        `k` and `v` are converted to its dtype.

    Raises:
        TypeError: an integer tensor, dtypes that differ, or a scale that is not a number.
        ValueError: a shape other than those above, a scale that is not finite, or devices that differ.

    Source: Gated Linear Attention Transformers, arXiv 2312.06635, section 4; both directions in one call: ViG,
    arXiv 2405.18425, section 3.
    """
    checks.tensors({"q": q, "k": k, "v": v, "log_gates": log_gates}, reverse_log_gates=reverse_log_gates)
    q, k, v = dispatch.autocast(q, k, v)
    checks.floating(q=q, k=k, v=v, log_gates=log_gates, reverse_log_gates=reverse_log_gates)
    checks.shape(q, "q", (None,) * 4, "(B, T, N, d_k)")
    batch, tokens, num_heads, key_dim = checks.sizes(q)
    for size, name in ((tokens, "tokens"), (num_heads, "heads"), (key_dim, "channels of a head")):
        if checks.certain(size == 0):
            raise ValueError(f"Got q with 0 {name}; it has to have 1 or more.")
    checks.shape(k, "k", checks.sizes(q), "the shape of q")
    checks.shape(v, "v", (batch, tokens, num_heads, None), "(B, T, N, d_v)")
    if checks.certain(checks.sizes(v)[3] == 0):
        raise ValueError("Got v with 0 channels of a head; it has to have 1 or more.")
    checks.shape(log_gates, "log_gates", checks.sizes(q), "the shape of q")
    if reverse_log_gates is not None:
        checks.shape(reverse_log_gates, "reverse_log_gates", checks.sizes(q), "the shape of q")
    scale = checks.attention_scale(scale, key_dim)
    # Triton's tiles limit both; the message names the keys' if these are too many.
    head_dim = key_dim if key_dim > 128 else checks.sizes(v)[3]
    implementation = dispatch.choose("gated_linear_attention", q, head_dim)
    with dispatch.as_given(q):
        if implementation == "triton":
            return forward(q, k, v, log_gates, reverse_log_gates, scale)
        compute = reference if implementation == "reference" else torch_impl
        return compute.gated_linear_attention(q, k, v, log_gates, reverse_log_gates, scale=scale)


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::gated_linear_attn")
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, scale: float
) -> Tensor:
    """The output (B, T, N, d_v)."""
    from zoo.kernels.gated_linear_attention import triton_impl

    return triton_impl.forward(q, k, v, log_gates, reverse_log_gates, scale=scale)


@dispatch.triton_op("zoo::gated_linear_attn_bwd")
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_gates: Tensor, reverse_log_gates: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_gates and reverse_log_gates; the last is empty if the tensor is None."""
    from zoo.kernels.gated_linear_attention import triton_impl

    return triton_impl.backward(grad, q, k, v, log_gates, reverse_log_gates, scale=scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if dispatch.again_differentiable(*tensors, grad):
        composite = partial(torch_impl.gated_linear_attention, scale=ctx.scale)
        return *dispatch.composite_gradients(composite, tensors, grad), None
    *grads, reverse_grad = backward(grad, *tensors, ctx.scale)
    return *grads, None if tensors[4] is None else reverse_grad, None


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
