"""VAN: Visual Attention Network (Guo et al., CVMJ 2023, https://arxiv.org/abs/2202.09741).

A convolutional pyramid whose attention is a gate: large-kernel attention (LKA) multiplies the features by an
approximated 21 x 21 convolution of themselves. It consists of depth-wise convolutions of 5 x 5 and of 7 x 7 with
dilation 3, which together reach 23 x 23 pixels, and a 1 x 1 convolution.

Official code, Apache-2.0: https://github.com/Visual-Attention-Network/VAN-Classification and VAN-Segmentation. Written
from the paper and facts about that code; the tests compare outputs of van_b0. Differences:
- One class serves classification and dense prediction. In both, the LayerNorm at the end of a stage belongs to the
  stage: the next stage and feature extraction get its output. The official segmentation code uses `norm_eps=1e-5`.
- Features stay NCHW between the blocks, which consist of convolutions and batch norm.
- Modules have the paper's names; `KEY_MAP` translates official checkpoints.
- `drop_rate` is the dropout before the classifier, as in all of timm; the official dropout is `proj_drop_rate` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attention
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import by_image, convolution, is_plain
from zoo.kernels import large_kernel_attention
from zoo.layers import check_images, stage_rates

__all__ = ["VAN"]

# The paper's variants (b4 to b6: its version of July 2022). The width of stage 3 in b6 does not follow the pattern.
VARIANTS: dict[str, dict[str, Any]] = {
    "van_b0": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "van_b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)},
    "van_b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)},
    "van_b3": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)},
    "van_b4": {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
    "van_b5": {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
    # our own, for tests and small images on a CPU
    "test_van": {"embed_dims": (16, 32, 64, 96), "depths": (2, 2, 2, 2)},
}


@register_notrace_module
class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and batch norm. (B, C, H, W) -> (B, dim, ceil(H/s), ceil(W/s))."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return convolution(self.proj, x, self.norm)


@register_notrace_module
class Stem(PatchEmbed):
    """The first patch embedding, 7 x 7 with stride 4. It checks the images."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__(in_chans, dim, kernel_size=7, stride=4, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.proj)
        return super().forward(x)


@register_notrace_module
class LargeKernelAttention(nn.Module):
    """x * Conv1x1(DWConv7x7, dilation 3 (DWConv5x5(x))): a gate that reads 23 x 23 pixels, without a sigmoid."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dw_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.dw_dilated_conv = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim, **dd)
        self.pw_conv = nn.Conv2d(dim, dim, 1, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("large kernel",), kernel=lambda x: self.dw_dilated_conv(self.dw_conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        convs = self.dw_conv, self.dw_dilated_conv, self.pw_conv
        if not all(is_plain(conv, nn.Conv2d) for conv in convs):
            return x * self.pw_conv(self.dw_dilated_conv(self.dw_conv(x)))
        weights: list[Any] = [tensor for conv in convs for tensor in (conv.weight, conv.bias)]
        weights[4] = weights[4].flatten(1)  # the 1 x 1 convolution as a matrix
        return large_kernel_attention(x.permute(0, 2, 3, 1), *weights).permute(0, 3, 1, 2)


@register_notrace_module
class Attention(nn.Module):
    """LKA between two 1 x 1 convolutions, with its own shortcut."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj_in = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.lka = LargeKernelAttention(dim, **dd)
        self.proj_out = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut adds the block's normalised input, so layer scale and drop path act on it as well.
        return x + convolution(self.proj_out, self.lka(convolution(self.proj_in, x, act=self.act)))


@register_notrace_module
class Mlp(nn.Module):
    """1 x 1 convolution, depth-wise 3 x 3 convolution, GELU, 1 x 1 convolution."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.widening = hidden_dim / dim
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dw_conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return by_image(self, self.forward_images, x, self.widening)

    def forward_images(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, dim, H, W)."""
        x = self.drop1(convolution(self.dw_conv, convolution(self.fc1, x), act=self.act))
        return self.drop2(convolution(self.fc2, x))


