"""PPMA: polyline path masked attention (Zhao et al., NeurIPS 2025, https://arxiv.org/abs/2506.15940).

The network of RMT with another attention: each token has a decay along its row and one along its column, both computed
from the token. The logits of two tokens are lowered by the decays on the paths between them, which first follow a row
and then a column, or first a column and then a row. There are two forms:

- full: all tokens attend to all tokens. The weights are the mean of two softmaxes, one for each path;
- by lines: all tokens attend to those of their row, then to those of their column, and vice versa. The output is the
  mean of both orders. The cost is that of the lines.

Official code, Apache-2.0: https://github.com/zhongchenzhao/PPMA. Written from the paper and facts about that code; the
tests compare outputs of ppma_t. Differences:
- The downsampling at the end of an official stage begins the next one here, so that a stage's output is its feature.
- The mask of all pairs of tokens is never made; few rows of queries are computed at a time. See `path_attention`.
- The angles of the rotation are computed in float64, and those in official checkpoints are ignored.
- Tokens are channels-last, and query, key and value have one linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attention
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import by_image, linear
from zoo.kernels import as_given, dispatch, sizes, window_attention
from zoo.kernels.rotation import turned
from zoo.layers import DepthwiseConv, HeadConv, ResidualConvMlp, stage_rates
from zoo.rmt import Block, Downsample, Stem

__all__ = ["PPMA"]

# The variants of the official code.
VARIANTS: dict[str, dict[str, Any]] = {
    "ppma_t": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 8, 2),
        "num_heads": (4, 4, 8, 16),
        "mlp_ratios": (3, 3, 3, 3),
        "by_lines": (True, True, False, False),
    },
    "ppma_s": {
        "embed_dims": (64, 128, 256, 512),
        "depths": (3, 4, 18, 4),
        "num_heads": (4, 4, 8, 16),
    },
    "ppma_b": {
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "layer_scales": (False, False, True, True),
    },
    # our own, for tests and small images on a CPU
    "test_ppma": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 3, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "by_lines": (True, True, False, False),
        "layer_scales": (False, False, False, True),
        "layer_scale_init": 1.0,
        "head_width": 128,
    },
}

# The size of the logits that full attention computes at a time. On CPUs they stay in the cache.
CPU_BYTES, GPU_BYTES = 2 << 20, 256 << 20


class PathDecay(nn.Module):
    """The decays of tokens along their row and their column, summed up: (B, H, W, dim) to two of (B, H, W, num_heads).

    A decay is -exp(A_log) softplus(dt_linear(x) + dt_bias), as of Mamba-2; all heads share `dt_linear`. The sums go
    along a row or a column, up to and with each token. They are float32, or float64 for float64.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.dt_linear = nn.Linear(dim // num_heads, 2, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise for decays between 0.001 and 0.11, and tokens of zeros."""
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))
        step = self.dt_bias.exp()
        self.dt_bias.copy_(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        self.A_log.copy_(nn.init.uniform_(self.A_log, 1, 1.1).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sums along rows and along columns."""
        # torch.export can't prove that a linear layer may divide its output into five dimensions.
        heads = x.unflatten(-1, (self.num_heads, -1)).flatten(0, 2)  # (B H W, N, D)
        steps = linear(self.dt_linear, heads).unflatten(0, (x.shape[0], *sizes(x)[1:3]))  # (B, H, W, N, 2)
        dtype = torch.promote_types(steps.dtype, torch.float32)
        with as_given(x):
            steps = nn.functional.softplus(steps.to(dtype) + self.dt_bias.to(dtype)[:, None])
            along_rows, along_columns = (-self.A_log.to(dtype).exp()[:, None] * steps).unbind(-1)
            return along_rows.cumsum(2), along_columns.cumsum(1)


class PathAttention(nn.Module):
    """Attention with decays along rows and columns, plus LePE of the values, between linear layers.

    Pairs of channels of the queries and keys are rotated by an angle that is proportional to the token's number, which
    is counted row by row.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        pairs = dim // num_heads // 2
        self.rope = tuple(10000 ** (-i / max(pairs - 1, 1)) for i in range(pairs))  # radians per token
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.decay = PathDecay(dim, num_heads, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        # The largest maps are the logits of all lines.
        _, height, width, dim = sizes(x)
        return by_image(self, self.forward_images, x, (height + width) * self.num_heads / dim)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        qkv = linear(self.qkv, x)
        along_rows, along_columns = self.decay(x)
        dim = sizes(x)[-1]
        with as_given(x):
            value = qkv[..., 2 * dim :]
            out = self.attend(self.rotate(qkv[..., : 2 * dim]), value, along_rows, along_columns)
        return linear(self.proj, out + self.lepe(value))

    def rotate(self, query_key: Tensor) -> Tensor:
        """Queries and keys (B, H, W, 2 dim), rotated; half precision is computed in float32."""
        _, height, width, _ = sizes(query_key)
        wide = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
        return turned(wide, 2 * self.num_heads, _turns, height, width, self.rope).to(query_key.dtype)

    def attend(self, query_key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
        """Attention between rotated queries and keys (B, H, W, 2 dim) and values (B, H, W, dim): (B, H, W, dim)."""
        raise NotImplementedError


def _turns(height: int, width: int, rope: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, H, W, 1, D / 2): cosine and sine of the angles; float32 would lose their digits in large maps."""
    rows, columns = (torch.arange(side, dtype=torch.float64, device=device) for side in (height, width))
    numbers = rows[:, None] * width + columns
    # torch.tensor would copy the numbers from the CPU at every call of a compiled model.
    frequencies = torch.stack([torch.full((), x, dtype=torch.float64, device=device) for x in rope])
    angles = (numbers[..., None] * frequencies)[:, :, None]
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


@register_notrace_module
class LineAttention(PathAttention):
    """Path attention by lines: along the row, then along the column, and vice versa."""

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, by rows and columns",), values=self.qkv)

    def attend(self, query_key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
        """Attention between rotated queries and keys (B, H, W, 2 dim) and values (B, H, W, dim): (B, H, W, dim)."""
        on_gpu = value.device.type == "cuda" and not torch.compiler.is_exporting()
        attend = self.attend_in_windows if on_gpu else self.attend_by_weights
        return attend(query_key, value, along_rows, along_columns)

    def attend_in_windows(self, query_key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
        """`attend` by the operator, which computes the weights of a line anew for each order, and never keeps them."""
        _, height, width, _ = sizes(value)

        def along(x: Tensor, window_size: tuple[int, int], sums: Tensor) -> Tensor:
            qkv = torch.cat((query_key, x), -1)
            return window_attention(qkv, num_heads=self.num_heads, window_size=window_size, line_decay=sums)

        row, column = (1, width), (height, 1)
        row_first = along(along(value, row, along_rows), column, along_columns)
        column_first = along(along(value, column, along_columns), row, along_rows)
        return 0.5 * (row_first + column_first)

    def attend_by_weights(self, query_key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
        """`attend` with weights that serve for both orders. On CPUs, it takes a third of the time of the operator."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        query, key = query_key.to(dtype).unflatten(-1, (2, self.num_heads, -1)).unbind(3)  # (B, H, W, N, D)
        row_weights = _line_weights(*(_rows(x) for x in (query, key, along_rows)))
        column_weights = _line_weights(*(_columns(x) for x in (query, key, along_columns)))
        _, height, width, _ = sizes(value)

        def in_rows(x: Tensor) -> Tensor:
            lines = torch.bmm(row_weights, _rows(x)).unflatten(0, (self.num_heads, x.shape[0], height))
            return lines.movedim(0, 3)

        def in_columns(x: Tensor) -> Tensor:
            lines = torch.bmm(column_weights, _columns(x)).unflatten(0, (self.num_heads, x.shape[0], width))
            return lines.transpose(2, 3).movedim(0, 3)

        x = value.to(dtype).unflatten(-1, (self.num_heads, -1))
        orders = in_columns(in_rows(x)), in_rows(in_columns(x))
        row_first, column_first = (out.contiguous().flatten(-2) for out in orders)  # their layouts differ
        return (0.5 * (row_first + column_first)).to(value.dtype)


# torch.export can prove that contiguous dimensions can be merged, and divided again with the number of heads first.
def _rows(x: Tensor) -> Tensor:
    """(B, H, W, N, ...) -> (N B H, W, ...)."""
    return x.movedim(3, 0).contiguous().flatten(0, 2)


def _columns(x: Tensor) -> Tensor:
    """(B, H, W, N, ...) -> (N B W, H, ...)."""
    return x.movedim(3, 0).transpose(2, 3).contiguous().flatten(0, 2)


def _line_weights(query: Tensor, key: Tensor, sums: Tensor) -> Tensor:
    """The weights (L, T, T) of the tokens of L lines for each other; queries and keys (L, T, D), sums (L, T)."""
    logits = torch.bmm(query.shape[-1] ** -0.5 * query, key.mT)
    return (logits - _decays(sums)).softmax(-1)


def _decays(sums: Tensor) -> Tensor:
    """The decays between the tokens of a line, as positive numbers: sums (..., T) to (..., T, T)."""
    return (sums[..., :, None] - sums[..., None, :]).abs()


@register_notrace_module
class FullAttention(PathAttention):
    """Path attention of all tokens to all tokens."""

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens",), values=self.qkv)

    def attend(self, query_key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
        """Attention between rotated queries and keys (B, H, W, 2 dim) and values (B, H, W, dim): (B, H, W, dim)."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        qkv = torch.cat((query_key, value), -1).to(dtype).unflatten(-1, (3, self.num_heads, -1))
        query, key, value_ = qkv.permute(3, 0, 4, 1, 2, 5).contiguous().flatten(1, 2).unbind(0)  # (B N, H, W, D)
        sums = (x.permute(0, 3, 1, 2).contiguous().flatten(0, 1) for x in (along_rows, along_columns))
        out = path_attention(query, key, value_, *sums).unflatten(0, (value.shape[0], self.num_heads))
        return out.permute(0, 2, 3, 1, 4).contiguous().flatten(3).to(value.dtype)


def path_attention(query: Tensor, key: Tensor, value: Tensor, along_rows: Tensor, along_columns: Tensor) -> Tensor:
    """The mean of two softmax attentions of all tokens to all tokens, one for each path between two tokens.

    With the sums r along rows and c along columns, the logit of the query at (y, x) and the key at (v, u) is

        D ** -0.5 q . k - |r[y, x] - r[y, u]| - |c[y, u] - c[v, u]|    along the query's row, then the key's column
        D ** -0.5 q . k - |c[y, x] - c[v, x]| - |r[v, x] - r[v, u]|    along the query's column, then the key's row.

    So the decays between all tokens are sums of decays within lines. They are added up for a few rows of queries at a
    time, and once more in the backward pass.

    Args:
        query, key, value: (N, H, W, D), the heads of all images, float32 or float64.
        along_rows, along_columns: (N, H, W), the sums.

    Returns:
        (N, H, W, D).
    """
    heads, height, width, head_dim = sizes(query)
    keys, values = (head_dim**-0.5 * key).flatten(1, 2).mT, value.flatten(1, 2)
    # Of queries in row y and column x, and keys in row v and column u: (N, y, x, v, u), with 1 where it is the same.
    in_rows, in_columns = _decays(along_rows), _decays(along_columns.mT.contiguous())  # (N, y, x, u), (N, x, y, v)
    of_query_rows = in_rows[..., None, :]  # u is the place in the row of the query
    of_key_columns = in_columns.permute(0, 2, 3, 1)[:, :, None].contiguous()
    of_query_columns = in_columns.transpose(1, 2)[..., None].contiguous()
    of_key_rows = in_rows.transpose(1, 2)[:, None].contiguous()
    by_query = (query, of_query_rows, of_key_columns, of_query_columns)
    if not all(isinstance(size, int) for size in (heads, height, width)):  # symbolic in torch.export
        return _path_attention(*by_query, of_key_rows, keys, values)
    room = (CPU_BYTES if query.device.type == "cpu" else GPU_BYTES) // query.element_size()
    step = max(1, room // max(1, heads * width * height * width))
    attend: Callable[..., Tensor] = _path_attention
    if dispatch.again_differentiable(query, keys, values, in_rows, in_columns) and not dispatch.transformed():
        attend = partial(checkpoint, _path_attention, use_reentrant=False, preserve_rng_state=False)
    parts = zip(*(x.split(step, 1) for x in by_query), strict=True)
    return torch.cat([attend(*part, of_key_rows, keys, values) for part in parts], 1)


def _path_attention(
    query: Tensor,
    of_query_rows: Tensor,
    of_key_columns: Tensor,
    of_query_columns: Tensor,
    of_key_rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """The attention of some rows of queries (N, rows, W, D), given the decays of the four kinds of lines."""
    rows, width = sizes(query)[1:3]
    height = sizes(of_key_rows)[3]
    logits = torch.bmm(query.flatten(1, 2), keys).unflatten(1, (rows, width)).unflatten(3, (height, width))
    row_first = (logits - of_key_columns - of_query_rows).flatten(3).softmax(-1)
    column_first = (logits - of_key_rows - of_query_columns).flatten(3).softmax(-1)
    out = 0.5 * torch.bmm((row_first + column_first).flatten(1, 2), values)
    return out.unflatten(1, (rows, width))


class PPMA(Backbone):
    """PPMA: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32, with sizes rounded up. They have no norm. `norm` is the 1 x 1 convolution
    before pooling, with batch norm and SiLU; its output has `head_width` channels.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. Heads have an even number of channels.
        mlp_ratios: Hidden channels of each stage's MLPs, as multiples of `embed_dims`.
        by_lines: For each stage, whether tokens attend by rows and columns, or to all tokens at once, whose cost grows
            with the square of the number of tokens.
        layer_scales: For each stage, whether the residual branches have factors.
        layer_scale_init: Initial value of these factors.
        head_width: Channels of the convolution before pooling.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        output_norm: Apply a LayerNorm to each feature, for dense prediction. Only without a classifier.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 18, 4),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        by_lines: Sequence[bool] = (True, True, True, False),
        layer_scales: Sequence[bool] = (False, False, False, False),
        layer_scale_init: float = 1e-6,
        head_width: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            layer_scale_init=layer_scale_init,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            by_lines=by_lines,
            layer_scales=layer_scales,
        )
        arguments.check_halved(embed_dims)
        for name, values in (("by_lines", by_lines), ("layer_scales", layer_scales)):
            if not all(isinstance(value, bool) for value in values):
                raise ValueError(f"Got {name}={arguments.shown(values)}; it has to be True or False for each stage.")
        if any(dim // heads % 2 for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(f"Got {num_heads=} for {embed_dims=}; heads need an even number of channels, for pairs.")
        if not arguments.is_number(head_width, 1, 2**14):
            shown = arguments.shown(head_width)
            raise ValueError(f"Got head_width={shown}; it has to be a whole number from 1 to {2**14:,}.")
        dd = {"device": device, "dtype": dtype}
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stages = []
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            attention_cls = LineAttention if by_lines[i] else FullAttention
            layer_scale = layer_scale_init if layer_scales[i] else None
            blocks = []
            for drop_path in drop_path_rates[i]:
                attn = attention_cls(dim, heads, **dd)
                mlp = ResidualConvMlp(dim, int(dim * mlp_ratios[i]), **dd)
                blocks.append(Block(dim, attn, mlp, drop_path, layer_scale, layer_scale_ndim=4, **dd))
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None))
        super().__init__(
            Stem(in_chans, embed_dims[0], **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=HeadConv(embed_dims[-1], head_width, **dd),
            num_features=head_width,
            output_norm=output_norm,
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):  # a linear layer in the official code
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super().init_module(module)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"\.Relpos\.angle$", None),  # the frequencies of the rotation, which are computed
    (r"^patch_embed\.proj\.0\.", "stem.conv1."),
    (r"^patch_embed\.proj\.1\.", "stem.norm1."),
    (r"^patch_embed\.proj\.3\.", "stem.conv2."),
    (r"^patch_embed\.proj\.4\.", "stem.norm2."),
    (r"^patch_embed\.proj\.6\.", "stem.conv3."),
    (r"^patch_embed\.proj\.7\.", "stem.norm3."),
    (r"^patch_embed\.proj\.9\.", "stem.conv4."),
    (r"^patch_embed\.proj\.10\.", "stem.norm4."),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.0\.downsample\.", "stages.1.downsample."),
    (r"^layers\.1\.downsample\.", "stages.2.downsample."),
    (r"^layers\.2\.downsample\.", "stages.3.downsample."),
    (r"^proj\.", "norm.proj."),
    (r"^norm\.(?!proj\.|norm\.)", "norm.norm."),
    (r"^outnorm(\d)\.", r"output_norms.\1."),  # of the detection and segmentation backbones
    (r"\.pos\.conv\.", ".pos_embed."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.q_proj\.", ".attn.qkv[0]."),
    (r"\.retention\.k_proj\.", ".attn.qkv[1]."),
    (r"\.retention\.v_proj\.", ".attn.qkv[2]."),
    (r"\.retention\.out_proj\.", ".attn.proj."),
    (r"\.retention\.lepe\.conv\.", ".attn.lepe."),
    (r"\.retention\.path_embed\.", ".attn.decay."),
    (r"\.ffn\.dwconv\.conv\.", ".mlp.dw_conv."),
    (r"\.ffn\.", ".mlp."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("ppma", first_conv="stem.conv1")


def _create_ppma(variant: str, pretrained: bool, **kwargs) -> PPMA:
    return create(PPMA, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def ppma_t(pretrained: bool = False, **kwargs) -> PPMA:
    """PPMA-T (14.3 M parameters)."""
    return _create_ppma("ppma_t", pretrained, **kwargs)


@register_model
def ppma_s(pretrained: bool = False, **kwargs) -> PPMA:
    """PPMA-S (27.0 M)."""
    return _create_ppma("ppma_s", pretrained, **kwargs)


@register_model
def ppma_b(pretrained: bool = False, **kwargs) -> PPMA:
    """PPMA-B (54.2 M)."""
    return _create_ppma("ppma_b", pretrained, **kwargs)


@register_model
def test_ppma(pretrained: bool = False, **kwargs) -> PPMA:
    """A PPMA of 0.3 M parameters, for tests and small images."""
    return _create_ppma("test_ppma", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    attn = FullAttention(tokens.shape[-1], 1)
    attn.decay.reset_parameters()
    # No queries, so that only the decays make the weights. Shown relative to the largest one.
    nn.init.zeros_(attn.qkv.weight)
    nn.init.zeros_(attn.qkv.bias)
    nn.init.constant_(attn.decay.dt_bias, -2)
    weights = attention(attn, (tokens,), [place])[0, 0]
    return [
        Pattern("PPMA", ("all tokens, less the more", "decays are on the way"), (weights / weights.max(),), (place,))
    ]
