"""iLLaMA: LLaMA's decoder as a vision transformer (Wang et al., 2024, https://arxiv.org/abs/2404.06773).

An isotropic model, like ViT, of the parts of a language model: RMSNorm, SwiGLU, rotary positions along the sequence of
the patches, and causal attention, in which a patch reads itself and those before it. The class token is the last of the
sequence, so it reads all of them. The mask is applied after the softmax: weights of later tokens are dropped, and the
others are not normalized again.

Official code, without a licence: https://github.com/techmonsterwang/iLLaMA. Written from the paper and facts about that
code; the tests compare outputs of illama_tiny. Differences:
- Images of any size from 32 pixels up. The position embeddings of the patches are resized in every call, as the
  official code resizes those of a file once.
- Blocks are divided into four stages. Features are the residual stream after each, without the class token. Weights
  load into a model whose stages divide the blocks in another way.
- Without a class token (`class_token=False`), the classifier reads the mean of the tokens.
- In float64, nothing is rounded to float32.
- The soft mask, which changes in training, depends on the epoch that `set_epoch` is told; see `ILLaMA`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from zoo import arguments, checkpoints
from zoo.attention_maps import AttentionInfo, Pattern, attended
from zoo.backbone import Stage, create
from zoo.cpu import by_image, convolution, linear
from zoo.kernels import sizes
from zoo.kernels.constants import constant
from zoo.layers import GatedMlp, RmsBlock, RmsNorm2d, check_images, position_map, resize_positions, stage_rates
from zoo.sequences import (
    SequenceBackbone,
    SequenceStage,
    Tokens,
    check_pyramid,
    pyramid_layers,
    split_positions,
)

__all__ = ["ILLaMA"]


def _network(dim: int, num_heads: int, depth: int = 12, **settings) -> dict[str, Any]:
    return {"embed_dims": (dim,) * 4, "depths": (depth // 4,) * 4, "num_heads": (num_heads,) * 4, **settings}


# The variants of the official code. Those for 384 pixels have more position embeddings.
VARIANTS: dict[str, dict[str, Any]] = {
    "illama_tiny": _network(192, 3),
    "illama_small": _network(384, 6),
    "illama_base": _network(768, 12),
    "illama_base_384": _network(768, 12, img_size=384),
    "illama_large": _network(1024, 16, 24),
    "illama_large_384": _network(1024, 16, 24, img_size=384),
    # our own, for tests and small images on a CPU; without a class token
    "test_illama": _network(48, 3, 8, img_size=64, class_token=False),
}

ROWS = 512  # queries at a time: weights of tokens x tokens would take gigabytes for large images
SOFT_MASKS = ("constant", "linear")
BLOCK = "stages.{}.blocks.{}."  # where the parameters of a block are


def rotation(count: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The cosines and sines by which the tokens of a sequence are rotated: (2, T, D / 2)."""
    frequencies = 10000 ** (torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / -head_dim)
    angles = torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


