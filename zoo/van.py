"""VAN: Visual Attention Network (Guo et al., CVMJ 2023, https://arxiv.org/abs/2202.09741).

A convolutional pyramid whose attention is a gate: large-kernel attention (LKA) multiplies the features by a 21 x 21
depth-wise convolution of themselves, decomposed into a 5 x 5, a dilated 7 x 7 and a 1 x 1 convolution.

Official code, Apache-2.0: https://github.com/Visual-Attention-Network/VAN-Classification and VAN-Segmentation. Written
from the paper and the facts of that code; the tests compare outputs of van_b0. What differs:
- One class serves classification and dense prediction. In both, the LayerNorm that ends a stage is part of the trunk:
  the next stage, and whoever asks for features, gets its output. The official segmentation code has `norm_eps=1e-5`.
- Features stay NCHW between the blocks, which are convolutions and batch norm throughout.
- Modules have the paper's names; `KEY_MAP` translates official checkpoints.
- `drop_rate` is dropout before the classifier, as everywhere in timm; the official one is `proj_drop_rate` here.
"""

import math
from collections.abc import Sequence

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo import checkpoints

__all__ = ["VAN"]

# The paper's variants (b4 to b6: its version of July 2022). The stage-3 width of b6 does break the pattern.
VARIANTS = {
    "van_b0": {"embed_dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2)},
    "van_b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2)},
    "van_b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3)},
    "van_b3": {"embed_dims": (64, 128, 320, 512), "depths": (3, 5, 27, 3)},
    "van_b4": {"embed_dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3)},
    "van_b5": {"embed_dims": (96, 192, 480, 768), "depths": (3, 3, 24, 3)},
    "van_b6": {"embed_dims": (96, 192, 384, 768), "depths": (6, 6, 90, 6)},
    # ours, for tests and for small images on a CPU
    "test_van": {"embed_dims": (16, 32, 64, 96), "depths": (2, 2, 2, 2)},
}


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:
    """Raise ValueError unless `x` is (B, in_chans, H, W) with at least 32 pixels a side."""
    # A traced graph shall not fix the sizes, and Dynamo cannot raise; eager code alone reaches the user's mistakes.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"Got images of shape {tuple(x.shape)}; expected (batch, {in_chans}, height, width).")
    if min(x.shape[2:]) < 32:
        raise ValueError(f"Got images of {x.shape[2]} x {x.shape[3]} pixels; enlarge or pad them to 32 x 32 at least.")


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and batch norm. (B, C, H, W) -> (B, dim, ceil(H/s), ceil(W/s))."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Stem(PatchEmbed):
    """The first patch embedding, 7 x 7 with stride 4: every way into the model leads through it, so it checks input."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__(in_chans, dim, kernel_size=7, stride=4, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.proj.in_channels)
        return super().forward(x)


class LargeKernelAttention(nn.Module):
    """x * Conv1x1(DWConv7x7, dilation 3 (DWConv5x5(x))): a 21 x 21 receptive field as a gate, without a sigmoid."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dw_conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.dw_dilated_conv = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim, **dd)
        self.pw_conv = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pw_conv(self.dw_dilated_conv(self.dw_conv(x)))


class Attention(nn.Module):
    """LKA between two 1 x 1 convolutions, with a shortcut of its own."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj_in = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.lka = LargeKernelAttention(dim, **dd)
        self.proj_out = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut adds the block's normalised input: layer scale and drop path act on it as well.
        return x + self.proj_out(self.lka(self.act(self.proj_in(x))))


class Mlp(nn.Module):
    """1 x 1 convolution, depth-wise 3 x 3 convolution, GELU, 1 x 1 convolution."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dw_conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.dw_conv(self.fc1(x))))
        return self.drop2(self.fc2(x))


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


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm over channels."""

    def __init__(self, patch_embed: PatchEmbed, blocks: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.norm(x)


class VAN(nn.Module):
    """Visual Attention Network: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (sizes rounded up), each after its stage's LayerNorm.

    Args:
        in_chans: channels of the images.
        num_classes: classes of the linear classifier; 0 for none.
        global_pool: "avg", or "" for none: the model then returns its last feature map, and has no classifier.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        mlp_ratios: hidden channels of each stage's MLPs, as multiples of `embed_dims`.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        norm_eps: of the LayerNorm that ends each stage; 1e-5 in the official segmentation code.
        layer_scale_init: initial value of the layer scales.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument, or the shape of the images, is out of range.
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
        super().__init__()
        if not len(embed_dims) == len(depths) == len(mlp_ratios) > 0:
            raise ValueError(
                f"Got {len(embed_dims)} {embed_dims=}, {len(depths)} {depths=} and {len(mlp_ratios)} {mlp_ratios=}; "
                "give each of them one value per stage."
            )
        if min(*embed_dims, *depths) < 1:
            raise ValueError(f"Got {embed_dims=} and {depths=}; every stage needs at least one channel and one block.")
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = []

        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, depth, mlp_ratio) in enumerate(zip(embed_dims, depths, mlp_ratios, strict=True)):
            if i == 0:
                patch_embed = Stem(in_chans, dim, **dd)
            else:
                patch_embed = PatchEmbed(embed_dims[i - 1], dim, kernel_size=3, stride=2, **dd)
            blocks = [
                Block(dim, mlp_ratio, proj_drop_rate, next(drop_path_rates), layer_scale_init, **dd)
                for _ in range(depth)
            ]
            stages.append(Stage(patch_embed, blocks, LayerNorm2d(dim, eps=norm_eps, **dd)))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter and buffer, as the official code does."""
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """None by name: layer scales, norms and biases are vectors, which timm leaves undecayed anyway."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Timm's parameter groups, for layer-wise decay: a group per block, or per stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),  # timm's mark for: with the group before
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute blocks in backward. Batch norm then updates its statistics twice a step."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity without one."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (none if `num_classes` is 0), and the pooling unless it is None."""
        if num_classes < 0:
            raise ValueError(f"Got {num_classes=}; it must be at least 0, which means no classifier.")
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"Got {global_pool=}; VAN has 'avg', or '' for no pooling.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.apply(_init_weights).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages, with the last one's unless `intermediates_only`.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to take; the last n if an int, all if None.
            norm: no effect; stage outputs are normalised either way.
            stop_early: stop after the last chosen stage.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Got {output_fmt=}; VAN has 'NCHW': permute its features instead.")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and with any of them, or with `prune_head`, the classifier.

        `prune_norm` has no effect: there is no norm outside the stages. Returns the absolute indices.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, ceil(H/32), ceil(W/32))."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, and classify unless `pre_logits`: (B, num_features, H, W) -> (B, num_classes or num_features)."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        elif self.num_classes > 0 and not pre_logits:
            raise ValueError(
                f"A classifier of {self.num_classes} classes needs pooled features: use global_pool='avg', "
                "or num_classes=0 for feature maps."
            )
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, Block):
        nn.init.constant_(module.layer_scale1, module.layer_scale_init)
        nn.init.constant_(module.layer_scale2, module.layer_scale_init)


# Official names -> ours; see zoo.checkpoints.remap. Names that are already ours match no pattern.
KEY_MAP = [
    (r"^patch_embed1\.", "stages.0.patch_embed."),
    (r"^patch_embed2\.", "stages.1.patch_embed."),
    (r"^patch_embed3\.", "stages.2.patch_embed."),
    (r"^patch_embed4\.", "stages.3.patch_embed."),
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
    """An official checkpoint, or one of ours, as a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


def _cfg(**facts) -> dict:
    return {"pool_size": (7, 7), "first_conv": "stages.0.patch_embed.proj", "classifier": "head"} | facts


default_cfgs = generate_default_cfgs(
    {name: _cfg(**facts) for name, facts in checkpoints.pretrained_cfgs("van").items()}
    | {"test_van": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)}
)


def _create_van(variant: str, pretrained: bool, **kwargs) -> VAN:
    return build_model_with_cfg(
        VAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **checkpoints.settle_num_classes(variant, pretrained, VARIANTS[variant] | kwargs),
    )


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
