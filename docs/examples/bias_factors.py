"""Position biases q_b k_b^T of a few columns (FlashBias, arXiv 2505.12044) as further channels, timed against masks."""

import statistics
import time

import torch
from torch.nn.functional import one_hot, pad, scaled_dot_product_attention


def biases(side):
    """By name, for side x side tokens: the bias (n, n) and its factors q_b and k_b (n, columns), in float64."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    offset, square, one = place - place[:, None], place.square().sum(1).double(), torch.ones(side**2).double()
    q_b, k_b = torch.stack((-square, -one, *2 * place.T), 1), torch.stack((one, square, *place.T), 1)
    found = {"-|d|^2": (-offset.square().sum(2).double(), q_b, k_b)}
    tables, each = torch.randn(2, 2 * side - 1).double(), torch.arange(side) + side - 1  # by offset, from 1 - side
    bias = sum(table[offset[..., axis] + side - 1] for axis, table in enumerate(tables))
    q_b = torch.cat([table[each - place[:, axis, None]] for axis, table in enumerate(tables)], 1)
    found["rows + columns"] = bias, q_b, torch.cat([one_hot(along, side) for along in place.T], 1).double()
    part = one_hot((place >= side - side // 2).long() @ torch.tensor([2, 1])).double()  # the corner of Swin's shift
    return found | {"shifted window": (-100 * (part @ part.T == 0).double(), -100 * (1 - part), part)}


def factored(q, k, v, q_b, k_b):
    """Attention of heads (B, N, n, d) with the bias q_b k_b^T. CPUs need v to be as wide as q and k."""
    spare, pairs = -(q.shape[-1] + q_b.shape[-1]) % 8, ((q * q.shape[-1] ** -0.5, q_b), (k, k_b))
    q, k = (pad(torch.cat((x, extra.expand(*x.shape[:2], -1, -1)), 3), (0, spare)) for x, extra in pairs)
    return scaled_dot_product_attention(q, k, pad(v, (0, q.shape[-1] - v.shape[-1])), scale=1.0)[..., : v.shape[-1]]


def seconds(function, *arguments, **options):
    """The time of a call."""
    begun = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - begun


if __name__ == "__main__":
    for side in (7, 14, 24, 32):
        for name, (bias, *factors) in biases(side).items():
            qkv, mask = torch.randn(3, max(1, 64 * 49 // side**2), 4, side**2, 32), bias.float()
            pair, masked, ratios = [x.float() for x in factors], scaled_dot_product_attention, []
            for _ in range(11):  # in turns, so that the ratio holds on a busy machine
                ratios.append(seconds(factored, *qkv, *pair) / seconds(masked, *qkv, attn_mask=mask))
            print(f"{name:14} {side:2}x{side:<2} {pair[0].shape[1]:2} columns {statistics.median(ratios):5.2f} x mask")
