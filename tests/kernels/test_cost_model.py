"""The cost model against loops over queries, keys and tiles, the kernels' tensors and known figures. Some seconds."""

from importlib.util import find_spec

import pytest
import torch

from zoo.kernels import cost_model
from zoo.kernels.cost_model import GPUS, issue_time, recommend_stride, roofline_time, simulate, wavefront_time
from zoo.kernels.flow_attention import cases as flow_cases
from zoo.kernels.gated_linear_attention import cases as gated_cases
from zoo.kernels.linear_attention import cases as linear_cases
from zoo.kernels.selective_scan import cases as scan_cases

from .test_neighborhood_attention import axis_neighbors

# map, kernel, dilation, stride, causal
CASES = {
    "plain": ((14, 11), (3, 5), (1, 1), (1, 1), (False, False)),
    "even": ((9, 8), (4, 2), (1, 1), (1, 1), (False, False)),
    "dilated": ((15, 13), (3, 4), (2, 3), (1, 1), (False, False)),
    "strided": ((13, 17), (5, 7), (1, 1), (2, 3), (False, False)),
    "blocked": ((12, 10), (4, 5), (1, 1), (4, 5), (False, False)),
    "causal": ((12, 9), (4, 5), (1, 1), (1, 3), (True, True)),
    "causal-dilated": ((9, 15), (3, 4), (2, 1), (2, 2), (True, False)),
}


