"""Linear attention: specification, checks and choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.linear_attention import reference, torch_impl
from zoo.kernels.rotation import frequencies


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    feature_map: Literal["elu_plus_one", "relu"] = "elu_plus_one",
    key_weights: Literal["uniform", "softmax"] = "uniform",
    normalization: Literal["ratio", "offset"] = "ratio",
    rope: Sequence[float] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    denominator_min: float = 0.0,
    temperature: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of all tokens to all tokens of a map, at a cost that is linear in their number.

    The keys and values of an image and head are summed up in one matrix, which all queries multiply. With T = H W
    tokens, a feature map f, means over the tokens j, and the rotation R_i of token i by `rope`:

        w_j = 1, or T softmax_j(scale * mean_i(f(q_i)) . f(k_j)) with softmax key weights
        z_i = f(q_i) . mean_j(w_j f(k_j))
        y_i = (R_i f(q_i)) mean_j(w_j (R_j f(k_j))^T v_j)

        ratio:   out_i = y_i / (z_i + eps)
        offset:  out_i = scale * ((1 + 1 / (scale * z_i + eps)) y_i - z_i mean_j(w_j v_j))

    Without rotation, out_i is a sum of the values whose weights have the sum 1 (apart from eps): all are positive in
    the form "ratio"; in the form "offset", they may be negative.

    Args:
        q: (B, H, W, N * D). Tokens that are not a map are one of a single row, (B, 1, T, N * D).
        k: As `q`.
        v: As `q`.
        num_heads: N.
        feature_map: f, for each element: "elu_plus_one", x + 1 above 0 and exp(x) below, or "relu".
        key_weights: Whether all keys count alike, or more the nearer they are to the mean query (RALA).
        normalization: The form of the output: "ratio" (RALA, L2ViT) or "offset" (MALA).
        rope: D / 4 frequencies of a rotary position encoding, in radians per token, as for `rotate_2d`. It is
            applied after f, and not in z.
        scale: Factor of the softmax and of the form "offset"; D ** -0.5 if None.
        eps: Added to the mean z_i in denominators.
        denominator_min: Lower bound of the denominators, as of a sum over the tokens: z_i + eps, or
            scale * z_i + eps, is at least denominator_min / T. 0 is none. If `eps` is 0 too, a token whose z_i is 0
            gives NaN.
        temperature: (N,), a factor of each head's output. It has the dtype of `q`; float32 is allowed with half
            precision.

    Returns:
        (B, H, W, N * D), in the dtype of `q`. Features, sums and denominators are float32 for half precision; on GPUs,
        the factors of products are rounded. Under autocast, `q`, `k` and `v` are converted to its dtype.

    Raises:
        TypeError: an integer tensor, dtypes that differ, or an option of the wrong type.
        ValueError: a shape or an option other than those above, or devices that differ.

    Source: Transformers are RNNs, arXiv 2006.16236, section 3.2; RALA, arXiv 2411.07635, section 3; MALA,
    arXiv 2507.00698, section 3; L2ViT, arXiv 2501.16182, section 3.
    """
    checks.tensors({"q": q, "k": k, "v": v}, temperature=temperature)
    q, k, v = dispatch.autocast(q, k, v)
    checks.floating(q=q, k=k, v=v, temperature=temperature)
    checks.shape(q, "q", (None,) * 4, "(B, H, W, channels)")
    _, height, width, channels = checks.sizes(q)
    head_dim = checks.split_heads(channels, 1, num_heads, "q")
    checks.map_size(height, width, "q")
    checks.shape(k, "k", checks.sizes(q), "the shape of q")
    checks.shape(v, "v", checks.sizes(q), "the shape of q")
    if feature_map not in ("elu_plus_one", "relu"):
        raise ValueError(f"Got {feature_map=}; it has to be 'elu_plus_one' or 'relu'.")
    if key_weights not in ("uniform", "softmax"):
        raise ValueError(f"Got {key_weights=}; it has to be 'uniform' or 'softmax'.")
    if normalization not in ("ratio", "offset"):
        raise ValueError(f"Got {normalization=}; it has to be 'ratio' or 'offset'.")
    rope = None if rope is None else frequencies(rope, head_dim)
    scale = checks.attention_scale(scale, head_dim)
    eps = checks.not_negative(eps, "eps")
    denominator_min = checks.not_negative(denominator_min, "denominator_min")
    if temperature is not None:
        checks.shape(temperature, "temperature", (num_heads,), "(N,)")
    implementation = dispatch.choose("linear_attention", q, head_dim)
    with dispatch.as_given(q):
        if implementation == "triton":
            return forward(
                q,
                k,
                v,
                temperature,
                num_heads=num_heads,
                relu=feature_map == "relu",
                softmax=key_weights == "softmax",
                offset=normalization == "offset",
                rope=None if rope is None else list(rope),
                scale=scale,
                eps=eps,
                denominator_min=denominator_min,
            )[0]
        compute = reference if implementation == "reference" else torch_impl
        return compute.linear_attention(
            q,
            k,
            v,
            num_heads=num_heads,
            feature_map=feature_map,
            key_weights=key_weights,
            normalization=normalization,
            rope=rope,
            scale=scale,
            eps=eps,
            denominator_min=denominator_min,
            temperature=temperature,
        )