@register_notrace_module
class CausalAttention(nn.Module):
    """Attention of tokens (B, H, W, dim), row by row, to themselves and to those before them, after a full softmax.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads, each with an even number of channels.
        soft: Whether training adds the weights of later tokens, times `soft_mask`.
        class_token: Whether the tokens are a sequence with a class token, (B, 1, H W + 1, dim).
        device, dtype: Device and type of the parameters.

    Attributes:
        soft_mask: (), from 1, attention to all tokens, to 0, causal attention. It is not saved with the weights.
    """

    soft_mask: Tensor

    def __init__(
        self, dim: int, num_heads: int, soft: bool = False, class_token: bool = False, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.soft, self.class_token = soft, class_token
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.register_buffer("soft_mask", torch.zeros((), device=device), persistent=False)

    def reset_parameters(self) -> None:
        """Initialise the mask: causal."""
        self.soft_mask.zero_()

    def attention_info(self) -> AttentionInfo:
        """What the module attends to; see `zoo.attention_maps`."""
        place = "last" if self.class_token else ""
        return AttentionInfo(("tokens before it",), values=self.qkv, signed=True, class_token=place)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        _, height, width, dim = sizes(x)
        weights = self.num_heads * min(height * width, ROWS) if isinstance(height * width, int) else 0
        return by_image(self, self.forward_images, x, 3 + weights / dim)

    def forward_images(self, x: Tensor) -> Tensor:
        """The same, for images that need not be all of the batch."""
        _, height, width, dim = sizes(x)
        heads = linear(self.qkv, x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads[0], heads[1], heads[2]  # (B, N, T, D)
        turns = constant(
            rotation, height * width, dim // self.num_heads, torch.promote_types(x.dtype, torch.float32), like=x
        )
        out = self.attend(rotated(query * query.shape[-1] ** -0.5, turns), rotated(key, turns), value)
        return linear(self.proj, out.transpose(1, 2).flatten(2).unflatten(1, (height, width)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of scaled queries to keys and values, all (B, N, T, D)."""
        count = sizes(query)[2]
        if self.training and self.soft:
            weights = (query @ key.mT).softmax(-1)
            later = self.soft_mask.to(weights.dtype) * weights.triu(1)
            return (weights.tril() + later).to(value.dtype) @ value
        if not isinstance(count, int):  # symbolic, in torch.export
            return (query @ key.mT).softmax(-1).tril().to(value.dtype) @ value
        parts = []
        for start in range(0, count, ROWS):
            end = min(start + ROWS, count)
            weights = (query[:, :, start:end] @ key.mT).softmax(-1)[..., :end].tril(start)
            parts.append(weights.to(value.dtype) @ value[:, :, :end])
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Heads (B, N, T, D), in which pairs of adjacent channels are turned by the angles of `rotation`.

    The first channels of all pairs come before the second ones. Products of queries and keys do not see the order.
    """
    first, second = x.to(turns.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns[0], turns[1]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


@register_notrace_module
class Stem(nn.Module):
    """Patches of an image plus position embeddings: (B, C, H, W) -> (B, dim, h, w), or `Tokens` with a class token.

    h = H // patch_size, w alike; pixels at the bottom and the right that fill no patch are left out.

    Attributes:
        pos_embed: (1, N, dim), for the tokens of a square map, row by row, and then for the class token.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, side: int, class_token: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, side**2 + class_token, dim, **dd))

    def reset_parameters(self) -> None:
        """Initialise the class token and the position embeddings."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Any:
        check_images(x, self.proj)
        x = convolution(self.proj, x)
        if self.cls_token is None:
            return x + position_map(self.pos_embed, sizes(x)[2:])
        table, last = split_positions(self.pos_embed, "last")
        x = x + position_map(table, sizes(x)[2:])
        return Tokens(x, (self.cls_token + last).expand(x.shape[0], -1, -1))


class ILLaMA(SequenceBackbone):
    """iLLaMA: images (B, in_chans, H, W), any size from 32 pixels up, to logits (B, num_classes).

    Features are NCHW, all at stride `patch_size`: the residual stream after each stage, without the class token. With
    `pyramid`, layers follow that make their strides 4, 8, 16, 32.

    With a class token, stages return a pair, the map and the class token, and `forward_features` returns a sequence
    (B, H W + 1, C), the class token last.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes of the linear classifier; 0 for none.
        global_pool: "avg" for the class token, or the mean of all tokens in a model without one; "ep" for efficient
            probing of the patches; "" for neither.
        embed_dims, depths, num_heads: Channels, blocks and heads of each stage. All stages have the same channels.
        patch_size: The side of a patch, in pixels.
        img_size: Side of the square images, in pixels, that the position embeddings are made for; or both sides, if
            they are equal. Images may have any other size: the embeddings of the patches are resized (bicubic).
        class_token: Whether there is a class token. Its value reaches no patch, but the softmax has its weight.
        pyramid: Whether the four features get the strides 4, 8, 16 and 32 by layers of their own (for a `patch_size` of
            16), for dense prediction. Only without a classifier. There is no final norm then.
        soft_mask: How attention becomes causal in training. It is the mean of attention to all tokens and of causal
            attention, with weights a and 1 - a. "constant" keeps a at 1 for the first epochs, and "linear" lowers it
            from 1 to 0 over them. Then, and in evaluation, a is 0.
        soft_mask_epochs: The number of these epochs; 0 for causal attention from the start. What trains the model has
            to call `set_epoch` before each update, as `zoo-train` does for classifiers.
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
        depths: Sequence[int] = (3,) * 4,
        num_heads: Sequence[int] = (3,) * 4,
        patch_size: int = 16,
        img_size: int | Sequence[int] = 224,
        class_token: bool = True,
        pyramid: bool = False,
        soft_mask: str = "linear",
        soft_mask_epochs: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        img_size = arguments.square(img_size)
        arguments.check(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        if not arguments.is_number(patch_size, 1, 32):
            raise ValueError(f"Got patch_size={arguments.shown(patch_size)}; it has to be a whole number from 1 to 32.")
        arguments.check_choice("class_token", class_token, (True, False))
        arguments.check_choice("pyramid", pyramid, (True, False))
        arguments.check_choice("soft_mask", soft_mask, SOFT_MASKS)
        if not arguments.is_number(soft_mask_epochs, 0, 10**6, whole=False):
            raise ValueError(
                f"Got soft_mask_epochs={arguments.shown(soft_mask_epochs)}; it has to be a number from 0 to 1,000,000."
            )
        arguments.check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads)
        if any(dim != embed_dims[0] for dim in embed_dims):
            raise ValueError(f"Got {embed_dims=}; all stages have the same number of channels.")
        if any(dim // heads % 2 for dim, heads in zip(embed_dims, num_heads, strict=True)):
            raise ValueError(
                f"Got {num_heads=} for {embed_dims=}; heads need an even number of channels, to rotate them in pairs."
            )
        if pyramid:
            check_pyramid(num_classes, depths, patch_size=patch_size)
        dd = {"device": device, "dtype": dtype}
        dim = embed_dims[0]
        hidden_dim = math.ceil(8 * dim // 3 / 256) * 256
        stages: list[Stage] = []
        for heads, rates in zip(num_heads, stage_rates(drop_path_rate, depths), strict=True):
            blocks = []
            for rate in rates:
                attn = CausalAttention(dim, heads, soft_mask_epochs > 0, class_token, **dd)
                blocks.append(RmsBlock(dim, attn, GatedMlp(dim, hidden_dim, **dd), rate, **dd))
            stages.append(SequenceStage(blocks, "last") if class_token else Stage(blocks))
        factors: Sequence[float] = (0.25, 0.5, 1, 2) if pyramid else (1,) * len(depths)
        self.place = "last" if class_token else None
        self.soft_mask, self.soft_mask_epochs = soft_mask, soft_mask_epochs
        super().__init__(
            Stem(in_chans, dim, patch_size, img_size // patch_size, class_token, **dd),
            stages,
            embed_dims,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            strides=[int(patch_size * factor) for factor in factors],
            norm=None if pyramid else RmsNorm2d(dim, eps=1e-6, **dd),
        )
        if pyramid:
            self.output_norms = pyramid_layers(dim, **dd)

    def init_weights(self) -> None:
        """Initialise every parameter and buffer, as the official code does."""
        super().init_weights()
        self.set_epoch(0)

    @torch.jit.ignore
    def set_epoch(self, epoch: float) -> None:
        """Set the soft mask for training that has come so far, in epochs; 2.5 is the middle of the third one."""
        left = 1 - epoch / self.soft_mask_epochs if self.soft_mask_epochs > 0 else 0.0
        share = max(left, 0.0) if self.soft_mask == "linear" else float(left > 0)
        for module in self.modules():
            if isinstance(module, CausalAttention):
                module.soft_mask.fill_(share)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position embeddings and the class token."""
        return {"stem.pos_embed", "stem.cls_token"}


def KEY_MAP(keys: Iterable[str]) -> list[tuple[str, str | None]]:
    """Official names -> ours, in stages of as many blocks; see zoo.key_maps. Our own names match no pattern."""
    blocks = [int(found[1]) for key in keys if (found := re.match(r"blocks\.(\d\d?)\.", key))]
    depth = max(blocks, default=11) // 4 + 1
    return [
        (r"^patch_embed\.", "stem."),
        (r"^(cls_token|pos_embed)$", r"stem.\1"),
        (r"^fpn1\.", "output_norms.0."),  # the pyramid of the segmentation backbone
        (r"^fpn2\.0\.", "output_norms.1."),
        (r"^(blocks\.\d+\.mlp)\.fc1\.", r"\1.fc1[0]."),  # the gate
        (r"^(blocks\.\d+\.mlp)\.fc3\.", r"\1.fc1[1]."),
        *((rf"^blocks\.{i}\.", f"stages.{i // depth}.blocks.{i % depth}.") for i in range(4 * depth)),
    ]


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert an official checkpoint, or one of ours, to a state dict of `model`; see `zoo.checkpoints.convert`.

    A model without a class token leaves out that of the file, with its position embedding. Position embeddings for maps
    of another size are resized (bicubic). Blocks go to the stages that the model has, in their order.
    """
    name, token = "stem.pos_embed", "stem.cls_token"
    given, want = checkpoints.remap(checkpoints.unwrap(state_dict), KEY_MAP), model.state_dict()
    given = _divided(given, want)
    if name in given and given[name].ndim == 3 and given[name].shape[1] > 1:
        table, last = given[name], given[name][:, :0]
        if token in given:
            table, last = split_positions(table, "last")
        table = resize_positions(table, want[name].shape[1] - (token in want))
        given[name] = torch.cat((table, last), 1) if token in want else table
    if token not in want:
        given.pop(token, None)
    return checkpoints.convert(given, model, KEY_MAP)


def _divided(given: dict[str, Tensor], want: Iterable[str]) -> dict[str, Tensor]:
    """`given` with the names of `want` for its blocks; as it is if there are more or fewer of them."""
    have, places = _places(given), _places(want)
    if len(have) != len(places):
        return given
    moved = {BLOCK.format(*old): BLOCK.format(*new) for old, new in zip(have, places, strict=True)}
    pattern = BLOCK.format(r"\d+", r"\d+")
    return {re.sub(f"^{pattern}", lambda found: moved[found[0]], key): value for key, value in given.items()}


def _places(keys: Iterable[str]) -> list[tuple[int, int]]:
    """The stages of the blocks that have these parameters, and the numbers of the blocks in them, in order."""
    found = (re.match(BLOCK.format(r"(\d+)", r"(\d+)"), key) for key in keys)
    return sorted({(int(match[1]), int(match[2])) for match in found if match})


def dense_kwargs(variant: str, task: str) -> dict[str, Any]:
    """The pyramid of the official code for segmentation, which detection needs as well; see `zoo.families`."""
    return {"pyramid": True}


def feature_side(variant: str, side: int, reduction: int) -> int:
    """The side of a feature map: pixels that fill no patch are left out; see `zoo.families`."""
    return side // 16 * 16 // reduction


_STRIDES = dict.fromkeys(VARIANTS, ("stem.proj", 16))
default_cfgs = checkpoints.default_cfgs("illama", "stem.proj", exceptions=_STRIDES, feature_side=feature_side)


def _create_illama(variant: str, pretrained: bool, **kwargs) -> ILLaMA:
    return create(ILLaMA, variant, VARIANTS[variant], pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def illama_tiny(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-T (5.7 M parameters)."""
    return _create_illama("illama_tiny", pretrained, **kwargs)


@register_model
def illama_small(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-S (22.0 M)."""
    return _create_illama("illama_small", pretrained, **kwargs)


@register_model
def illama_base(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-B (86.5 M)."""
    return _create_illama("illama_base", pretrained, **kwargs)


@register_model
def illama_base_384(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-B with position embeddings for 384 pixels (86.8 M)."""
    return _create_illama("illama_base_384", pretrained, **kwargs)


@register_model
def illama_large(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-L (310.4 M)."""
    return _create_illama("illama_large", pretrained, **kwargs)


@register_model
def illama_large_384(pretrained: bool = False, **kwargs) -> ILLaMA:
    """iLLaMA-L with position embeddings for 384 pixels (310.8 M)."""
    return _create_illama("illama_large_384", pretrained, **kwargs)


@register_model
def test_illama(pretrained: bool = False, **kwargs) -> ILLaMA:
    """An iLLaMA of 0.5 M parameters, for tests and small images."""
    return _create_illama("test_illama", pretrained, **kwargs)


def patterns(tokens: Tensor, place: tuple[int, int]) -> list[Pattern]:
    """The panels of `zoo-look patterns`, for the token at `place` of (1, H, W, C); see `zoo.attention_maps`."""
    keys = attended(CausalAttention(tokens.shape[-1], 2).eval(), place, tokens)
    return [Pattern("iLLaMA", ("itself and the tokens", "before it, row by row"), (0.45 * keys[0],), (place,))]
