"""Flow attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.flow_attention import reference, torch_impl


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, eps: float = 1e-6) -> Tensor:
    """Multi-head attention of all tokens to all tokens of a map, as a flow, at a cost that is linear in their number.

    Values flow from the keys, the sources, to the queries, the sinks. The flow out of each source is held at 1, so the
    sources compete for the sinks: a softmax over the tokens weights them by what they then send. The flow into each
    sink is held at 1, too, and a sigmoid of what it then receives is its share of the values. For each image and head,
    with T = H W tokens, f_i = sigmoid(q_i), g_j = sigmoid(k_j), and <a, b> = sum_c (a_c + eps) (b_c + eps) + eps:

        in_i  = <f_i, sum_j g_j>           received_i = <f_i, sum_j g_j / out_j>
        out_j = <g_j, sum_i f_i>           sent_j     = <g_j, sum_i f_i / in_i>
        w_j   = T softmax_j(sent_j, clipped to [-1, 1])
        result_i = sigmoid(received_i) / in_i * f_i (sum_j g_j^T w_j v_j)

    Args:
        q: (B, H, W, N * D). Tokens that are not a map are one of a single row, (B, 1, T, N * D).
        k: As `q`.
        v: As `q`.
        num_heads: N.
        eps: Added to both factors of a flow, and to their sum.

    Returns:
        (B, H, W, N * D), in the dtype of `q`. Flows and sums are float32 for half precision; on GPUs, the factors of
        products are rounded. Under autocast, `q`, `k` and `v` are converted to its dtype.

    Raises:
        TypeError: an integer tensor, dtypes that differ, or an option of the wrong type.
        ValueError: a shape or an option other than those above, or devices that differ.

    Source: Flowformer, arXiv 2202.06258, section 3; the clip, `eps` and the factor T are those of the authors' code.
    """
    checks.tensors({"q": q, "k": k, "v": v})
    q, k, v = dispatch.autocast(q, k, v)
    checks.floating(q=q, k=k, v=v)
    checks.shape(q, "q", (None,) * 4, "(B, H, W, channels)")
    _, height, width, channels = checks.sizes(q)
    head_dim = checks.split_heads(channels, 1, num_heads, "q")
    checks.map_size(height, width, "q")
    checks.shape(k, "k", checks.sizes(q), "the shape of q")
    checks.shape(v, "v", checks.sizes(q), "the shape of q")
    eps = checks.not_negative(eps, "eps")
    implementation = dispatch.choose("flow_attention", q, head_dim)
    with dispatch.as_given(q):
        if implementation == "triton":
            return forward(q, k, v, num_heads=num_heads, eps=eps)[0]
        compute = reference if implementation == "reference" else torch_impl
        return compute.flow_attention(q, k, v, num_heads=num_heads, eps=eps)


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::flow_attn")
def forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, H, W, N D), and float32 sums over the tokens of each image and head for `backward`.

    These are of sinks and sources, (B, N, 2, D), of both divided by their flows, (B, N, 2, D), and of the products of
    keys and values, with a row for the sum of their weights, (B, N, D + 1, D).
    """
    from zoo.kernels.flow_attention import triton_impl

    return triton_impl.forward(q, k, v, num_heads=num_heads, eps=eps)


@dispatch.triton_op("zoo::flow_attn_bwd")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    flows: Tensor,
    state: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from zoo.kernels.flow_attention import triton_impl

    return triton_impl.backward(grad, q, k, v, sums, flows, state, num_heads=num_heads, eps=eps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.num_heads, ctx.eps = inputs[3:]


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *sums = ctx.saved_tensors
    options = {"num_heads": ctx.num_heads, "eps": ctx.eps}
    if dispatch.again_differentiable(q, k, v, grad):
        grads = dispatch.composite_gradients(
            lambda *tensors: torch_impl.flow_attention(*tensors, **options), (q, k, v), grad
        )
    else:
        grads = backward(grad, q, k, v, *sums, **options)
    return *grads, None, None


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