# The rest registers the Triton implementation with torch. Without Triton, nothing is registered.
@dispatch.triton_op("zoo::linear_attn")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None,
    num_heads: int,
    relu: bool,
    softmax: bool,
    offset: bool,
    rope: list[float] | None,
    scale: float,
    eps: float,
    denominator_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, H, W, N D), and float32 sums for `backward`.

    These are the state of each image and head, (B, N, D + 1 or D + 2, D), and, with softmax weights, the sums of the
    queries of each part of the tokens, (B, N, parts, D), and log2 of the sum of exponentials, (B, N); else empty.
    """
    from zoo.kernels.linear_attention import triton_impl

    return triton_impl.forward(
        q,
        k,
        v,
        temperature,
        num_heads=num_heads,
        relu=relu,
        softmax=softmax,
        offset=offset,
        rope=rope,
        scale=scale,
        eps=eps,
        denominator_min=denominator_min,
    )


@dispatch.triton_op("zoo::linear_attn_bwd")
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None,
    state: Tensor,
    queries: Tensor,
    lse: Tensor,
    num_heads: int,
    relu: bool,
    softmax: bool,
    offset: bool,
    rope: list[float] | None,
    scale: float,
    eps: float,
    denominator_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and temperature; the last is empty if the tensor is None."""
    from zoo.kernels.linear_attention import triton_impl

    return triton_impl.backward(
        grad,
        q,
        k,
        v,
        temperature,
        state,
        queries,
        lse,
        num_heads=num_heads,
        relu=relu,
        softmax=softmax,
        offset=offset,
        rope=rope,
        scale=scale,
        eps=eps,
        denominator_min=denominator_min,
    )


_OPTIONS = ("num_heads", "relu", "softmax", "offset", "rope", "scale", "eps", "denominator_min")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = dict(zip(_OPTIONS, inputs[4:], strict=True))


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, temperature, *sums = ctx.saved_tensors
    options = ctx.options
    if dispatch.again_differentiable(q, k, v, temperature, grad):

        def composite(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None) -> Tensor:
            return torch_impl.linear_attention(
                q,
                k,
                v,
                num_heads=options["num_heads"],
                feature_map="relu" if options["relu"] else "elu_plus_one",
                key_weights="softmax" if options["softmax"] else "uniform",
                normalization="offset" if options["offset"] else "ratio",
                rope=None if options["rope"] is None else tuple(options["rope"]),
                scale=options["scale"],
                eps=options["eps"],
                denominator_min=options["denominator_min"],
                temperature=temperature,
            )

        grads = dispatch.composite_gradients(composite, (q, k, v, temperature), grad)
    else:
        *grads, temperature_grad = backward(grad, q, k, v, temperature, *sums, **options)
        grads = (*grads, None if temperature is None else temperature_grad)
    return *grads, *(None,) * len(options)


dispatch.register_autograd(forward, _differentiate, setup_context=_save)
