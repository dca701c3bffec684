"""The operators once more, as loops over single queries and keys; slow, and independent of zoo.kernels."""

import math

import torch


def attend(query, keys, values, logits_added, scale):
    """One query (D,) with lists of keys and values (D,)."""
    logits = [scale * float(query @ key) + added for key, added in zip(keys, logits_added, strict=True)]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def heads(x, num_heads, parts):
    """(B, H, W, parts N D) -> parts times (B, H, W, N, D)."""
    return x.reshape(*x.shape[:-1], parts, num_heads, -1).unbind(-3)


def window_attention(qkv, num_heads, window_size, layout, table, sign, scale, mask=None, shared=None):
    batch, height, width, _ = qkv.shape
    wh, ww = window_size
    parts = heads(qkv, num_heads, 3 if shared is None else 2)
    key, value = parts[-2:]
    out = torch.zeros_like(value)

    def place(y, x):
        if layout == "block":
            return (y // wh, x // ww), (y % wh, x % ww)
        return (y % (height // wh), x % (width // ww)), (y // (height // wh), x // (width // ww))

    tokens = [(y, x) for y in range(height) for x in range(width)]
    for b in range(batch):
        for n in range(num_heads):
            for i in tokens:
                window, t = place(*i)
                if shared is None:
                    query = parts[0][b, i[0], i[1], n]
                else:
                    query = shared[b, t[0] * ww + t[1]].reshape(num_heads, -1)[n]
                chosen = [j for j in tokens if place(*j)[0] == window and (mask is None or mask[b, j[0], j[1]])]
                if not chosen:
                    continue
                added = []
                for j in chosen:
                    u = place(*j)[1]
                    down, right = (
                        (t[0] - u[0], t[1] - u[1]) if sign == "query_minus_key" else (u[0] - t[0], u[1] - t[1])
                    )
                    added.append(0.0 if table is None else float(table[n, down + wh - 1, right + ww - 1]))
                keys, values = ([x[b, j[0], j[1], n] for j in chosen] for x in (key, value))
                out[b, i[0], i[1], n] = attend(query, keys, values, added, scale)
    return out.flatten(-2)


def axis_neighbors(i, length, k, d, s, causal):
    """Positions that position i sees along an axis, with their offsets in places."""
    group = [j for j in range(length) if j % d == i % d]
    p, n = group.index(i), len(group)
    block = [q for q in range(n) if q // s == p // s]
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        return [(group[q], q - p) for q in range(n) if leader - k < q <= p]
    leader = min(block[0] + s // 2, n - 1)
    # the k places whose window, centred on the leader, is shifted by as little as possible to lie inside
    best = min(range(n - k + 1), key=lambda start: abs(start - (leader - k // 2)))
    return [(group[q], q - p) for q in range(best, best + k)]


def neighborhood_attention(qkv, num_heads, kernel, dilation, stride, causal, table, scale, mask=None):
    batch, height, width, _ = qkv.shape
    query, key, value = heads(qkv, num_heads, 3)
    out = torch.zeros_like(value)
    for y in range(height):
        rows = axis_neighbors(y, height, kernel[0], dilation[0], stride[0], causal[0])
        for x in range(width):
            columns = axis_neighbors(x, width, kernel[1], dilation[1], stride[1], causal[1])
            neighbors = [(j, down, i, right) for j, down in rows for i, right in columns]
            for b in range(batch):
                chosen = [each for each in neighbors if mask is None or mask[b, each[0], each[2]]]
                if not chosen:
                    continue
                for n in range(num_heads):
                    added = [
                        0.0 if table is None else float(table[n, down + kernel[0] - 1, right + kernel[1] - 1])
                        for _, down, _, right in chosen
                    ]
                    keys, values = ([z[b, j, i, n] for j, _, i, _ in chosen] for z in (key, value))
                    out[b, y, x, n] = attend(query[b, y, x, n], keys, values, added, scale)
    return out.flatten(-2)


def routed_attention(q, k, v, routes, num_heads, regions, scale):
    query, key, value = (heads(z, num_heads, 1)[0] for z in (q, k, v))
    out = torch.zeros_like(query)

    def tokens(region, z):
        height, width = z.shape[1] // regions, z.shape[2] // regions
        top, left = region // regions * height, region % regions * width
        return [(y, x) for y in range(top, top + height) for x in range(left, left + width)]

    for b in range(q.shape[0]):
        for region in range(regions**2):
            chosen = [j for target in routes[b, region].tolist() for j in tokens(target, k)]
            for y, x in tokens(region, q):
                for n in range(num_heads):
                    keys, values = ([z[b, j[0], j[1], n] for j in chosen] for z in (key, value))
                    out[b, y, x, n] = attend(query[b, y, x, n], keys, values, [0.0] * len(chosen), scale)
    return out.flatten(-2)


def depthwise_conv(x, weight, bias, dilation):
    out = torch.zeros_like(x)
    _, height, width, _ = x.shape
    kh, kw = weight.shape[2:]
    for y in range(height):
        for z in range(width):
            for i in range(kh):
                for j in range(kw):
                    u, w = y + (i - kh // 2) * dilation[0], z + (j - kw // 2) * dilation[1]
                    if 0 <= u < height and 0 <= w < width:
                        out[:, y, z] += weight[:, 0, i, j] * x[:, u, w]
    return out if bias is None else out + bias