def brute(size, kernel, dilation, stride, causal, query_tile, key_tile, kind):
    """Query tiles, key tiles visited and pairs wanted of a map, from single neighbours."""
    counts = []
    for length, k, d, s, c, query, key in zip(
        size, kernel, dilation, stride, causal, query_tile, key_tile, strict=True
    ):
        tiles, visited, pairs = 0, 0, 0
        for group in range(d):
            positions = list(range(group, length, d))
            for first in range(0, len(positions), query):
                seen = [
                    [j // d for j, _ in axis_neighbors(i, length, k, d, s, c)] for i in positions[first : first + query]
                ]
                every = set().union(*seen)
                origin = min(every) if kind == "dynamic" else 0
                tiles += 1
                visited += len({(place - origin) // key for place in every})
                pairs += sum(map(len, seen))
        counts.append((tiles, visited, pairs))
    return tuple(down * right for down, right in zip(*counts, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("query_tile", "key_tile"), [((8, 8), (4, 16)), ((2, 4), (3, 2))], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_loops(case, query_tile, key_tile, kind):
    size, kernel, dilation, stride, causal = CASES[case]
    options = {"is_causal": causal, "query_tile": query_tile, "key_tile": key_tile, "kind": kind}
    found = simulate(size, kernel, dilation, stride, **options)
    want = brute(*CASES[case], query_tile, key_tile, kind)
    assert (found.query_tiles, found.key_tiles, found.pairs_wanted) == want


def test_kernel_7_takes_4_steps_of_64_keys_inside_the_map():
    rows = cost_model.axis_visits(56, 7, 1, 1, False, 8, 4, kind="dynamic")
    columns = cost_model.axis_visits(56, 7, 1, 1, False, 8, 16, kind="dynamic")
    assert (rows, columns) == ([3, 4, 4, 4, 4, 4, 3], [1] * 7)


def test_operations_bytes_and_bound():
    found = simulate((56, 56), (7, 7), num_heads=2, head_dim=32, batch=128)
    assert found.pairs_issued == 49 * 26 // 7 * 64 * 64
    assert found.flops_wanted == 4 * 32 * 56 * 56 * 49 * 2 * 128
    assert found.bytes_minimum == 56 * 56 * 128 * (4 * 64 * 2 + 2 * 4)
    assert found.speedup_bound == pytest.approx(49 * 14 * 4 / 182)
    assert found.utilization == pytest.approx(56 * 56 * 49 / (182 * 64 * 64))


def test_full_attention_gains_nothing():
    assert simulate((16, 16), (16, 16)).speedup_bound == 1


def test_time_is_bound_by_bandwidth_or_by_arithmetic():
    small = simulate((56, 56), (7, 7), num_heads=2, batch=128)
    assert roofline_time(small, "H100") == small.bytes_minimum / GPUS["H100"].bandwidth
    large = simulate((256, 256), (80, 80), head_dim=128)
    assert roofline_time(large, GPUS["H100"]) == large.flops_issued / GPUS["H100"].flops


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("kernel", [(7, 5), (8, 8)], ids=str)
def test_recommended_stride_visits_fewest_tiles(kernel, kind):
    size, tiles = (32, 30), {"query_tile": (4, 8), "key_tile": (4, 4), "kind": kind}
    best = recommend_stride(size, kernel, **tiles)
    visits = {
        (s, t): simulate(size, kernel, stride=(s, t), **tiles).key_tiles
        for s in range(1, kernel[0] + 1)
        for t in range(1, kernel[1] + 1)
    }
    assert best == min(visits, key=lambda stride: (visits[stride], stride))


def test_aligned_blocks_waste_nothing():
    assert recommend_stride((32, 32), (8, 8), query_tile=(8, 8), key_tile=(8, 8)) == (8, 8)
    assert simulate((32, 32), (8, 8), stride=(8, 8), query_tile=(8, 8), key_tile=(8, 8)).utilization == 1


@pytest.mark.parametrize(
    ("kernel", "tiles"), [(1, ((8, 8), (8, 8))), (7, ((8, 8), (4, 16))), (16, ((8, 8), (8, 8)))], ids=str
)
def test_best_tiles(kernel, tiles):
    assert cost_model.best_tiles((kernel, kernel), (1, 1), (False, False), 64, 64) == tiles


def test_best_tiles_follow_the_kernel():
    assert cost_model.best_tiles((3, 15), (1, 1), (False, False), 64, 64) == ((4, 16), (2, 32))


BAD = [
    ({"kernel_size": (7, 7)}, r"kernel_size=\(7, 7\) with dilation=\(1, 1\) for a map of \(6, 5\)"),
    ({"dilation": (1, 2)}, r"with dilation=\(1, 2\) for a map"),
    ({"stride": (1, 4)}, r"stride=\(1, 4\) with kernel_size=\(3, 3\)"),
    ({"kind": "fixed"}, "kind='fixed'; it has to be 'dynamic' or 'static'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(change)) for change, _ in BAD])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"size": (6, 5), "kernel_size": (3, 3)} | change)


def moved(module, case, per_direction=(), directions=1, left_out=()):
    """The bytes of all tensors of a case's kernels, forward and backward; some are counted once for each direction."""
    from zoo.kernels import launches, triton_common

    recorded = launches.record_case(module, case, batch=4, dtype=torch.float16, gpu=triton_common.SM_90)
    return {
        kind: sum(
            x.nbytes * (directions if name in per_direction else 1)
            for call in calls
            for name, x in call.arguments.items()
            if isinstance(x, torch.Tensor) and name not in left_out
        )
        for kind, calls in recorded.items()
    }


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="recording the launches of kernels needs Triton")


@needs_triton
@pytest.mark.parametrize("name", ["14x14x320-state1", "56x56x128-state1-rows", scan_cases.KINDS[1]])
def test_the_scan_moves_the_tensors_of_its_kernels_and_their_sums(name):
    case = scan_cases.CASES[name]
    count, tokens = len(case.directions), 4 * case.size[0] * case.size[1]
    each, numbers = tokens * case.channels * count, tokens * count * case.d_state
    parameters = tuple(f"{name}_ptr" for name in ("a", "d", "bias", "a_grad", "d_grad", "bias_grad"))
    kernels = moved(scan_cases, case, left_out=parameters)
    found = cost_model.selective_scan(
        case.size, case.channels, case.d_state, count, own_inputs=case.own_inputs, batch=4
    )
    out = 2 * tokens * case.channels
    assert found["forward"].bytes_moved == kernels["forward"] + (4 * each + out if count > 1 else 0)
    blocks = -(-case.channels // (32 if case.d_state == 1 else 16))
    sums = 2 * numbers * (4 * blocks + 2) + (4 * each + out if count > 1 and not case.own_inputs else 0)
    assert found["backward"].bytes_moved == kernels["backward"] + sums


@needs_triton
@pytest.mark.parametrize("name", gated_cases.KINDS)
def test_gated_attention_moves_the_tensors_of_its_kernels_and_their_sums(name):
    case = gated_cases.CASES[name]
    directions, key = 1 + case.both, 2 * 4 * case.tokens * case.num_heads * case.head_dim
    value, gates = 2 * key, 2 * key
    inputs = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr")
    kernels = moved(gated_cases, case, per_direction=inputs, directions=directions)
    found = cost_model.gated_linear_attention(
        case.tokens, case.num_heads, case.head_dim, 2 * case.head_dim, both=case.both, batch=4
    )
    assert found["forward"].bytes_moved == kernels["forward"] + (3 * value if case.both else 0)
    sums = 3 * directions * gates + key + (3 * (key + value) if case.both else 0)
    assert found["backward"].bytes_moved == kernels["backward"] + sums


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        "56x56x96-heads3-relu-min100-temperature",
        "56x56x64-heads1-softmax-rope",
        "56x56x64-heads1-offset-rope",
        "56x56x96-heads12",
    ],
)
def test_sums_over_the_tokens_move_the_tensors_of_their_kernels(name):
    from zoo.kernels import launches, triton_common

    module = linear_cases if name in linear_cases.CASES else flow_cases
    case = module.CASES[name]
    size = case.size[0] * case.size[1], case.num_heads, case.head_dim
    weights = {"softmax_weights": "softmax" in name} if module is linear_cases else {}
    model = cost_model.linear_attention if module is linear_cases else cost_model.flow_attention
    found = model(*size, **weights, batch=4)
    recorded = launches.record_case(module, case, batch=4, dtype=torch.float16, gpu=triton_common.SM_90)
    for kind, calls in recorded.items():
        tensors = [x for call in calls for x in call.arguments.values() if isinstance(x, torch.Tensor)]
        maps = [x.nbytes for x in tensors if x.shape[1:3] == case.size]
        assert found[kind].bytes_moved == sum(maps)
        assert sum(x.nbytes for x in tensors) - sum(maps) < 0.2 * sum(maps)


@pytest.mark.parametrize("operator", ["selective", "gated", "linear", "flow"])
def test_operations_are_those_of_the_benchmark(operator):
    from zoo.tools.benchmark_kernels import OPERATORS

    given = {"batch": 2, "dtype": torch.float16, "device": "meta"}
    if operator in ("linear", "flow"):
        module = linear_cases if operator == "linear" else flow_cases
        case = module.CASES[module.KINDS[0]]
        (q, *_), _ = module.inputs(case, **given)
        outputs, arguments = q.numel(), {"q": q, "num_heads": case.num_heads}
        size = case.size[0] * case.size[1], case.num_heads, case.head_dim
        found = getattr(cost_model, f"{operator}_attention")(*size, batch=2)
    elif operator == "selective":
        case = scan_cases.CASES[scan_cases.KINDS[1]]
        (x, _, A, *_), _ = scan_cases.inputs(case, **given)
        outputs, arguments = x[:, :, :, 0].numel(), {"A": A}
        found = cost_model.selective_scan(case.size, case.channels, case.d_state, 2, own_inputs=True, batch=2)
    else:
        case = gated_cases.CASES[gated_cases.KINDS[0]]
        (q, _, v, *gates), _ = gated_cases.inputs(case, **given)
        outputs, arguments = v.numel(), {"q": q, "reverse_log_gates": gates[1]}
        found = cost_model.gated_linear_attention(case.tokens, case.num_heads, q.shape[3], v.shape[3], batch=2)
    counted = OPERATORS[operator]
    assert found["forward"].flops == outputs * counted.flops(arguments)
    assert found["backward"].flops == found["forward"].flops * counted.backward_flops


def test_times_of_the_documentation():
    """docs/operators.md, for batch 128 in float16."""
    linear = [cost_model.linear_attention(3136, 2, 32, softmax_weights=given, batch=128) for given in (False, True)]
    flow = cost_model.flow_attention(3136, 12, 8, batch=128)
    microseconds = [1e6 * found[kind].time("H100") for found in (*linear, flow) for kind in ("forward", "backward")]
    assert microseconds == pytest.approx([61, 107, 77, 138, 184, 253], abs=0.5)
    scan = cost_model.selective_scan((56, 56), 64, batch=128)
    assert scan["forward"].time("H100") == pytest.approx(0.35e-3, abs=0.005e-3)
    gated = cost_model.gated_linear_attention(3136, 3, 16, 32, batch=128)
    assert gated["forward"].bytes_moved == pytest.approx(850e6, rel=0.01)
    assert gated["backward"].bytes_moved == pytest.approx(2.7e9, rel=0.01)
    assert gated["forward"].time(GPUS["H100"]) == pytest.approx(0.25e-3, abs=0.005e-3)
    assert gated["backward"].time("H100") == pytest.approx(0.8e-3, abs=0.01e-3)


def test_modelled_times_are_those_of_the_processors():
    """132 processors at 1.7 GHz issue four instructions a clock, of which a good kernel reaches 65 %."""
    assert issue_time(132 * 1.7e9 * 4, GPUS["H100"]) == pytest.approx(1 / 0.65)
    assert wavefront_time(132 * 1.7e9, GPUS["H100"]) == pytest.approx(1 / 0.7)
    assert issue_time(1e9, GPUS["A100"]) > issue_time(1e9, GPUS["H100"]) > issue_time(1e9, GPUS["B200"])
