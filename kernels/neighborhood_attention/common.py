"""Definitions that implementations of neighborhood attention share."""

from __future__ import annotations

import torch
from torch import Tensor


def neighbors(
    length: int, kernel: int, dilation: int, stride: int, causal: bool, *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The neighbours of each position along one axis: positions, offsets in places, and a mask, each (length, kernel).

    Entries that the mask excludes (causal attention) are in range too.
    """
    position = torch.arange(length, device=device)
    group, place = position % dilation, position // dilation
    places = (length - group + dilation - 1) // dilation
    steps = torch.arange(kernel, device=device)
    if causal:
        leader = torch.minimum(place // stride * stride + stride - 1, places - 1)
        found = leader[:, None] - kernel + 1 + steps
        valid = (found >= 0) & (found <= place[:, None])
        found = torch.where(valid, found, place[:, None])
    else:
        leader = torch.minimum(place // stride * stride + stride // 2, places - 1)
        start = torch.minimum((leader - kernel // 2).clamp(min=0), places - kernel)
        found = start[:, None] + steps
        valid = torch.ones_like(found, dtype=torch.bool)
    return found * dilation + group[:, None], found - place[:, None], valid
