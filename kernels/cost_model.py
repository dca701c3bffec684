"""The cost of operators on a GPU, counted without running them: operations, bytes, minimum time.

A fused kernel of neighborhood attention computes whole tiles of queries and keys, so its work is the number of key
tiles that the query tiles visit. The counts are exact. They leave out the softmax and the launches, so the time is a
lower bound. This follows the simulator of Generalized NA, arXiv 2504.16922, section 4. For the operators whose cost is
linear in the tokens, the bytes that the kernels move are counted. Window and routed attention are not modelled here;
`zoo-bench kernels --static` counts the instructions of the kernels of all operators.

The axes of neighborhood attention are independent: every count of a map is the product of the counts of its rows and
its columns. On an axis, the places of a dilation group (see `neighborhood_attention`) are divided into query tiles,
starting at the first place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Pair = tuple[int, int]
Kind = Literal["dynamic", "static"]


@dataclass(frozen=True)
class GPU:
    """Peak figures of a GPU."""

    name: str
    bandwidth: float  # bytes of memory a second
    flops: float  # dense float16 operations a second, accumulated in float32
    processors: int = 0
    clock: float = 0.0  # per second, under load; 0 if instructions are not modelled


# From the vendors' data sheets; half of the figures that are stated with sparsity. The clock of H100 and H200 is about
# the one at which an H100 ran our kernels; the others are those of the data sheets.
GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 2.039e12, 312e12, 108, 1.41e9),  # NVIDIA A100 Tensor Core GPU datasheet, SXM 80 GB
        GPU("H100", 3.35e12, 989.5e12, 132, 1.7e9),  # NVIDIA H100 Tensor Core GPU datasheet, SXM
        GPU("H200", 4.8e12, 989.5e12, 132, 1.7e9),  # NVIDIA H200 Tensor Core GPU datasheet, SXM
        GPU("B200", 8e12, 2.25e15, 148, 1.85e9),  # NVIDIA DGX B200 datasheet, an eighth of the system's
        GPU("MI300X", 5.3e12, 1307.4e12),  # AMD Instinct MI300X accelerator data sheet
    )
}

# Shares of the peak rates that a good kernel reaches, by counters of our kernels on an H100: of issued instructions, of
# wavefronts of shared memory and L1 cache, and of the memory's bandwidth.
ISSUED, PIPED, MOVED = 0.65, 0.7, 0.9


@dataclass(frozen=True)
class Simulation:
    """Counts of one forward pass; tiles and pairs are of one head of one image."""

    query_tiles: int
    key_tiles: int  # visited, summed over the query tiles
    dense_key_tiles: int  # the same for full attention
    pairs_issued: int  # of a query and a key: whole tiles
    pairs_wanted: int  # with a weight other than zero
    flops_issued: int  # of the two matrix products, for all heads and images
    flops_wanted: int
    bytes_minimum: int  # reads query, key and value once; writes the output and the softmax's float32 sums

    @property
    def speedup_bound(self) -> float:
        """The largest possible speedup over full attention with the same tiles."""
        return self.dense_key_tiles / self.key_tiles

    @property
    def utilization(self) -> float:
        """The fraction of the issued operations that is wanted."""
        return self.pairs_wanted / self.pairs_issued


def window(place: int, places: int, kernel: int, stride: int, causal: bool) -> Pair:
    """The first neighbour of `place` in a group of `places`, and the place after the last."""
    if causal:
        leader = min(place // stride * stride + stride - 1, places - 1)
        return max(leader - kernel + 1, 0), place + 1
    leader = min(place // stride * stride + stride // 2, places - 1)
    start = min(max(leader - kernel // 2, 0), places - kernel)
    return start, start + kernel


def axis_visits(
    length: int, kernel: int, dilation: int, stride: int, causal: bool, query_tile: int, key_tile: int, *, kind: Kind
) -> list[int]:
    """How many key tiles each query tile of one axis visits, for all dilation groups in turn.

    Dynamic key tiles start at the first neighbour of the tile's first query (the Triton kernels). Static ones start at
    the first place of the group (kernels that rearrange the map into tiles).
    """
    visits = []
    for group in range(dilation):
        places = _ceil(length - group, dilation)
        for first in range(0, places, query_tile):
            last = min(first + query_tile, places) - 1
            start, stop = (
                window(first, places, kernel, stride, causal)[0],
                window(last, places, kernel, stride, causal)[1],
            )
            origin = start if kind == "dynamic" else start // key_tile * key_tile
            visits.append(_ceil(stop - origin, key_tile))
    return visits


def simulate(
    size: Pair,
    kernel_size: Pair,
    dilation: Pair = (1, 1),
    stride: Pair = (1, 1),
    *,
    is_causal: tuple[bool, bool] = (False, False),
    query_tile: Pair = (8, 8),
    key_tile: Pair = (4, 16),
    kind: Kind = "dynamic",
    num_heads: int = 1,
    head_dim: int = 32,
    batch: int = 1,
    bytes_per_number: int = 2,
) -> Simulation:
    """Count the work of `neighborhood_attention` on a map of `size`, forward.

    Args:
        size: (H, W).
        kernel_size: (kh, kw), as in the operator.
        dilation: As in the operator.
        stride: As in the operator.
        is_causal: As in the operator.
        query_tile: Rows and columns of the queries of one program.
        key_tile: Rows and columns of the keys of one step of a program.
        kind: Whether key tiles start at the window of the query tile ("dynamic") or of the map ("static").
        num_heads: N.
        head_dim: D.
        batch: B.
        bytes_per_number: Size of an element of query, key, value and output.

    Raises:
        ValueError: the operator would reject the arguments, or the kind is another.
    """
    if kind not in ("dynamic", "static"):
        raise ValueError(f"Got {kind=}; it has to be 'dynamic' or 'static'.")
    _check(size, kernel_size, dilation, stride)
    rows, columns = (
        axis_visits(*axis, kind=kind)
        for axis in zip(size, kernel_size, dilation, stride, is_causal, query_tile, key_tile, strict=True)
    )
    down, right = (_axis_pairs(*axis) for axis in zip(size, kernel_size, dilation, stride, is_causal, strict=True))
    dense = [
        _ceil(length, query) * _ceil(length, key) for length, query, key in zip(size, query_tile, key_tile, strict=True)
    ]
    visited = sum(rows) * sum(columns)
    issued = visited * query_tile[0] * query_tile[1] * key_tile[0] * key_tile[1]
    wanted = down * right
    copies = num_heads * batch
    tokens = size[0] * size[1] * copies
    return Simulation(
        query_tiles=len(rows) * len(columns),
        key_tiles=visited,
        dense_key_tiles=dense[0] * dense[1],
        pairs_issued=issued,
        pairs_wanted=wanted,
        flops_issued=4 * head_dim * issued * copies,
        flops_wanted=4 * head_dim * wanted * copies,
        bytes_minimum=tokens * (4 * head_dim * bytes_per_number + 4),
    )


def roofline_time(simulation: Simulation, gpu: GPU | str) -> float:
    """The minimum time on `gpu` in seconds, the longer of issued operations at its peak and bytes at its bandwidth.

    Raises:
        KeyError: the name is not in GPUS.
    """
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    return max(simulation.flops_issued / gpu.flops, simulation.bytes_minimum / gpu.bandwidth)


@dataclass(frozen=True)
class Pass:
    """The work of our kernels for a forward or a backward pass, with what PyTorch adds up after them.

    Every kernel moves each of its tensors once; what programs for several directions read is counted for each.
    """

    bytes_moved: int
    flops: int  # as `zoo-bench kernels` counts them: without what the backward pass computes again

    def time(self, gpu: GPU | str) -> float:
        """The time in seconds to move the bytes at the bandwidth of `gpu`, a lower bound.

        Raises:
            KeyError: the name is not in GPUS.
        """
        return self.bytes_moved / (GPUS[gpu] if isinstance(gpu, str) else gpu).bandwidth


def linear_attention(
    tokens: int,
    num_heads: int,
    head_dim: int,
    *,
    softmax_weights: bool = False,
    batch: int = 1,
    bytes_per_number: int = 2,
) -> dict[str, Pass]:
    """The "forward" and "backward" pass of `linear_attention`, without the sums over the tokens.

    These are D + 1 rows of D numbers in float32 for each head: little if there are many more tokens than that.

    Args:
        tokens: T, of a map or a list.
        num_heads: N.
        head_dim: D.
        softmax_weights: Whether keys have weights, for which queries are read once more.
        batch: B.
        bytes_per_number: Size of an element of query, key, value and output.
    """
    elements = batch * tokens * num_heads * head_dim
    forward, backward = (5, 9) if softmax_weights else (4, 7)  # reads and writes of a tensor
    flops = 4 * head_dim * elements
    tensor = elements * bytes_per_number
    return {"forward": Pass(forward * tensor, flops), "backward": Pass(backward * tensor, 2 * flops)}


def flow_attention(
    tokens: int, num_heads: int, head_dim: int, *, batch: int = 1, bytes_per_number: int = 2
) -> dict[str, Pass]:
    """The "forward" and "backward" pass of `flow_attention`, without the sums over the tokens.

    These are D + 1 rows of D numbers in float32 for each head: little if there are many more tokens than that.

    Args:
        tokens: T, of a map or a list.
        num_heads: N.
        head_dim: D.
        batch: B.
        bytes_per_number: Size of an element of query, key, value and output.
    """
    elements = batch * tokens * num_heads * head_dim
    # Reads of q, k | q, k | k, v | q, and the output; then of grad, q | k, v | grad, q | k, v, and three gradients.
    flops = (4 * head_dim + 8) * elements
    tensor = elements * bytes_per_number
    return {"forward": Pass(8 * tensor, flops), "backward": Pass(11 * tensor, 2 * flops)}


def selective_scan(
    size: Pair,
    channels: int,
    d_state: int = 1,
    directions: int = 4,
    *,
    own_inputs: bool = False,
    batch: int = 1,
    bytes_per_number: int = 2,
) -> dict[str, Pass]:
    """The "forward" and "backward" pass of `selective_scan`; parameters are small, and left out.

    Args:
        size: (H, W).
        channels: C.
        d_state: N, numbers of a channel's state.
        directions: K.
        own_inputs: Whether each direction has an input of its own.
        batch: B.
        bytes_per_number: Size of an element of `x`, `delta`, `B`, `C` and the output.
    """
    tokens = batch * size[0] * size[1]
    each = tokens * directions * channels  # elements of `delta`
    numbers = tokens * directions * d_state  # elements of `B`
    states = 4 * batch * _ceil(size[0] * size[1], 16) * directions * d_state * channels
    out = tokens * channels * bytes_per_number
    # Directions and programs for a shared input find it in the cache.
    given = (each * bytes_per_number if own_inputs else out) + (each + 2 * numbers) * bytes_per_number + states
    in_parts = directions > 1  # written in float32, then read and added up
    forward = given + out + (8 * each if in_parts else 0)
    x_grad = each * bytes_per_number if own_inputs or not in_parts else 8 * each + out
    blocks = _ceil(channels, 32 if d_state <= 2 else 16)
    of_numbers = 2 * numbers * (8 * blocks + bytes_per_number)
    backward = given + out + x_grad + each * bytes_per_number + of_numbers
    flops = 7 * each * d_state
    return {"forward": Pass(forward, flops), "backward": Pass(backward, flops * 5 // 2)}


def gated_linear_attention(
    tokens: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    both: bool = True,
    batch: int = 1,
    bytes_per_number: int = 2,
) -> dict[str, Pass]:
    """The "forward" and "backward" pass of `gated_linear_attention`, with log gates in float32.

    Args:
        tokens: T.
        num_heads: N.
        key_dim: Channels of a key.
        value_dim: Channels of a value.
        both: Whether there are two directions.
        batch: B.
        bytes_per_number: Size of an element of queries, keys, values and the output.
    """
    directions = 2 if both else 1
    rows = batch * tokens * num_heads
    key, value = rows * key_dim * bytes_per_number, rows * value_dim * bytes_per_number
    gates = 4 * rows * key_dim  # and the gradient of the queries in a direction
    adding_up = directions + 1 if both else 0  # tensors that are read and written
    forward = directions * (2 * key + 2 * value + gates) + adding_up * value
    queries = directions * (2 * value + key + 2 * gates)
    others = directions * (3 * value + 3 * key + 3 * gates)
    sums = directions * gates + key + adding_up * (key + value) + 2 * directions * gates
    backward = queries + others + sums
    flops = 4 * directions * rows * key_dim * value_dim
    return {"forward": Pass(forward, flops), "backward": Pass(backward, 2 * flops)}


def issue_time(warp_instructions: float, gpu: GPU) -> float:
    """The modelled time in seconds to issue instructions: four a clock and processor, at the share ISSUED."""
    return warp_instructions / (4 * gpu.processors * gpu.clock * ISSUED)


def wavefront_time(wavefronts: float, gpu: GPU) -> float:
    """The modelled time in seconds of wavefronts of shared memory and L1 cache: one a clock and processor, at PIPED."""
    return wavefronts / (gpu.processors * gpu.clock * PIPED)


def recommend_stride(
    size: Pair,
    kernel_size: Pair,
    dilation: Pair = (1, 1),
    *,
    is_causal: tuple[bool, bool] = (False, False),
    query_tile: Pair = (8, 8),
    key_tile: Pair = (4, 16),
    kind: Kind = "dynamic",
) -> Pair:
    """The smallest stride of each axis that visits the fewest key tiles; the arguments are those of `simulate`.

    A larger stride moves the windows of more queries off-centre, so it has to reduce the work.

    Raises:
        ValueError: the operator would reject the arguments.
    """
    _check(size, kernel_size, dilation, (1, 1))

    def axis(length: int, kernel: int, dilation: int, causal: bool, query: int, key: int) -> int:
        strides = range(1, kernel + 1)
        return min(strides, key=lambda s: sum(axis_visits(length, kernel, dilation, s, causal, query, key, kind=kind)))

    rows, columns = zip(size, kernel_size, dilation, is_causal, query_tile, key_tile, strict=True)
    return axis(*rows), axis(*columns)


@cache
def best_tiles(
    kernel_size: Pair, stride: Pair, is_causal: tuple[bool, bool], num_queries: int, num_keys: int
) -> tuple[Pair, Pair]:
    """The tiles of `num_queries` queries and `num_keys` keys, powers of two, that visit the fewest keys on a large map.

    They do not depend on the map's size, so that one compiled kernel serves all sizes. For the sake of small maps, no
    side of a query tile is more than four times the other. Ties go to the squarest query tile and the key tile nearest
    to 4 x 16.
    """
    height, width = (128 * _ceil(kernel, 64) for kernel in kernel_size)

    def visits(tiles: tuple[Pair, Pair]) -> int:
        return simulate(
            (height, width), kernel_size, stride=stride, is_causal=is_causal, query_tile=tiles[0], key_tile=tiles[1]
        ).key_tiles

    square = [tile for tile in _shapes(num_queries) if max(tile) <= 4 * min(tile)]
    queries = sorted(square, key=lambda tile: abs(tile[0] - tile[1]))
    keys = sorted(_shapes(num_keys), key=lambda tile: abs(tile[1] - 4 * tile[0]))
    return min(((query, key) for query in queries for key in keys), key=visits)


def _shapes(tokens: int) -> list[Pair]:
    return [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]


def _axis_pairs(length: int, kernel: int, dilation: int, stride: int, causal: bool) -> int:
    """The total number of neighbours of the positions of one axis."""
    groups = [_ceil(length - group, dilation) for group in range(dilation)]
    windows = [window(place, places, kernel, stride, causal) for places in groups for place in range(places)]
    return sum(stop - start for start, stop in windows)


def _check(size: Pair, kernel_size: Pair, dilation: Pair, stride: Pair) -> None:
    for length, kernel, step, group in zip(size, kernel_size, dilation, stride, strict=True):
        if not 1 <= kernel * step <= length or step < 1:
            raise ValueError(
                f"Got {kernel_size=} with {dilation=} for a map of {size}; their product has to be from 1 to the "
                "map's side."
            )
        if not 1 <= group <= kernel:
            raise ValueError(f"Got {stride=} with {kernel_size=}; it has to be from 1 to the kernel's.")


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
