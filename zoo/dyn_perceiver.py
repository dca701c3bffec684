"""Dynamic Perceiver (Han et al., ICCV 2023, https://arxiv.org/abs/2306.11248).

A convolutional network, and beside it a branch of latents that read its map before each stage and write into it after
each stage. Four classifiers read the latents, the map or both. An easy image can leave at the first of them that is
certain enough, and does not pay for the rest: see `DynPerceiver.forward_exits`.

Official code, MIT: https://github.com/LeapLabTHU/Dynamic_Perceiver. Written from the facts of that code; the tests
compare outputs of dyn_perceiver_regnety_008. The blocks of the convolutional networks are timm's. Differences:
- `forward` gives the logits of the last exit. `set_exit_training` makes the model return those of all exits in
  training, as the official code always does.
- `forward_features` joins the map with what else the classifiers read, as constant channels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import (
    ConvNormAct,
    DropPath,
    SEModule,
    get_device_dtype,
    make_divisible,
    register_notrace_function,
    register_notrace_module,
)
from timm.models import checkpoint, register_model
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models.regnet import Bottleneck as RegNetBlock
from timm.models.resnet import Bottleneck as ResNetBlock
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Backbone, Stage, create
from zoo.cpu import channels_last, linear
from zoo.kernels import sizes
from zoo.layers import (
    DepthwiseConv,
    Mlp,
    TransformerBlock,
    check_images,
    dot_product_attention,
    plus_depthwise,
    pool_to_bins,
    stage_rates,
)

__all__ = ["DynPerceiver"]

# The three released models; their official names are reg800m_perceiver_t128, resnet50_0375_perceiver_t128 and
# mobilenetV3_0x75_perceiver_t128.
VARIANTS: dict[str, dict[str, Any]] = {
    "dyn_perceiver_regnety_008": {
        "cnn": "regnety",
        "stem_dim": 32,
        "embed_dims": (64, 144, 320, 784),
        "depths": (1, 3, 8, 2),
        "latent_depths": (3, 3, 9, 6),
    },
    "dyn_perceiver_resnet50_0375": {
        "cnn": "resnet",
        "stem_dim": 24,
        "embed_dims": (96, 192, 384, 768),
        "depths": (3, 4, 6, 3),
        "latent_depths": (3, 3, 9, 3),
    },
    "dyn_perceiver_mobilenetv3_large_075": {
        "cnn": "mobilenetv3",
        "stem_dim": 24,
        "embed_dims": (32, 64, 120, 720),
        "depths": (2, 3, 6, 3),
        "latent_depths": (3, 3, 9, 9),
        "hidden_dim": 960,
    },
    # our own, for tests and small images on a CPU
    "test_dyn_perceiver": {
        "cnn": "regnety",
        "stem_dim": 16,
        "embed_dims": (16, 32, 48, 64),
        "depths": (2, 2, 2, 2),
        "latent_depths": (1, 1, 1, 1),
        "num_latents": 32,
        "num_heads": (1, 1, 2, 2),
        "table_grid": 4,
    },
}

# The blocks of MobileNetV3-Large by stage, at width 0.75: kernel size, hidden channels, channels, squeeze and
# excitation, hard swish (otherwise ReLU), stride. The first two belong to the stem, and a 1 x 1 convolution ends the
# last stage.
MOBILENETV3_STEM = ((3, 16, 16, False, False, 1), (3, 48, 24, False, False, 2))
MOBILENETV3 = (
    ((3, 56, 24, False, False, 1), (5, 56, 32, True, False, 2)),
    ((5, 88, 32, True, False, 1), (5, 88, 32, True, False, 1), (3, 184, 64, False, True, 2)),
    (
        *((3, hidden, 64, False, True, 1) for hidden in (152, 136, 136)),
        (3, 360, 88, True, True, 1),
        (3, 504, 88, True, True, 1),
        (5, 504, 120, True, True, 2),
    ),
    ((5, 720, 120, True, True, 1), (5, 720, 120, True, True, 1)),
)


class State(NamedTuple):
    """What stages exchange. Extractors of timm that take the output of a module use the first entry."""

    map: Tensor  # (B, C, H, W)
    latents: Tensor  # (B, 1, M, C'), M latents as a map of one row
    early: Tensor | None = None  # (B, C'), the mean latents of the stage before the last, which the first exit reads
    plain: Tensor | None = None  # (B, C), the mean of the last map before latents are written into it

    @property
    def device(self) -> torch.device:
        """The device of the tensors, which timm's extractor with hooks asks for."""
        return self.map.device

    def take(self, images: Tensor | None) -> State:
        """The state of some images, given their indices; of all if None."""
        if images is None:
            return self
        chosen: Any = (None if value is None else value.index_select(0, images) for value in self)
        return State(*chosen)


