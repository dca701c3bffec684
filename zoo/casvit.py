"""CAS-ViT: Convolutional Additive Self-attention Vision Transformers (Zhang et al., 2024, https://arxiv.org/abs/2408.03703).

A pyramid for small devices. Its attention has no softmax and no heads: query and key are gated by what is around them
and by the mean of the whole map, and a convolution of their sum is a gate for the value. Every layer is a convolution,
so the cost is linear in the number of pixels.

Official code, MIT: https://github.com/Tianfang-Zhang/CAS-ViT. Written from the facts of that code; the tests compare
outputs of casvit_xs. Differences:
- Logits are the mean of two classifiers, in training too. `set_distilled_training` makes the model return both, as in
  timm's distilled models. A checkpoint with one classifier is loaded into both, which then agree.
- One class serves classification and dense prediction, where `output_norm` adds the batch norms of the official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, get_device_dtype, register_notrace_module
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import convolution, fused_convolution, is_plain, spatial_mean
from zoo.layers import check_images, stage_rates

__all__ = ["CASViT"]

# The official names are rcvit_xs, rcvit_s, rcvit_m and rcvit_t.
VARIANTS: dict[str, dict[str, Any]] = {
    "casvit_xs": {"embed_dims": (48, 56, 112, 220), "depths": (2, 2, 4, 2)},
    "casvit_s": {"embed_dims": (48, 64, 128, 256), "depths": (3, 3, 6, 3)},
    "casvit_m": {"embed_dims": (64, 96, 192, 384), "depths": (3, 3, 6, 3)},
    "casvit_t": {"embed_dims": (96, 128, 256, 512), "depths": (3, 3, 6, 3)},
    # our own, for tests and small images on a CPU
    "test_casvit": {"embed_dims": (16, 32, 48, 64), "depths": (2, 2, 2, 2)},
}


@register_notrace_module
class Stem(nn.Module):
    """Twice a 3 x 3 convolution with stride 2, batch norm, ReLU: (B, C, H, W) -> (B, dim, ceil(H/4), ceil(W/4))."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.conv1)
        x = convolution(self.conv1, x, self.norm1, self.act1)
        return convolution(self.conv2, x, self.norm2, self.act2)


@register_notrace_module
class Downsample(nn.Module):
    """A 3 x 3 convolution with stride 2 and batch norm: (B, C, H, W) -> (B, dim, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_dim, dim, 3, 2, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return convolution(self.proj, x, self.norm)


def depthwise_conv(dim: int, device=None, dtype=None) -> nn.Conv2d:
    """A depth-wise 3 x 3 convolution that keeps the size of the map."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)


@register_notrace_module
class LocalPerception(nn.Module):
    """1 x 1 convolution, batch norm, depth-wise 3 x 3 convolution, GELU, 1 x 1 convolution."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.dw_conv = depthwise_conv(dim, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = convolution(self.dw_conv, convolution(self.conv1, x, self.norm), act=self.act)
        return convolution(self.conv2, x)


@register_notrace_module
class SpatialGate(nn.Module):
    """x * sigmoid(Conv1x1(ReLU(BatchNorm(DWConv3x3(x))))): one factor for all channels of a token."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dw_conv = depthwise_conv(dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU()
        self.pw_conv = nn.Conv2d(dim, 1, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        features = convolution(self.dw_conv, x, self.norm, self.act)
        # To one channel, a linear layer is faster on CPUs. torch.export would restrict the sizes of its output.
        if is_plain(self.pw_conv, nn.Conv2d) and not torch.compiler.is_exporting():
            factor = F.linear(features.permute(0, 2, 3, 1), self.pw_conv.weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            factor = self.pw_conv(features)
        return x * factor.sigmoid()


@register_notrace_module
class ChannelGate(nn.Module):
    """x * sigmoid(Conv1x1(mean of the map)): one factor for all tokens of a channel."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.fc = nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(spatial_mean(x)[:, :, None, None]).sigmoid()


@register_notrace_module
class AdditiveAttention(nn.Module):
    """Convolutional additive token mixer: DWConv3x3(DWConv3x3(gated query + gated key) * value).

    The paper calls the sum of query and key their similarity. Both convolutions are depth-wise, so only the 1 x 1
    convolution to query, key and value mixes channels.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False, **dd)
        self.q_gates = nn.Sequential(SpatialGate(dim, **dd), ChannelGate(dim, **dd))
        self.k_gates = nn.Sequential(SpatialGate(dim, **dd), ChannelGate(dim, **dd))
        self.dw_conv = depthwise_conv(dim, **dd)
        self.proj = depthwise_conv(dim, **dd)

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("convolutions and means",), kernel=lambda x: self.gate(*self.qkv(x).chunk(3, 1)[:2]))

    def gate(self, query: Tensor, key: Tensor) -> Tensor:
        """The factor of the value, (B, dim, H, W)."""
        return convolution(self.dw_conv, self.q_gates(query) + self.k_gates(key))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return convolution(self.proj, self.gate(query, key) * value)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value, each (B, dim, H, W)."""
        if is_plain(self.qkv, nn.Conv2d):
            # The thirds of a channels-last map are not channels-last themselves.
            options = (0, 0), (1, 1), (1, 1), 1
            parts = [fused_convolution(x, weight, None, *options) for weight in self.qkv.weight.chunk(3)]
            if all(part is not None for part in parts):
                return [part for part in parts if part is not None]
        return convolution(self.qkv, x).chunk(3, 1)


@register_notrace_module
class Mlp(nn.Module):
    """1 x 1 convolution, GELU, 1 x 1 convolution, with dropout after both convolutions."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(convolution(self.fc2, self.drop1(convolution(self.fc1, x, act=self.act))))


