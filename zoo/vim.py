"""Vim: Vision Mamba (Zhu et al., ICML 2024, https://arxiv.org/abs/2401.09417).

An isotropic model, like ViT, without attention: state space models scan the sequence of the patches, row by row,
forward and backward, and carry what they have seen from token to token. The classifier reads a class token in the
middle of the sequence.

Official code, Apache-2.0: https://github.com/hustvl/Vim. Written from the paper and facts about that code; the tests
compare outputs of vim_tiny. Differences:
- Images of any size from 32 pixels up. The position embeddings of the patches are resized (bicubic); that of the class
  token stays the middle one.
- Features are the residual stream after each quarter of the blocks, without the class token. The official code for
  dense prediction has no class token (`class_token=False`), and for some models gives the last change of the stream.
- Without a class token, the classifier reads the mean of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, lecun_normal_, register_notrace_module
from timm.layers import trunc_normal_ as truncated_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern
from zoo.backbone import Stage, create
from zoo.cpu import is_plain, linear
from zoo.kernels import certain, depthwise_conv2d_nhwc, selective_scan, sizes
from zoo.layers import RmsNorm2d, check_images, stage_rates
from zoo.sequences import (
    SequenceBackbone,
    SequenceStage,
    Tokens,
    check_pyramid,
    pyramid_layers,
    split_positions,
)

__all__ = ["Vim"]


def _network(dim: int, **settings) -> dict[str, Any]:
    return {"embed_dims": (dim,) * 4, "depths": (6,) * 4, **settings}


# Table 2 of the paper, and the README of the official code. Its names are longer: vim_tiny_patch16_224_bimambav2_...
STRIDE_8 = {"stride": 8, "table_grid": 27}
VARIANTS: dict[str, dict[str, Any]] = {
    "vim_tiny": _network(192),
    "vim_tiny_stride8": _network(192, **STRIDE_8),
    "vim_small": _network(384),
    "vim_small_stride8": _network(384, **STRIDE_8),
    "vim_base": _network(768),
    # our own, for tests and small images on a CPU; as the official code for dense prediction, without a class token
    "test_vim": {
        "embed_dims": (48,) * 4,
        "depths": (2,) * 4,
        "state_dim": 4,
        "table_grid": 4,
        "class_token": False,
    },
}


@register_notrace_module
class CausalConv(nn.Conv1d):
    """Depth-wise convolution of tokens (B, H, W, dim), row by row: of a token and those before it.

    With `reverse`, it is a convolution of the sequence from its end: of a token and those after it.
    """

    bias: nn.Parameter

    def __init__(self, dim: int, kernel_size: int, reverse: bool = False, device=None, dtype=None):
        super().__init__(dim, dim, kernel_size, groups=dim, device=device, dtype=dtype)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        # With as many zeros for the tokens on the other side, it is an ordinary convolution of one row.
        zeros = self.kernel_size[0] - 1
        weight = F.pad(self.weight.flip(-1), (zeros, 0)) if self.reverse else F.pad(self.weight, (0, zeros))
        out = depthwise_conv2d_nhwc(x.flatten(1, 2)[:, None], weight[:, :, None], self.bias)
        return out.unflatten(2, sizes(x)[1:3])[:, 0]


class Scan(nn.Module):
    """What one scan by a state space model (selective scan) needs, from tokens (B, H, W, dim), row by row.

    The tokens pass a convolution and SiLU. Each channel has `state_dim` states. They decay from token to token, by
    factors that depend on the token, and the token is added to them. With `reverse`, the sequence is scanned from its
    end.
    """

    def __init__(
        self, dim: int, rank: int, state_dim: int, kernel_size: int, reverse: bool = False, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reverse, self.rank = reverse, rank
        self.conv = CausalConv(dim, kernel_size, reverse, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(dim, rank + 2 * state_dim, bias=False, **dd)  # `rank` for step sizes, then B and C
        self.dt_proj = nn.Linear(rank, dim, **dd)
        self.A_log = nn.Parameter(torch.empty(dim, state_dim, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise as the official code does, which leaves the step sizes of the reversed scan near 0.7."""
        self.conv.reset_parameters()
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_proj.in_features**-0.5), self.dt_proj.in_features**-0.5)
        with torch.no_grad():
            if self.reverse:
                self.dt_proj.bias.zero_()
            else:
                step = self.dt_proj.bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
                step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus
            self.A_log.copy_(
                torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log().expand_as(self.A_log)
            )
            self.D.fill_(1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `selective_scan` without the dimension of directions: x, delta, A, B, C, D, delta_bias."""
        x = self.act(self.conv(x))
        _, state_dim = self.A_log.shape
        steps, inputs, outputs = linear(self.x_proj, x).split((self.rank, state_dim, state_dim), dim=-1)
        bias: Tensor
        if is_plain(self.dt_proj, nn.Linear):
            # The bias, larger than the rest, is added in float32.
            delta, bias = F.linear(steps, self.dt_proj.weight), self.dt_proj.bias
        else:
            delta, bias = self.dt_proj(steps), torch.zeros_like(self.D)
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return x, delta, -self.A_log.to(dtype).exp(), inputs, outputs, self.D, bias


@register_notrace_module
class Mixer(nn.Module):
    """The mean of a forward and a backward scan of tokens (B, H, W, dim), times a gate, between linear layers."""

    def __init__(self, dim: int, state_dim: int, kernel_size: int, class_token: bool = False, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.class_token = class_token
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)  # the scanned channels, then the gate
        self.scan = Scan(inner, rank, state_dim, kernel_size, **dd)
        self.scan_b = Scan(inner, rank, state_dim, kernel_size, reverse=True, **dd)
        self.proj = nn.Linear(inner, dim, bias=False, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module's output depends on; see `zoo.attention_maps`."""
        return AttentionInfo(
            ("all tokens, by two scans",),
            values=self.in_proj,
            gated=True,
            signed=True,
            fixed=("scan.x_proj", "scan_b.x_proj"),  # steps, which make the decays, and what is added and read
            class_token="middle" if self.class_token else "",
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x, gate = linear(self.in_proj, x).chunk(2, dim=-1)
        both = zip(self.scan(x), self.scan_b(x), strict=True)
        # Maps (B, H, W, .) get their directions before the last dimension, parameters before the first.
        x, delta, A, B, C, D, bias = (torch.stack(pair, -2 if pair[0].ndim == 4 else 0) for pair in both)
        directions: Any = ("rows", "rows_reversed")
        out = selective_scan(x, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, directions=directions)
        return linear(self.proj, out * F.silu(gate) / 2)


@register_notrace_module
class Block(nn.Module):
    """x + mixer(RMSNorm(x)) on tokens (B, H, W, dim), or on a sequence (B, 1, T, dim)."""

    def __init__(self, dim: int, mixer: Mixer, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


@register_notrace_module
class Stem(nn.Module):
    """Patches of an image plus position embeddings: (B, C, H, W) -> (B, dim, h, w), or `Tokens` with a class token.

    h = (H - patch_size) // stride + 1, w alike; pixels at the bottom and the right that fill no patch are left out.

    Attributes:
        pos_embed: (1, N, dim), for the tokens of a square map, row by row, with that of the class token in the middle.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        stride: int,
        table_grid: int,
        class_token: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.table_grid = table_grid
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, table_grid**2 + class_token, dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise the class token and the position embeddings."""
        truncated_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            truncated_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Any:
        check_images(x, self.proj)
        x = self.proj(x)
        _, _, height, width = sizes(x)
        table: Tensor = self.pos_embed
        if self.cls_token is not None:
            table, middle = split_positions(table, "middle")
        table = table.transpose(1, 2).unflatten(2, (self.table_grid, self.table_grid))
        if not (certain(height == self.table_grid) and certain(width == self.table_grid)):
            table = F.interpolate(table, (height, width), mode="bicubic")
        x = x + table
        if self.cls_token is None:
            return x
        return Tokens(x, (self.cls_token + middle).expand(x.shape[0], -1, -1))


class Vim(SequenceBackbone):
    """Vim: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW, all at stride `stride`, with (side - patch_size) // stride + 1 tokens a side: the residual stream
    after each stage, without the class token.

    With a class token, stages and `forward_features` return a pair: the map and the class token.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for the class token, or the mean of all tokens in a model without one; "ep" for efficient
            probing of the patches; "" for neither: without a classifier, the model then returns its last feature map.
        embed_dims, depths: Channels and blocks of each stage. The channels are the same in all stages.
        patch_size, stride: The side of a patch, and the distance between patches, in pixels.
        state_dim: States of each channel.
        kernel_size: Tokens of the convolution before a scan.
        table_grid: Side, in tokens, of the maps for which there are position embeddings; 14 for images of 224 pixels
            and stride 16. For other maps, they are resized.
        class_token: Whether there is a class token. Official code for dense prediction has none.
        pyramid: Whether the four features get the strides 4, 8, 16 and 32 by layers of their own (for a `stride` of
            16), for dense prediction. Only without a classifier. There is no final norm then.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (192,) * 4,
        depths: Sequence[int] = (6,) * 4,
        patch_size: int = 16,
        stride: int = 16,
        state_dim: int = 16,
        kernel_size: int = 4,
        table_grid: int = 14,
        class_token: bool = True,
        pyramid: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            table_grid=table_grid,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        for name, value, most in (
            ("patch_size", patch_size, 32),
            ("stride", stride, patch_size),
            ("state_dim", state_dim, 2**10),
            ("kernel_size", kernel_size, 2**10),
        ):
            if not arguments.is_number(value, 1, most):
                limit = f"{most:,}, the patch_size" if name == "stride" else f"{most:,}"
                raise ValueError(f"Got {name}={arguments.shown(value)}; it has to be a whole number from 1 to {limit}.")
        arguments.check_choice("class_token", class_token, (True, False))
        arguments.check_choice("pyramid", pyramid, (True, False))
        arguments.check_stages(embed_dims=embed_dims, depths=depths)
        if any(dim != embed_dims[0] for dim in embed_dims):
            raise ValueError(f"Got {embed_dims=}; all stages have the same number of channels.")
        if pyramid:
            check_pyramid(num_classes, depths, stride=stride)
        dd = {"device": device, "dtype": dtype}
        dim = embed_dims[0]
        stages: list[Stage] = []
        for rates in stage_rates(drop_path_rate, depths):
            blocks = [Block(dim, Mixer(dim, state_dim, kernel_size, class_token, **dd), rate, **dd) for rate in rates]
            stages.append(SequenceStage(blocks, "middle") if class_token else Stage(blocks))
        self.place = "middle" if class_token else None
        super().__init__(
            Stem(in_chans, dim, patch_size, stride, table_grid, class_token, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            strides=[stride // 4, stride // 2, stride, 2 * stride] if pyramid else [stride] * len(depths),
            norm=None if pyramid else RmsNorm2d(dim, eps=1e-5, **dd),
        )
        if pyramid:
            self.output_norms = pyramid_layers(dim, **dd)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        if isinstance(module, Mixer):
            # As in ViT's initialisation for deep models: the output layers add up along the residual stream.
            for layer in (module.in_proj, module.proj):
                layer.reset_parameters()
            stages: Any = self.stages
            with torch.no_grad():
                module.proj.weight /= math.sqrt(sum(len(stage.blocks) for stage in stages))
        elif isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super().init_module(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embeddings and the class token."""
        return {"stem.pos_embed", "stem.cls_token"}


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^patch_embed\.", "stem."),
    (r"^(cls_token|pos_embed)$", r"stem.\1"),
    (r"^norm_f\.", "norm."),
    (r"^fpn1\.", "output_norms.0."),  # the pyramid of the segmentation backbone
    (r"^fpn2\.0\.", "output_norms.1."),
    *((rf"^layers\.{i}\.", f"stages.{i // 6}.blocks.{i % 6}.") for i in range(24)),
    (r"\.mixer\.A_log$", ".mixer.scan.A_log"),
    (r"\.mixer\.A_b_log$", ".mixer.scan_b.A_log"),
    (r"\.mixer\.D$", ".mixer.scan.D"),
    (r"\.mixer\.D_b$", ".mixer.scan_b.D"),
    (r"\.mixer\.conv1d(_b)?\.", r".mixer.scan\1.conv."),
    (r"\.mixer\.(x_proj|dt_proj)(_b)?\.", r".mixer.scan\2.\1."),
    (r"\.mixer\.out_proj\.", ".mixer.proj."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    A model without a class token leaves out that of the file, with its position embedding. Position embeddings for maps
    of another size are resized. The weights of stride 8 were fine-tuned with embeddings of which those after the middle
    are shifted by one token; they are taken as they are.
    """
    tensors = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    table, want = tensors.get("stem.pos_embed"), model.state_dict()["stem.pos_embed"].shape
    if table is not None and table.ndim == len(want) == 3 and table.shape != want:
        stem: Any = model.stem
        middle = table[:, :0]
        if "stem.cls_token" in tensors:
            table, middle = split_positions(table, "middle")
        grid, have = stem.table_grid, math.isqrt(table.shape[1])
        if have**2 == table.shape[1] != grid**2:
            maps = checkpoints.resize_table(table[0].T.unflatten(1, (have, have)), (grid, grid))
            table = maps.flatten(1).T[None]
        if model.place is not None:
            half = grid**2 // 2
            table = torch.cat((table[:, :half], middle, table[:, half:]), 1)
        tensors["stem.pos_embed"] = table
    if model.place is None:
        tensors.pop("stem.cls_token", None)
    return checkpoints.convert(tensors, model, KEY_MAP)


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map: pixels that fill no patch are left out; see `zoo.families`."""
    stride = VARIANTS[variant].get("stride", 16)
    return ((side - 16) // stride + 1) * stride // reduction


_STRIDES = {name: ("stem.proj", settings.get("stride", 16)) for name, settings in VARIANTS.items()}
default_cfgs = checkpoints.default_cfgs("vim", "stem.proj", exceptions=_STRIDES, feature_side=feature_side)


def _create_vim(variant: str, pretrained: bool, **kwargs) -> Vim:
    return create(Vim, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-Ti (7.1 M parameters)."""
    return _create_vim("vim_tiny", pretrained, **kwargs)


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-Ti with overlapping patches, four times as many (7.3 M)."""
    return _create_vim("vim_tiny_stride8", pretrained, **kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-S (25.8 M)."""
    return _create_vim("vim_small", pretrained, **kwargs)


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-S with overlapping patches, four times as many (26.0 M)."""
    return _create_vim("vim_small_stride8", pretrained, **kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs) -> Vim:
    """Vim-B (97.6 M)."""
    return _create_vim("vim_base", pretrained, **kwargs)


@register_model
def test_vim(pretrained: bool = False, **kwargs) -> Vim:
    """A Vim of 0.3 M parameters, for tests and small images."""
    return _create_vim("test_vim", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The official code for detection and segmentation has no class token, but a pyramid; see `zoo.families`."""
    return {"class_token": False, "pyramid": True}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    _, height, width, _ = tokens.shape
    x, shape = torch.zeros(1, height, width, 1, requires_grad=True), (1, height, width, 2, 1)
    # What reaches the token in a channel with one state, which decays by exp(-0.02) from token to token.
    step, one, decay = torch.full(shape, 0.02), torch.ones(shape), -torch.ones(2, 1, 1)
    with torch.enable_grad():
        out = selective_scan(x, step, decay, one, one, directions=("rows", "rows_reversed"))
        weights = torch.autograd.grad(out[0, place[0], place[1], 0], x)[0][0, :, :, 0]
    lines = ("all tokens, row by row,", "forward and backward")
    return [Pattern("Vim", lines, ((weights / weights.max()).clamp(max=1),), (place,))]
