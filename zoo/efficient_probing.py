"""Efficient probing (EP): pooling by learned queries, then a linear classifier, on the features of any backbone.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", ICLR 2026, arXiv 2506.10178; the
official code is https://github.com/billpsomas/efficient-probing (Apache-2.0). The names of the tensors are those of its
checkpoints, where they begin with "head.".

Here the queries pool the tokens before the projection to values. The result is the same, since both are linear, and the
projection is computed for one vector per query instead of for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo.cpu import is_plain
from zoo.messages import one_line

__all__ = ["EfficientPooling", "EfficientProbing", "attach", "default_queries", "probing_head", "queries_of"]

_QUERIES = 32  # the paper's default


class EfficientPooling(nn.Module):
    """Features to one vector (B, dim / d_out): each of M queries pools a slice of the values with its own attention.

    The attention of query m is softmax_j(dim^-1/2 query_m . x_j): the tokens themselves are the keys. Slice m of the
    values x W^T, which has dim / (d_out M) channels, is averaged with it. The M slices are concatenated.

    Args:
        dim: Channels of the features.
        num_queries: M, the number of queries; it has to divide dim / d_out. If None, the largest such number up to 32.
        d_out: Reduction of the width by the values; it has to divide dim.
        channels_last: Whether maps are (B, H, W, dim).
        prefix_tokens: How many tokens at the beginning of a sequence are left out, such as the class token.

    Raises:
        ValueError: A number does not divide another as described.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int | None = None,
        d_out: int = 1,
        channels_last: bool = False,
        prefix_tokens: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if d_out < 1 or dim % d_out:
            raise ValueError(f"Got d_out={d_out} for {dim} channels; it has to divide them.")
        width = dim // d_out
        if num_queries is None:
            num_queries = default_queries(width)
        if num_queries < 1 or width % num_queries:
            raise ValueError(f"Got {num_queries} queries for {width} channels; the number has to divide the channels.")
        self.channels_last, self.prefix_tokens = channels_last, prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, num_queries, dim, device=device, dtype=dtype))
        self.v = nn.Linear(dim, width, bias=False, device=device, dtype=dtype)
        self.init_weights()

    @property
    def num_queries(self) -> int:
        """The number of queries."""
        return self.cls_token.shape[1]

    def init_weights(self) -> None:
        """Draw the queries from a normal distribution, and the values as PyTorch does by default."""
        nn.init.normal_(self.cls_token, std=0.02)
        self.v.reset_parameters()

    def tokens(self, x: Tensor) -> Tensor:
        """Maps (B, dim, H, W), or (B, H, W, dim) if `channels_last`, or tokens (B, N, dim), as tokens (B, N, dim).

        Raises:
            ValueError: `x` has another shape.
        """
        if x.ndim == 4:
            x = x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
        elif x.ndim == 3:
            x = x[:, self.prefix_tokens :]
        dim = self.cls_token.shape[2]
        if x.ndim != 3 or x.shape[2] != dim:
            raise ValueError(
                f"Got features of shape {tuple(x.shape)}; efficient probing pools maps or tokens of {dim} channels."
            )
        return x

    def attention(self, x: Tensor) -> Tensor:
        """The attention (B, M, N) of each query over the tokens of `x`, which has a shape that `tokens` takes."""
        return self._attention(self.tokens(x))

    def _attention(self, tokens: Tensor) -> Tensor:
        scale = self.cls_token.shape[2] ** -0.5
        return (scale * self.cls_token @ tokens.transpose(1, 2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool features of a shape that `tokens` takes to (B, dim / d_out)."""
        tokens = self.tokens(x)
        attention = self._attention(tokens)
        if is_plain(self.v, nn.Linear):
            weight = self.v.weight.unflatten(0, (self.num_queries, -1))  # M, channels of a slice, dim
            return torch.einsum("bmc,mkc->bmk", attention @ tokens, weight).flatten(1)
        values = self.v(tokens).unflatten(2, (self.num_queries, -1))  # B, N, M, channels of a slice
        return torch.einsum("bmn,bnmk->bmk", attention, values).flatten(1)


class EfficientProbing(nn.Sequential):
    """The head of efficient probing: `EfficientPooling`, a batch norm without parameters, a linear classifier.

    It maps features, (B, dim, H, W) or (B, N, dim), to logits (B, num_classes); without classes, to (B, dim / d_out).

    Args:
        dim: Channels of the features.
        num_classes: Number of classes; 0 for no classifier.
        num_queries: See `EfficientPooling`, like the other arguments.
        **kwargs: Further arguments of `EfficientPooling`.

    Raises:
        ValueError: A number does not divide another; see `EfficientPooling`.
    """

    def __init__(self, dim: int, num_classes: int, num_queries: int | None = None, **kwargs: Any):
        pool = EfficientPooling(dim, num_queries, **kwargs)
        width = pool.v.out_features
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        norm = nn.BatchNorm1d(width, eps=1e-6, affine=False, **dd)
        super().__init__(pool, norm, _classifier(width, num_classes, **dd))

    @property
    def pool(self) -> EfficientPooling:
        """The pooling."""
        pool: Any = self[0]
        return pool

    def init_weights(self) -> None:
        """Initialise all parameters as the official code does."""
        self.pool.init_weights()
        if isinstance(self[2], nn.Linear):
            self[2].reset_parameters()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier with a new one, or with an identity if `num_classes` is 0; the pooling stays."""
        weight = self.pool.v.weight
        self[2] = _classifier(len(weight), num_classes, device=weight.device, dtype=weight.dtype)

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Features to what the classifier reads: (B, dim / d_out)."""
        return self[1](self[0](x))


def _classifier(width: int, num_classes: int, **dd: Any) -> nn.Module:
    return nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()


def default_queries(width: int) -> int:
    """The largest number of queries up to 32 that divides the channels of the values."""
    return max(count for count in range(1, min(_QUERIES, width) + 1) if width % count == 0)


def queries_of(global_pool: str) -> int | None:
    """The number of queries that "ep8" asks for; None for "ep"."""
    return int(global_pool.removeprefix("ep") or 0) or None


def probing_head(model: nn.Module) -> EfficientProbing | None:
    """The head of efficient probing that `model` has, or None."""
    return next((module for module in model.modules() if isinstance(module, EfficientProbing)), None)


@torch.no_grad()
def attach(
    model: nn.Module,
    num_classes: int,
    num_queries: int | None = None,
    img_size: int | Sequence[int] | None = None,
) -> nn.Module:
    """Give a model of timm a head of efficient probing in place of its pooling and its classifier, and return it.

    The head takes the place of the classifier, so the names of all other tensors stay. It pools the patches: the class
    token and other prefix tokens are left out. Models of the zoo do this themselves, with the argument
    `global_pool="ep"`.

    Args:
        model: The model. It is run once, on an image of its size, to see what its features are.
        num_classes: Number of classes.
        num_queries: See `EfficientPooling`.
        img_size: Side of the image, or height and width; that of the model's configuration if None.

    Raises:
        ValueError: The model does not return its features before pooling, or its classifier can't be replaced.
    """
    name, place = type(model).__name__, getattr(model, "pretrained_cfg", {}).get("classifier")
    training, weight = model.training, next(model.parameters())
    channels, *size = resolve_model_data_config(model)["input_size"]
    images = weight.new_zeros(1, channels, *(size if img_size is None else to_2tuple(img_size)))
    try:
        if not isinstance(place, str):
            raise ValueError(f"it has the classifiers {place}")
        model.reset_classifier(0, "")  # type: ignore[operator]
        features = model.eval()(images)
        if features.ndim not in (3, 4):
            raise ValueError(f"without pooling, it returns features of shape {tuple(features.shape)}")
        channels_last = getattr(model, "output_fmt", "") == "NHWC"
        dim = features.shape[1 if features.ndim == 4 and not channels_last else -1]
        prefix = getattr(model, "num_prefix_tokens", 0) if features.ndim == 3 else 0
        head = EfficientProbing(
            dim,
            num_classes,
            num_queries,
            channels_last=channels_last,
            prefix_tokens=prefix,
            device=weight.device,
            dtype=weight.dtype,
        )
        model.set_submodule(place, head)
        model.num_classes = num_classes  # type: ignore[assignment]
        if model.eval()(images).shape != (1, num_classes or head.pool.v.out_features):
            raise ValueError("its classifier does not receive its features")
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} can't be pooled by efficient probing: {one_line(error, 300)}.") from error
    finally:
        model.train(training)
    return model