class Attention(nn.Module):
    """Attention of tokens (B, H, W, dim) to a context (B, h, w, context_dim), or to themselves without one.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads.
        context_dim: Channels of the context, which gets a LayerNorm; None for self-attention.
        inner_dim: Channels of query, key and value; `dim` if None.
        positions: The number of position embeddings, which are added to the keys; 0 for none.
        device, dtype: Device and type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        context_dim: int | None = None,
        inner_dim: int | None = None,
        positions: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = dim if inner_dim is None else inner_dim
        self.num_heads = num_heads
        self.norm = nn.Identity() if context_dim is None else nn.LayerNorm(context_dim, eps=1e-5, **dd)
        self.q = nn.Linear(dim, inner, bias=False, **dd)
        self.k = nn.Linear(context_dim or dim, inner, bias=False, **dd)
        self.v = nn.Linear(context_dim or dim, inner, bias=False, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, inner, **dd)) if positions else None
        self.proj = nn.Linear(inner, dim, **dd)

    def reset_parameters(self) -> None:
        """Initialise the position embeddings."""
        if self.pos_embed is not None:
            nn.init.zeros_(self.pos_embed)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) and (B, h, w, context_dim) -> (B, H, W, dim)."""
        context = x if context is None else self.norm(context)
        query, key, value = linear(self.q, x), linear(self.k, context), linear(self.v, context)
        key = key.flatten(1, 2)
        if self.pos_embed is not None:
            key = key + self.pos_embed
        heads = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (query.flatten(1, 2), key, value.flatten(1, 2))
        )
        return linear(self.proj, dot_product_attention(*heads).unflatten(1, sizes(x)[1:3]))


class WritingAttention(Attention):
    """Attention of the tokens of a map to latents."""

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        return AttentionInfo(("all tokens, by latents",), values=self.v, spread=self.spread)

    def spread(self, weights: Tensor, size: tuple[int, int]) -> Tensor:
        """Weights of latents (..., 1, M) as weights of all tokens (..., H, W), from which each latent comes, alike."""
        share = weights.sum((-2, -1), keepdim=True) / (size[0] * size[1])
        return share.expand(*weights.shape[:-2], *size)


