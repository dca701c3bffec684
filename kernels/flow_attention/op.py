"""Flow attention: specification, checks and choice of the implementation."""

from __future__ import annotations

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
        (B, H, W, N * D), in the dtype of `q`. Flows and sums are float32 for half precision. Under autocast, `q`, `k`
        and `v` are converted to its dtype.

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
    checks.split_heads(channels, 1, num_heads, "q")
    checks.map_size(height, width, "q")
    checks.shape(k, "k", checks.sizes(q), "the shape of q")
    checks.shape(v, "v", checks.sizes(q), "the shape of q")
    eps = checks.not_negative(eps, "eps")
    # There is no Triton form yet, so "triton" runs PyTorch.
    compute = reference if dispatch.current() == "reference" else torch_impl
    with dispatch.as_given(q):
        return compute.flow_attention(q, k, v, num_heads=num_heads, eps=eps)