class Block(nn.Module):
    """Local perception, attention and MLP, the latter two after batch norm, on a residual stream (B, C, H, W)."""

    def __init__(
        self, dim: int, mlp_ratio: float, proj_drop: float = 0.0, drop_path: float = 0.0, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.local = LocalPerception(dim, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = AdditiveAttention(dim, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TwoClassifiers(nn.Module):
    """Two linear classifiers of pooled features (B, in_features): the mean of their logits, (B, out_features).

    Attributes:
        cls: The first classifier.
        dist: The second classifier, which learns from a teacher in distillation.
        both: Whether the result in training is a pair, the logits of both classifiers.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.cls = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.dist = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.both = False

    def forward(self, x: Tensor) -> Any:
        logits, dist_logits = self.cls(x), self.dist(x)
        return (logits, dist_logits) if self.both and self.training else (logits + dist_logits) / 2


class CASViT(Backbone):
    """CAS-ViT: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up): the plain outputs of the stages.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifiers; 0 for none.
        global_pool: "avg" for average pooling, "ep" for efficient probing, or "" for none: without a classifier, the
            model then returns its last feature map.
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of `embed_dims`.
        drop_rate: Dropout before the classifiers.
        proj_drop_rate: Dropout inside the MLPs.
        drop_path_rate: Stochastic depth rate of the last block's attention and MLP. It grows linearly from 0 at the
            first block.
        distillation: Whether there is a second classifier, and logits are the mean of both; see
            `set_distilled_training`. The official training script turns it off.
        output_norm: Apply a batch norm to each feature, for dense prediction. Only without a classifier.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    distillation = False  # until the constructor of the base class is done
    distilled_training = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distillation: bool = True,
        output_norm: bool = False,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            output_norm=output_norm,
        )
        arguments.check_choice("distillation", distillation, (True, False))
        arguments.check_stages(embed_dims=embed_dims, depths=depths, mlp_ratio=mlp_ratio)
        arguments.check_halved(embed_dims)
        dd = {"device": device, "dtype": dtype}
        stages = []
        for i, (dim, rates) in enumerate(zip(embed_dims, stage_rates(drop_path_rate, depths), strict=True)):
            blocks = [Block(dim, mlp_ratio, proj_drop_rate, rate, **dd) for rate in rates]
            stages.append(Stage(blocks, Downsample(embed_dims[i - 1], dim, **dd) if i else None, channels_last=False))
        super().__init__(
            Stem(in_chans, embed_dims[0], **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm=nn.BatchNorm2d(embed_dims[-1], **dd),
            output_norm=output_norm,
            output_norm_layer=nn.BatchNorm2d,
        )
        self.distillation = distillation
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers with new ones (none if `num_classes` is 0), and the pooling unless it is None."""
        super().reset_classifier(num_classes, global_pool)
        if self.distillation and isinstance(self.head, nn.Linear):
            head = TwoClassifiers(self.head_hidden_size, num_classes, **get_device_dtype(self))
            head.both = self.distilled_training
            self.head = head.apply(self.init_module).train(self.training)

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both classifiers in training, as a pair, instead of their mean.

        Raises:
            ValueError: The model has no second classifier.
        """
        if enable and not isinstance(self.head, TwoClassifiers):
            raise ValueError("The model has one classifier or none; create it with distillation=True and num_classes.")
        self.distilled_training = enable
        if isinstance(self.head, TwoClassifiers):
            self.head.both = enable


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm1."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^patch_embed\.4\.", "stem.norm2."),
    (r"^network\.0\.", "stages.0.blocks."),
    (r"^network\.1\.", "stages.1.downsample."),
    (r"^network\.2\.", "stages.1.blocks."),
    (r"^network\.3\.", "stages.2.downsample."),
    (r"^network\.4\.", "stages.2.blocks."),
    (r"^network\.5\.", "stages.3.downsample."),
    (r"^network\.6\.", "stages.3.blocks."),
    (r"\.local_perception\.network\.0\.", ".local.conv1."),
    (r"\.local_perception\.network\.1\.", ".local.norm."),
    (r"\.local_perception\.network\.2\.", ".local.dw_conv."),
    (r"\.local_perception\.network\.4\.", ".local.conv2."),
    (r"\.oper_([qk])\.0\.block\.0\.", r".\1_gates.0.dw_conv."),
    (r"\.oper_([qk])\.0\.block\.1\.", r".\1_gates.0.norm."),
    (r"\.oper_([qk])\.0\.block\.3\.", r".\1_gates.0.pw_conv."),
    (r"\.oper_([qk])\.1\.block\.1\.", r".\1_gates.1.fc."),
    (r"\.dwc\.", ".dw_conv."),
    (r"^norm0\.", "output_norms.0."),  # of the detection and segmentation backbones
    (r"^norm2\.", "output_norms.1."),
    (r"^norm4\.", "output_norms.2."),
    (r"^norm6\.", "output_norms.3."),
    (r"^dist_head\.", "head.dist."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    A model with two classifiers loads a file with one into both, and then gives the logits of that one. A model with
    one classifier leaves out the second one of a file, as the official code does.
    """
    tensors = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP)
    for name in ("weight", "bias"):
        one, cls, dist = f"head.{name}", f"head.cls.{name}", f"head.dist.{name}"
        if model.distillation:
            if one in tensors:
                tensors[cls] = tensors.pop(one)
            if cls in tensors:
                tensors.setdefault(dist, tensors[cls].clone())
        else:
            tensors.pop(dist, None)
            if cls in tensors:
                tensors[one] = tensors.pop(cls)
    return checkpoints.convert(tensors, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs("casvit", first_conv="stem.conv1", classifier=("head.cls", "head.dist"))


def _create_casvit(variant: str, pretrained: bool, **kwargs) -> CASViT:
    return create(CASViT, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def casvit_xs(pretrained: bool = False, **kwargs) -> CASViT:
    """CAS-ViT-XS (3.2 M parameters, of which 0.2 M are the second classifier)."""
    return _create_casvit("casvit_xs", pretrained, **kwargs)


@register_model
def casvit_s(pretrained: bool = False, **kwargs) -> CASViT:
    """CAS-ViT-S (5.8 M)."""
    return _create_casvit("casvit_s", pretrained, **kwargs)


@register_model
def casvit_m(pretrained: bool = False, **kwargs) -> CASViT:
    """CAS-ViT-M (12.4 M)."""
    return _create_casvit("casvit_m", pretrained, **kwargs)


@register_model
def casvit_t(pretrained: bool = False, **kwargs) -> CASViT:
    """CAS-ViT-T (21.8 M)."""
    return _create_casvit("casvit_t", pretrained, **kwargs)


@register_model
def test_casvit(pretrained: bool = False, **kwargs) -> CASViT:
    """A CAS-ViT of 0.4 M parameters, for tests and small images."""
    return _create_casvit("test_casvit", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    module = AdditiveAttention(tokens.shape[-1]).eval()
    x = tokens.permute(0, 3, 1, 2)
    (everything,) = attended(module, place, x)
    module.q_gates[1] = module.k_gates[1] = nn.Identity()  # without the means
    (near,) = attended(module, place, x)
    return [Pattern("CAS-ViT", ("5 × 5 by convolutions,", "the map by its means"), (near, everything), (place,))]