@register_notrace_module
class Read(nn.Module):
    """Latents (B, 1, M, dim) attend to a map (B, dim, H, W), pooled to grid x grid tokens: (B, 1, M, dim)."""

    def __init__(self, dim: int, grid: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grid = grid
        self.dw_conv = DepthwiseConv(dim, 7, **dd)
        attn = Attention(dim, context_dim=dim, positions=grid**2, **dd)
        self.block = TransformerBlock(dim, attn, Mlp(dim, dim, **dd), **dd)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        x = plus_depthwise(self.dw_conv, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        bins = (self.grid, self.grid)
        return self.block(latents, pool_to_bins(x, (bins, bins)).permute(0, 2, 3, 1))


@register_notrace_module
class LatentBlock(TransformerBlock):
    """Self-attention of latents and MLP: (B, 1, M, dim) -> (B, 1, M, dim)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, Attention(dim, num_heads, **dd), Mlp(dim, int(dim * mlp_ratio), **dd), **dd)


@register_notrace_module
class Widen(nn.Module):
    """Half as many latents with more channels: (B, 1, M, in_dim) -> (B, 1, M / 2, dim)."""

    def __init__(self, num_latents: int, in_dim: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mix_norm = nn.LayerNorm(num_latents, eps=1e-5, **dd)  # over the latents, channel by channel
        self.mix = nn.Linear(num_latents, num_latents // 2, **dd)
        self.expand_norm = nn.LayerNorm(in_dim, eps=1e-5, **dd)
        self.expand = nn.Linear(in_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.mix_norm(x.transpose(2, 3))).transpose(2, 3)
        return self.expand(self.expand_norm(x))


@register_notrace_module
class Write(nn.Module):
    """The tokens of a map (B, dim, H, W) attend to latents (B, 1, M, latent_dim): (B, dim, H, W)."""

    def __init__(self, dim: int, latent_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        attn = WritingAttention(dim, context_dim=latent_dim, inner_dim=max(1, dim // 8), **dd)
        self.block = TransformerBlock(dim, attn, Mlp(dim, dim, **dd), **dd)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        return self.block(x.permute(0, 2, 3, 1), latents).permute(0, 3, 1, 2)


class PerceiverStage(Stage):
    """Latents read the map, the convolutional network has its stage, latents are written into the map.

    Args:
        read: How latents read the map.
        latent_blocks: What follows on the latents.
        blocks: The stage of the convolutional network, NCHW.
        widen: Prepares the latents for the next stage; None in the last stage.
        write: How latents are written into the map.
        early: Whether the first exit reads the latents of this stage.
    """

    def __init__(
        self,
        read: Read,
        latent_blocks: Sequence[LatentBlock],
        blocks: Sequence[nn.Module],
        widen: Widen | None,
        write: Write,
        early: bool,
    ):
        super().__init__(blocks, channels_last=False)
        self.early, self.last = early, widen is None
        self.read = read
        self.latent_blocks = nn.ModuleList(latent_blocks)
        self.widen = nn.Identity() if widen is None else widen
        self.write = write

    def forward(self, x: Any) -> Any:
        """`State` -> `State`."""
        return self.write_latents(self.convolve(self.read_map(x)))

    def read_map(self, x: State) -> State:
        """Let the latents read the map, and process them."""
        latents = self.read(x.latents, x.map)
        for block in self.latent_blocks:
            latents = checkpoint(block, latents) if self.grad_checkpointing else block(latents)
        return State(x.map, latents, latents.mean((1, 2)) if self.early else x.early)

    def convolve(self, x: State) -> State:
        """Run the stage of the convolutional network."""
        map_ = self.forward_blocks(x.map)
        return State(map_, x.latents, x.early, map_.mean((2, 3)) if self.last else None)

    def write_latents(self, x: State) -> State:
        """Write the latents into the map, after they have got the number and channels of the next stage."""
        latents = self.widen(x.latents)
        return State(self.norm(self.write(x.map, latents)), latents, x.early, x.plain)

    @property
    def maps(self) -> nn.Module:
        """The module that the map passes last, for tools that need a module whose output is a map."""
        return self.norm


@register_notrace_module
class Stem(nn.Module):
    """The first layers of the convolutional network: images (B, in_chans, H, W) -> `State`.

    Attributes:
        latent: (num_latents, dim), the latents that every image begins with.
    """

    def __init__(self, layers: Sequence[nn.Module], num_latents: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.latent = nn.Parameter(torch.empty(num_latents, dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Initialise the latents."""
        nn.init.trunc_normal_(self.latent, std=0.02)

    def forward(self, x: Tensor) -> State:
        first: Any = self.layers[0]
        check_images(x, first.conv)
        # A copy, since a view of a parameter requires a gradient without autograd, too, on which FlopCounterMode fails.
        return State(self.layers(x), self.latent.repeat(x.shape[0], 1, 1, 1))


@register_notrace_module
class Exits(nn.Module):
    """The four classifiers: what they read (B, in_features) -> logits of the last one (B, out_features).

    Args:
        dims: The channels of what they read, in this order: mean latents of the stage before the last, mean latents of
            the last stage, mean of the last map before the latents are written into it, and after.
        num_classes: Classes.
        hidden_dim: Hidden channels of the classifiers that read the map; None for none.
        drop_rate: Dropout of these channels; without them, of what the third classifier reads.
        device, dtype: Device and type of the parameters.

    Attributes:
        all_exits: Whether the result in training is a tuple, the logits of all classifiers.
    """

    def __init__(
        self,
        dims: tuple[int, int, int, int],
        num_classes: int,
        hidden_dim: int | None = None,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        early, late, plain, written = self.dims = dims
        self.in_features, self.out_features = sum(dims), num_classes
        self.all_exits = False

        def feed() -> nn.Sequential:
            """What the logits of an exit tell the next one."""
            return nn.Sequential(nn.Linear(num_classes, late, **dd), nn.BatchNorm1d(late, **dd), nn.ReLU())

        def classifier(dim: int) -> list[nn.Module]:
            if hidden_dim is None:
                return [nn.Linear(dim, num_classes, **dd)]
            hidden = nn.Linear(dim, hidden_dim, **dd)
            return [hidden, nn.Hardswish(), nn.Dropout(drop_rate), nn.Linear(hidden_dim, num_classes, **dd)]

        self.early = nn.Linear(early, num_classes, **dd)
        self.early_feed = feed()
        self.late = nn.Linear(2 * late, num_classes, **dd)
        self.late_feed = feed()
        self.plain_drop = nn.Dropout(0.0 if hidden_dim else drop_rate)
        self.plain = nn.Sequential(*classifier(plain)) if hidden_dim else classifier(plain)[0]
        merged = 2 * late + written
        self.merged = nn.Sequential(nn.BatchNorm1d(merged, **dd), *classifier(merged))

    def forward(self, x: Tensor) -> Any:
        early, late, plain, written = x.split(self.dims, 1)
        first = self.early(early)
        second = self.second(late, first)
        last = self.last(written, late, second)
        if self.all_exits and self.training:
            return first, second, self.third(plain), last
        if torch.is_grad_enabled():
            # Distributed training waits for the gradients of all parameters, even if they are zero.
            last = last + 0 * self.third(plain)
        return last

    def second(self, late: Tensor, logits: Tensor) -> Tensor:
        """The logits of the second exit, given those of the first."""
        return self.late(torch.cat((late, self.early_feed(logits)), 1))

    def third(self, plain: Tensor) -> Tensor:
        """The logits of the third exit."""
        return self.plain(self.plain_drop(plain))

    def last(self, written: Tensor, late: Tensor, logits: Tensor) -> Tensor:
        """The logits of the last exit, given those of the second."""
        return self.merged(torch.cat((written, late, self.late_feed(logits)), 1))


def regnety(
    in_chans: int, stem_dim: int, embed_dims: Sequence[int], rates: Sequence[Sequence[float]], group_width: int, **dd
) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The layers of a stem with stride 2, and the blocks of stages with stride 2: those of RegNetY."""
    stages, dim = [], stem_dim
    for out_dim, drops in zip(embed_dims, rates, strict=True):
        blocks: list[nn.Module] = []
        for i, drop in enumerate(drops):
            settings: dict[str, Any] = {"group_size": group_width, "drop_path_rate": drop}
            blocks.append(RegNetBlock(dim if i == 0 else out_dim, out_dim, 1 if i else 2, **settings, **dd))
        stages.append(blocks)
        dim = out_dim
    return [ConvNormAct(in_chans, stem_dim, 3, 2, **dd)], stages


def resnet(
    in_chans: int, stem_dim: int, embed_dims: Sequence[int], rates: Sequence[Sequence[float]], **dd
) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The layers of a stem with stride 4, and the bottlenecks of stages, all but the first with stride 2: ResNet's."""
    stages, dim = [], stem_dim
    for number, (out_dim, drops) in enumerate(zip(embed_dims, rates, strict=True)):
        blocks: list[nn.Module] = []
        for i, drop in enumerate(drops):
            stride = 2 if number and i == 0 else 1
            shortcut = downsample_conv(dim, out_dim, 1, stride, **dd) if i == 0 else None
            path = DropPath(drop) if drop > 0 else None
            width = dim if i == 0 else out_dim
            blocks.append(ResNetBlock(width, out_dim // 4, stride, shortcut, drop_path=path, **dd))
        stages.append(blocks)
        dim = out_dim
    return [ConvNormAct(in_chans, stem_dim, 7, 2, **dd), nn.MaxPool2d(3, 2, 1)], stages


def mobilenetv3(in_chans: int, rates: Sequence[Sequence[float]], **dd) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The layers of a stem with stride 4, and the blocks of stages with strides 2, 2, 2, 1: MobileNetV3-Large x0.75."""
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    squeeze = partial(
        SqueezeExcite, rd_round_fn=make_divisible, force_act_layer=nn.ReLU, gate_layer=nn.Hardsigmoid, rd_ratio=0.25
    )
    dim = MOBILENETV3_STEM[0][2]

    def inverted(kernel: int, hidden: int, out: int, se: bool, swish: bool, stride: int, drop: float) -> nn.Module:
        nonlocal dim
        settings: dict[str, Any] = {
            "dw_kernel_size": kernel,
            "stride": stride,
            "act_layer": nn.Hardswish if swish else nn.ReLU,
            "norm_layer": norm_layer,
            "se_layer": squeeze if se else None,
            "drop_path_rate": drop,
            **dd,
        }
        width, dim = dim, out
        if hidden == width:
            return DepthwiseSeparableConv(width, out, **settings)
        return InvertedResidual(width, out, exp_ratio=hidden / width, **settings)

    conv = {"norm_layer": norm_layer, "act_layer": nn.Hardswish, **dd}
    stem = [ConvNormAct(in_chans, dim, 3, 2, **conv), *(inverted(*block, 0.0) for block in MOBILENETV3_STEM)]
    stages = [
        [inverted(*block, drop) for block, drop in zip(blocks, drops, strict=False)]
        for blocks, drops in zip(MOBILENETV3, rates, strict=True)
    ]
    stages[-1].append(ConvNormAct(dim, 6 * dim, 1, **conv))
    return stem, stages


class DynPerceiver(Backbone):
    """Dynamic Perceiver: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW at strides 4, 8, 16, 32 (8, 16, 32, 32 with "mobilenetv3"; sizes rounded up): the maps after the
    latents have been written into them. Stages exchange a `State`, the map with the latents.

    What `forward_features` returns, (B, num_features, H', W'), has besides the channels of the last map those of the
    latents and of the map before the latents were written into it, each as its mean, the same for all pixels: what the
    classifiers read, in the order of `exit_dims`.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the classifiers; 0 for none.
        global_pool: "avg" for the means; "ep" for efficient probing (`zoo.efficient_probing`), with one classifier and
            no exits; or "" for none: without a classifier, the model then returns a map.
        cnn: The convolutional network: "regnety", "resnet" or "mobilenetv3".
        stem_dim: Channels of its stem, and of the first latents.
        embed_dims, depths: Channels of the map after each stage, and its blocks. MobileNetV3-Large exists at one width:
            (32, 64, 120, 720) and (2, 3, 6, 3), with a `stem_dim` of 24.
        group_width: Channels of the groups in the convolutions of RegNetY.
        num_latents: Latents of the first stage. Each further stage has half as many as the one before.
        latent_depths, num_heads: Blocks of self-attention on the latents of each stage, and their heads.
        mlp_ratio: Hidden channels of their MLPs, as a multiple of the channels.
        table_grid: Side, in tokens, of the pooled map that latents read.
        hidden_dim: Hidden channels of the classifiers that read the map; None for linear classifiers.
        drop_rate: As in the official code, dropout of these hidden channels or, without them, of what the third exit
            reads. With global_pool="ep", of what its classifier reads.
        drop_path_rate: Stochastic depth rate of the network's last block. It grows linearly from 0 at the first block.
        device, dtype: Device and type of the parameters.

    Raises:
        ValueError: An argument is out of range, or images have a wrong shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        cnn: str = "regnety",
        stem_dim: int = 32,
        embed_dims: Sequence[int] = (64, 144, 320, 784),
        depths: Sequence[int] = (1, 3, 8, 2),
        group_width: int = 16,
        num_latents: int = 128,
        latent_depths: Sequence[int] = (3, 3, 9, 6),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4.0,
        table_grid: int = 7,
        hidden_dim: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            stem_dim=stem_dim,
            mlp_ratio=mlp_ratio,
            table_grid=table_grid,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        arguments.check(group_width=group_width, num_latents=num_latents, hidden_dim=hidden_dim)
        arguments.check_choice("cnn", cnn, ("regnety", "resnet", "mobilenetv3"))
        arguments.check_stages(embed_dims=embed_dims, depths=depths, latent_depths=latent_depths)
        if not arguments.is_list(num_heads) or not all(arguments.is_number(heads, 1, 2**14) for heads in num_heads):
            raise ValueError(
                f"Got num_heads={arguments.shown(num_heads)}; give a list of whole numbers, one per stage."
            )
        _check_fit(cnn, stem_dim, embed_dims, depths, group_width, num_latents, num_heads, mlp_ratio)
        dd = {"device": device, "dtype": dtype}
        rates = stage_rates(drop_path_rate, depths)
        if cnn == "regnety":
            stem, cnn_stages = regnety(in_chans, stem_dim, embed_dims, rates, group_width, **dd)
        elif cnn == "resnet":
            stem, cnn_stages = resnet(in_chans, stem_dim, embed_dims, rates, **dd)
        else:
            stem, cnn_stages = mobilenetv3(in_chans, rates, **dd)
        count, latent_dims = len(embed_dims), (stem_dim, *embed_dims[:-1])
        stages = []
        for i, (dim, blocks) in enumerate(zip(latent_dims, cnn_stages, strict=True)):
            latents, next_dim = num_latents // 2**i, latent_dims[min(i + 1, count - 1)]
            stages.append(
                PerceiverStage(
                    Read(dim, table_grid, **dd),
                    [LatentBlock(dim, num_heads[i], mlp_ratio, **dd) for _ in range(latent_depths[i])],
                    blocks,
                    Widen(latents, dim, next_dim, **dd) if i < count - 1 else None,
                    Write(embed_dims[i], next_dim, **dd),
                    early=i == count - 2,
                )
            )
        self.exit_dims = (latent_dims[-2], latent_dims[-1], embed_dims[-1], embed_dims[-1])
        self.exit_training = False
        self.cnn, self.hidden_dim, self.drop_rate = cnn, hidden_dim, drop_rate
        super().__init__(
            Stem(stem, num_latents, stem_dim, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            strides=[(8, 16, 32, 32)[i] if cnn == "mobilenetv3" else 4 * 2**i for i in range(count)],
            num_features=sum(self.exit_dims),
        )

    def init_module(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself has.

        As in the official code: the convolutional networks by their fan-out, the last batch norm of each bottleneck of
        ResNet with zeros, and the latent branch and the classifiers as PyTorch does. The third classifier after RegNetY
        is torchvision's, and the biases of RegNetY's squeeze and excitation are PyTorch's.
        """
        if type(module) is nn.Conv2d:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ResNetBlock):
            module.zero_init_last()
        elif isinstance(module, SEModule):  # RegNetY's; its convolutions are initialised before it
            for conv in (module.fc1, module.fc2):
                if conv.bias is not None:
                    nn.init.uniform_(conv.bias, -(conv.in_channels**-0.5), conv.in_channels**-0.5)
        elif isinstance(module, Exits) and self.cnn == "regnety" and isinstance(module.plain, nn.Linear):
            nn.init.normal_(module.plain.weight, std=0.01)
            nn.init.zeros_(module.plain.bias)
        elif (reset_parameters := getattr(module, "reset_parameters", None)) is not None:
            reset_parameters()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace all classifiers with new ones (none if `num_classes` is 0), and the pooling unless it is None."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self._has_exits() and not arguments.is_ep(self.global_pool):
            dd = get_device_dtype(self)
            head = Exits(self.exit_dims, num_classes, self.hidden_dim, self.drop_rate, **dd)
            head.all_exits = self.exit_training
            self.head = head.apply(self.init_module).train(self.training)
        # The exits have a dropout of their own.
        self.head_drop.p = 0.0 if isinstance(self.head, Exits) else self.drop_rate

    def _has_exits(self) -> bool:
        """Whether all stages are there; pruning removes the last ones, and with them what the classifiers read."""
        return self.num_features == sum(self.exit_dims)

    @property
    def num_exits(self) -> int:
        """The number of exits: 4, or 1 for a model without their classifiers."""
        return 4 if isinstance(self.head, Exits) and self.global_pool == "avg" else 1

    @torch.jit.ignore
    def set_exit_training(self, enable: bool = True) -> None:
        """Return the logits of all exits in training, as a tuple from the first to the last, instead of the last ones.

        Raises:
            ValueError: The model has no classifiers.
        """
        if enable:
            self._check_exits()
        self.exit_training = enable
        if isinstance(self.head, Exits):
            self.head.all_exits = enable

    def _check_exits(self) -> None:
        """Raise ValueError unless the model has its classifiers."""
        if self.num_exits == 1:
            raise ValueError(
                f"A model with {self.num_classes} classes and global_pool={self.global_pool!r} has no exits: create it "
                "with num_classes and global_pool='avg'."
            )

    def feature(self, x: Any) -> Tensor:
        """The map (B, C, H, W) in what a stage returns."""
        return x.map

    def final_norm(self, x: Any) -> Tensor:
        """What the classifiers read, as a map (B, num_features, H, W); only the map of a model that was pruned."""
        return joined(x) if self._has_exits() else x.map

    def forward_exits(self, x: Tensor) -> Generator[Tensor, Tensor | None, None]:
        """Yield the logits of each exit, from the first to the last; nothing is computed before it is asked for.

        The exits read: the latents of the stage before the last; those of the last stage; the map; all of these.
        Sending the indices of some images, int64, continues with these only, in their order:

            exits = model.forward_exits(images)
            logits = next(exits)  # (B, num_classes)
            unsure = (logits.softmax(1).amax(1) < 0.9).nonzero()[:, 0]
            logits = exits.send(unsure)  # (len(unsure), num_classes)

        Args:
            x: Images (B, in_chans, H, W).

        Raises:
            ValueError: The model has no classifiers, or images have a wrong shape.
        """
        self._check_exits()
        head: Any = self.head
        every: Any = self.stages
        *stages, before, last = every
        state = self.stem(channels_last(x))
        for stage in stages:
            state = stage(state)
        state = before.read_map(state)
        logits = head.early(state.early)
        kept = yield logits
        state, logits = state.take(kept), logits if kept is None else logits[kept]

        state = last.read_map(before.write_latents(before.convolve(state)))
        late = state.latents.mean((1, 2))
        logits = head.second(late, logits)
        kept = yield logits
        if kept is not None:
            state, logits, late = state.take(kept), logits[kept], late[kept]

        state = last.convolve(state)
        kept = yield head.third(state.plain)
        if kept is not None:
            state, logits, late = state.take(kept), logits[kept], late[kept]

        yield head.last(last.write_latents(state).map.mean((2, 3)), late, logits)


@register_notrace_function
def joined(x: State) -> Tensor:
    """What the classifiers read, as a map (B, C, H, W), of means except for the last map itself."""
    height, width = sizes(x.map)[2:]
    means = torch.cat((x.early, x.latents.mean((1, 2)), x.plain), 1)  # type: ignore[arg-type]
    return torch.cat((means[:, :, None, None].expand(-1, -1, height, width), x.map), 1)


def _check_fit(
    cnn: str,
    stem_dim: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    group_width: int,
    num_latents: int,
    num_heads: Sequence[int],
    mlp_ratio: float,
) -> None:
    """Raise ValueError unless the sizes fit each other."""
    count = len(embed_dims)
    if count < 2:
        raise ValueError(f"Got {embed_dims=}; the exits need two stages or more.")
    if cnn == "mobilenetv3" and (stem_dim, *embed_dims, *depths) != (24, 32, 64, 120, 720, 2, 3, 6, 3):
        raise ValueError(
            f"Got {stem_dim=}, {embed_dims=}, {depths=}; cnn='mobilenetv3' has stem_dim=24, "
            "embed_dims=(32, 64, 120, 720), depths=(2, 3, 6, 3)."
        )
    for name, divisor in (("regnety", group_width), ("resnet", 4)):
        if cnn == name and any(dim % divisor for dim in embed_dims):
            what = f"{group_width=}" if cnn == "regnety" else "4"
            raise ValueError(f"Got {embed_dims=}; with cnn={cnn!r}, they have to be multiples of {what}.")
    if num_latents % 2 ** (count - 1):
        raise ValueError(
            f"Got {num_latents=}; it has to be a multiple of {2 ** (count - 1)}, since each of {count} stages has half "
            "as many as the one before."
        )
    latent_dims = (stem_dim, *embed_dims[:-1])
    if len(num_heads) != count or any(dim % heads for dim, heads in zip(latent_dims, num_heads, strict=True)):
        raise ValueError(
            f"Got num_heads={arguments.shown(num_heads)} for latents of {', '.join(map(str, latent_dims))} channels; "
            "give a divisor of the channels for each stage."
        )
    if int(min(latent_dims) * mlp_ratio) < 1:
        raise ValueError(
            f"Got {mlp_ratio=} for {min(latent_dims)} channels, which leaves no hidden channels: raise it."
        )


# Official names -> ours; see zoo.key_maps. Our own names match no pattern.
KEY_MAP = [
    (r"^latent$", "stem.latent"),
    (r"^cnn_stem\.(?:0\.)?0\.weight$", "stem.layers.0.conv.weight"),
    (r"^cnn_stem\.(?:0\.)?1\.(\w+)$", r"stem.layers.0.bn.\1"),
    # MobileNetV3, whose second block has no expansion
    (r"^cnn_stem\.1\.block\.0\.0\.", "stem.layers.1.conv_dw."),
    (r"^cnn_stem\.1\.block\.0\.1\.", "stem.layers.1.bn1."),
    (r"^cnn_stem\.1\.block\.1\.0\.", "stem.layers.1.conv_pw."),
    (r"^cnn_stem\.1\.block\.1\.1\.", "stem.layers.1.bn2."),
    (r"^cnn_stem\.2\.block\.", "stem.layers.2.block."),
    (r"^cnn_body_stage4\.2\.0\.", "stages.3.blocks.2.conv."),
    (r"^cnn_body_stage4\.2\.1\.", "stages.3.blocks.2.bn."),
    *((rf"^cnn_body_stage{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.block\.0\.0\.", ".conv_pw."),
    (r"\.block\.0\.1\.", ".bn1."),
    (r"\.block\.1\.0\.", ".conv_dw."),
    (r"\.block\.1\.1\.", ".bn2."),
    (r"\.block\.2\.fc1\.", ".se.conv_reduce."),
    (r"\.block\.2\.fc2\.", ".se.conv_expand."),
    (r"\.block\.[23]\.0\.", ".conv_pwl."),
    (r"\.block\.[23]\.1\.", ".bn3."),
    # RegNetY
    *((rf"^cnn_body\.block{i + 1}\.block{i + 1}-(\d+)\.", rf"stages.{i}.blocks.\1.") for i in range(4)),
    (r"\.proj\.0\.weight$", ".downsample.conv.weight"),
    (r"\.proj\.1\.(\w+)$", r".downsample.bn.\1"),
    *((rf"\.f\.{part}\.0\.", f".conv{i}.conv.") for i, part in enumerate("abc", 1)),
    *((rf"\.f\.{part}\.1\.", f".conv{i}.bn.") for i, part in enumerate("abc", 1)),
    (r"\.f\.se\.", ".se."),
    # the latent branch
    *((rf"^dwc{i + 1}_x2z\.", f"stages.{i}.read.dw_conv.") for i in range(4)),
    *((rf"^cross_att{i + 1}_x2z\.", f"stages.{i}.read.block.") for i in range(4)),
    *((rf"^self_att{i + 1}\.", f"stages.{i}.latent_blocks.") for i in range(4)),
    *((rf"^cross_att{i + 2}_z2x\.", f"stages.{i}.write.block.") for i in range(3)),
    (r"^last_cross_att_z2x\.", "stages.3.write.block."),
    *((rf"^token_mixer\.{i}\.0\.", f"stages.{i}.widen.mix_norm.") for i in range(3)),
    *((rf"^token_mixer\.{i}\.1\.", f"stages.{i}.widen.mix.") for i in range(3)),
    *((rf"^token_expander\.{i}\.0\.", f"stages.{i}.widen.expand_norm.") for i in range(3)),
    *((rf"^token_expander\.{i}\.1\.", f"stages.{i}.widen.expand.") for i in range(3)),
    (r"\.cross_attn\.q_norm\.", ".norm1."),
    (r"\.cross_attn\.kv_norm\.", ".attn.norm."),
    (r"\.self_attn\.norm\.", ".norm1."),
    (r"\.(?:cross|self)_attn\.attention\.", ".attn."),
    (r"\.attn\.relative_position_bias$", ".attn.pos_embed"),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.layernorm\.", ".norm2."),
    # the classifiers
    (r"^early_classifier3\.", "head.early."),
    (r"^isc3\.", "head.early_feed."),
    (r"^classifier_att\.", "head.late."),
    (r"^isc4\.", "head.late_feed."),
    (r"^classifier_cnn\.", "head.plain."),
    (r"^classifier_merge\.", "head.merged."),
]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`."""
    return checkpoints.convert(state_dict, model, KEY_MAP)


default_cfgs = checkpoints.default_cfgs(
    "dyn_perceiver", first_conv="stem.layers.0.conv", classifier=("head.early", "head.late")
)


def _create_dyn_perceiver(variant: str, pretrained: bool, **kwargs) -> DynPerceiver:
    return create(DynPerceiver, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def dyn_perceiver_regnety_008(pretrained: bool = False, **kwargs) -> DynPerceiver:
    """Dynamic Perceiver on RegNetY-800MF (21.8 M parameters)."""
    return _create_dyn_perceiver("dyn_perceiver_regnety_008", pretrained, **kwargs)


@register_model
def dyn_perceiver_resnet50_0375(pretrained: bool = False, **kwargs) -> DynPerceiver:
    """Dynamic Perceiver on ResNet-50 with 0.375 times its channels (20.3 M)."""
    return _create_dyn_perceiver("dyn_perceiver_resnet50_0375", pretrained, **kwargs)


@register_model
def dyn_perceiver_mobilenetv3_large_075(pretrained: bool = False, **kwargs) -> DynPerceiver:
    """Dynamic Perceiver on MobileNetV3-Large with 0.75 times its channels (9.3 M)."""
    return _create_dyn_perceiver("dyn_perceiver_mobilenetv3_large_075", pretrained, **kwargs)


@register_model
def test_dyn_perceiver(pretrained: bool = False, **kwargs) -> DynPerceiver:
    """A Dynamic Perceiver of 0.6 M parameters, for tests and small images."""
    return _create_dyn_perceiver("test_dyn_perceiver", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    dim = tokens.shape[-1]
    module = WritingAttention(dim, context_dim=dim).eval()
    (everything,) = attended(module, place, tokens, tokens[:, :1])
    return [Pattern("Perceiver", ("all tokens,", "by way of latents"), (everything,), (place,))]
