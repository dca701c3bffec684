"""Isotropic models, which read a class token in the sequence of their patches: stages, features and classifier.

Stages exchange the map of the patches and the class token. Blocks see a sequence (B, 1, H W + 1, C): the patches, row
by row, with the class token in the middle, at H W // 2, or after the last one. For dense prediction, a few layers make
a pyramid of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from zoo import arguments
from zoo.backbone import Backbone, Stage
from zoo.kernels import sizes

__all__ = [
    "Place",
    "SequenceBackbone",
    "SequenceStage",
    "Tokens",
    "check_pyramid",
    "class_token_of",
    "join",
    "map_of",
    "patches_of",
    "pyramid_layers",
    "split_positions",
]

Place = Literal["middle", "last"]


class Tokens(NamedTuple):
    """What stages exchange in a model with a class token; `forward_features` joins the two to a sequence.

    Extractors of timm that take the output of a module use the first entry.
    """

    map: Tensor  # (B, C, H, W)
    class_token: Tensor  # (B, 1, C)

    @property
    def device(self) -> torch.device:
        """The device of the tensors, which timm's extractor with hooks asks for."""
        return self.map.device


def place_in(patches: int, place: Place) -> int:
    """The index of the class token in a sequence with as many patches."""
    return patches // 2 if place == "middle" else patches


# Tokens are taken by indices, since torch.export has to prove that a slice is within the map, but not that an index is.
@register_notrace_function
def join(x: Tensor, class_token: Tensor, place: Place) -> Tensor:
    """The tokens of a map (B, C, H, W), row by row, with a class token (B, 1, C): (B, 1, H W + 1, C)."""
    tokens = torch.cat((x.flatten(2).transpose(1, 2), class_token), 1)
    if place == "last":
        return tokens[:, None]
    count = sizes(x)[2] * sizes(x)[3]
    at, index = place_in(count, place), torch.arange(count + 1, device=x.device)
    index = torch.where(index < at, index, torch.where(index == at, count, index - 1))
    return tokens.index_select(1, index)[:, None]


@register_notrace_function
def class_token_of(tokens: Tensor, place: Place) -> Tensor:
    """The class token (B, 1, C) of a sequence (B, 1, H W + 1, C)."""
    index = torch.arange(1, device=tokens.device) + place_in(sizes(tokens)[2] - 1, place)
    return tokens[:, 0].index_select(1, index)


@register_notrace_function
def patches_of(tokens: Tensor, count: int, place: Place) -> Tensor:
    """A sequence (B, 1, count + 1, C) without its class token: (B, count, C)."""
    index = torch.arange(count, device=tokens.device)
    return tokens[:, 0].index_select(1, index + (index >= place_in(count, place)))


@register_notrace_function
def map_of(tokens: Tensor, like: Tensor, place: Place) -> Tensor:
    """The map of a sequence (B, 1, H W + 1, C): (B, C, H, W), of the size of `like`."""
    _, _, height, width = sizes(like)
    return patches_of(tokens, height * width, place).transpose(1, 2).unflatten(2, (height, width))


def split_positions(table: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Position embeddings (1, N + 1, C) as those of the N patches, and that of the class token."""
    at = place_in(table.shape[1] - 1, place)
    return torch.cat((table[:, :at], table[:, at + 1 :]), 1), table[:, at : at + 1]


def check_pyramid(num_classes: int, depths: Sequence[int], **stride: int) -> None:
    """Raise ValueError unless a model without a classifier, of this many stages and this stride, can have a pyramid."""
    if num_classes > 0 or len(depths) != 4:
        raise ValueError(
            f"Got pyramid=True with {num_classes} classes and {len(depths)} stages; it is for four stages with "
            "features_only=True or num_classes=0."
        )
    ((name, pixels),) = stride.items()
    if pixels % 4:
        raise ValueError(
            f"Got pyramid=True with {name}={pixels}; the stride of its first map is a fourth of that: use 8 or 16."
        )


def pyramid_layers(dim: int, device=None, dtype=None) -> nn.ModuleList:
    """For each of four features (B, dim, h, w), layers that make its map 4 h, 2 h, h or h // 2 high, and as wide."""
    dd = {"device": device, "dtype": dtype}
    twice = nn.ConvTranspose2d(dim, dim, 2, 2, **dd)
    first, second = nn.ConvTranspose2d(dim, dim, 2, 2, **dd), nn.ConvTranspose2d(dim, dim, 2, 2, **dd)
    four_times = nn.Sequential(first, nn.BatchNorm2d(dim, **dd), nn.GELU(), second)
    return nn.ModuleList([four_times, twice, nn.Identity(), nn.MaxPool2d(2, 2)])


class SequenceStage(Stage):
    """A stage of tokens with a class token: `Tokens` to `Tokens`."""

    def __init__(self, blocks: Sequence[nn.Module], place: Place):
        super().__init__(blocks)
        self.place: Place = place

    def forward(self, x: Any) -> Any:
        """`Tokens` -> `Tokens`."""
        tokens = self.forward_blocks(join(x.map, x.class_token, self.place))
        class_token = class_token_of(tokens, self.place)
        return Tokens(self.norm(map_of(tokens, x.map, self.place)), class_token)

    @property
    def maps(self) -> nn.Module:
        """The module that the map passes last, for tools that need a module whose output is a map."""
        return self.norm


class SequenceBackbone(Backbone):
    """A `Backbone` whose stages exchange `Tokens`; without a class token, maps as in other families.

    Attributes:
        place: Where the class token is in a sequence; None in a model without one. Set before the constructor is
            called.
    """

    place: Place | None

    def feature(self, x: Any) -> Tensor:
        """The map (B, C, H, W) in what a stage returns."""
        return x if self.place is None else x.map

    def final_norm(self, x: Any) -> Any:
        """Apply the norm to what the last stage returns: a map, or the sequence (B, H W + 1, C)."""
        if self.place is None:
            return self.norm(x)
        tokens = join(x.map, x.class_token, self.place)[:, 0]
        return self.norm(tokens.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Read the class token or the mean, and classify unless `pre_logits`: (B, num_classes or head_hidden_size)."""
        if self.place is None:
            return super().forward_head(x, pre_logits)
        if arguments.is_ep(self.global_pool):
            x = patches_of(x[:, None], sizes(x)[1] - 1, self.place)
        if self.global_pool != "avg":
            return super().forward_head(x, pre_logits)
        token = self.head_drop(self.pre_logits(class_token_of(x[:, None], self.place)[:, 0]))
        return token if pre_logits else self.head(token)
