"""Neighborhood attention in plain torch: the definition of the correct result.

It takes the memory of kh * kw copies of the keys and values.

Letters: B images, H, W map, N heads, D head dim, I, J neighbours along rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.neighborhood_attention.common import neighbors


def neighborhood_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    stride: tuple[int, int],
    is_causal: tuple[bool, bool],
    bias_table: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """See `op.neighborhood_attention`, which checks the arguments."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    query, key, value = qkv.to(dtype).unflatten(-1, (3, num_heads, -1)).unbind(3)  # (B, H, W, N, D)
    axes = [
        neighbors(length, k, d, s, causal, device=qkv.device)
        for length, k, d, s, causal in zip(
            checks.sizes(qkv)[1:3], kernel_size, dilation, stride, is_causal, strict=True
        )
    ]
    (rows, down, row_valid), (columns, right, column_valid) = axes
    key, value = (x[:, rows][:, :, :, columns] for x in (key, value))  # (B, H, I, W, J, N, D)
    logits = scale * torch.einsum("bhwnd,bhiwjnd->bnhwij", query, key)
    if bias_table is not None:
        offsets_down = (down + kernel_size[0] - 1)[:, None, :, None]  # (H, 1, I, 1)
        offsets_right = (right + kernel_size[1] - 1)[None, :, None, :]  # (1, W, 1, J)
        logits = logits + bias_table.to(dtype)[:, offsets_down, offsets_right]
    valid = row_valid[:, None, :, None] & column_valid[None, :, None, :]
    if key_mask is not None:
        taken = key_mask[:, rows][:, :, :, columns].transpose(2, 3)[:, None]  # (B, 1, H, W, I, J)
        valid = valid & taken
    weights = logits.masked_fill(~valid, -torch.inf).flatten(-2).softmax(-1).unflatten(-1, kernel_size)
    if key_mask is not None:
        weights = torch.where(valid.any(-1, keepdim=True).any(-2, keepdim=True), weights, 0)
    return torch.einsum("bnhwij,bhiwjnd->bhwnd", weights, value).flatten(-2).to(qkv.dtype)