class Block(nn.Module):
    """Attention and MLP, each with batch norm before and layer scale after, on a residual stream (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale_init: float = 0.01,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layer_scale_init = layer_scale_init
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = Attention(dim, **dd)
        self.layer_scale1 = nn.Parameter(torch.empty(dim, **dd))
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.layer_scale2 = nn.Parameter(torch.empty(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale1[:, None, None] * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.layer_scale2[:, None, None] * self.mlp(self.norm2(x)))
        return x


class VAN(Backbone):
    """Visual Attention Network: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up), each after its stage's LayerNorm.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none: without a classifier, the
            model then returns its last feature map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratios: Hidden channels of each stage's MLPs, as multiples of `embed_dims`.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth rate of the last block. It grows linearly from 0 at the first block.
        norm_eps: Epsilon of the LayerNorm at the end of each stage; 1e-5 in the official segmentation code.
        layer_scale_init: Initial value of the layer scales.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 3, 12, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        layer_scale_init: float = 0.01,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            layer_scale_init=layer_scale_init,
        )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, mlp_ratios=mlp_ratios)
        dd = {"device": device, "dtype": dtype}
        drop_path_rates = stage_rates(drop_path_rate, depths)
        stem = Stem(in_chans, embed_dims[0], **dd)
        stages = []
        for i, (dim, mlp_ratio) in enumerate(zip(embed_dims, mlp_ratios, strict=True)):
            blocks = [
                Block(dim, mlp_ratio, proj_drop_rate, drop_path, layer_scale_init, **dd)
                for drop_path in drop_path_rates[i]
            ]
            downsample = PatchEmbed(embed_dims[i - 1], dim, kernel_size=3, stride=2, **dd) if i else None
            stages.append(Stage(blocks, downsample, LayerNorm2d(dim, eps=norm_eps, **dd), channels_last=False))
        super().__init__(
            stem,
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has."""
        _init_weights(module)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, Block):
        nn.init.constant_(module.layer_scale1, module.layer_scale_init)
        nn.init.constant_(module.layer_scale2, module.layer_scale_init)


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed2\.", "stages.1.downsample."),
    (r"^patch_embed3\.", "stages.2.downsample."),
    (r"^patch_embed4\.", "stages.3.downsample."),
    (r"^block1\.", "stages.0.blocks."),
    (r"^block2\.", "stages.1.blocks."),
    (r"^block3\.", "stages.2.blocks."),
    (r"^block4\.", "stages.3.blocks."),
    (r"^norm1\.", "stages.0.norm."),
    (r"^norm2\.", "stages.1.norm."),
    (r"^norm3\.", "stages.2.norm."),
    (r"^norm4\.", "stages.3.norm."),
    (r"\.layer_scale_(\d)$", r".layer_scale\1"),
    (r"\.attn\.proj_1\.", ".attn.proj_in."),
    (r"\.attn\.proj_2\.", ".attn.proj_out."),
    (r"\.spatial_gating_unit\.conv0\.", ".lka.dw_conv."),
    (r"\.spatial_gating_unit\.conv_spatial\.", ".lka.dw_dilated_conv."),
    (r"\.spatial_gating_unit\.conv1\.", ".lka.pw_conv."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dw_conv."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("van", first_conv="stem.proj")


def _create_van(variant: str, pretrained: bool, **kwargs) -> VAN:
    return create(VAN, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def van_b0(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B0 (4.1 M parameters; VAN-Tiny in the paper's first version)."""
    return _create_van("van_b0", pretrained, **kwargs)


@register_model
def van_b1(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B1 (13.9 M; VAN-Small)."""
    return _create_van("van_b1", pretrained, **kwargs)


@register_model
def van_b2(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B2 (26.6 M; VAN-Base)."""
    return _create_van("van_b2", pretrained, **kwargs)


@register_model
def van_b3(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B3 (44.8 M; VAN-Large)."""
    return _create_van("van_b3", pretrained, **kwargs)


@register_model
def van_b4(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B4 (60.3 M)."""
    return _create_van("van_b4", pretrained, **kwargs)


@register_model
def van_b5(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B5 (90.0 M)."""
    return _create_van("van_b5", pretrained, **kwargs)


@register_model
def van_b6(pretrained: bool = False, **kwargs) -> VAN:
    """VAN-B6 (199.8 M)."""
    return _create_van("van_b6", pretrained, **kwargs)


@register_model
def test_van(pretrained: bool = False, **kwargs) -> VAN:
    """A VAN of 0.5 M parameters, for tests and small images."""
    return _create_van("test_van", pretrained, **kwargs)


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The epsilon of the norms that the official code uses for segmentation; see `zoo.families`."""
    return {"norm_eps": 1e-5} if task == "segment" and variant != "test_van" else {}


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    module = LargeKernelAttention(tokens.shape[-1])
    for conv in (module.dw_conv, module.dw_dilated_conv):
        nn.init.ones_(conv.weight)
    # The number of paths from each token through the two convolutions, relative to the largest.
    paths = attention(module, (tokens.permute(0, 3, 1, 2),), [place])[0, 0]
    return [Pattern("VAN", ("23 × 23 by two kernels:", "5 × 5, dilated 7 × 7"), (paths / paths.max(),), (place,))]
