"""Counts of instructions without a GPU: of kernels whose loops are known, and what the snapshots notice. Seconds."""

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from zoo.kernels import instructions, launches, trip_counts, triton_common

from . import compilation, resources
from .calls import WITH_TRITON

pytestmark = pytest.mark.slow
NVIDIA = [target for target in launches.TARGETS if target.startswith("sm")]
PROGRAMS, WARPS = 8, 4


@triton.jit
def _nested(x_ptr, y_ptr, ends_ptr, n, BLOCK: tl.constexpr):
    """Outer trips: n less the number of the program; inner ones in every third of them: `ends` of the program."""
    pid = tl.program_id(0)
    row = tl.arange(0, BLOCK)
    at = row[:, None] * BLOCK + row[None, :]
    end = tl.load(ends_ptr + pid)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(pid, n):
        a = tl.load(x_ptr + i * BLOCK * BLOCK + at)
        if i % 3 == 0:
            for j in range(0, end):
                b = tl.load(x_ptr + (i + j) * BLOCK * BLOCK + at)
                acc = tl.dot(a, tl.exp(b.to(tl.float32)).to(tl.float16), acc)
        acc = tl.exp(acc)
    tl.store(y_ptr + pid * BLOCK * BLOCK + at, acc)


@triton.jit
def _counted(x_ptr, y_ptr, n, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    """A loop that the compiler unrolls, in one of `n` trips, with a product."""
    row = tl.arange(0, BLOCK)
    at = row[:, None] * BLOCK + row[None, :]
    a = tl.load(x_ptr + at)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, n):
        for j in tl.static_range(TIMES):
            b = tl.load(x_ptr + (i * TIMES + j) * BLOCK * BLOCK + at)
            acc = tl.dot(a, tl.exp(b.to(tl.float32)).to(tl.float16), acc)
    tl.store(y_ptr + at, acc)


@triton.jit
def _searching(y_ptr, start, goal, BLOCK: tl.constexpr):
    """A loop until a number is reached, by steps that depend on the program."""
    pid = tl.program_id(0)
    number, trips = start, 0
    while number < goal:
        number += 1 + pid % 2 * 2
        trips += 1
    y = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, trips):
        y = tl.sin(y)
    tl.store(y_ptr + pid * BLOCK + tl.arange(0, BLOCK), y)


def record(kernel, target="sm_90", programs=PROGRAMS, **arguments):
    """The launch of a kernel on tensors without contents, apart from those in `arguments`."""
    x = torch.empty(1 << 20, device="meta", dtype=torch.float16)
    given = {"x_ptr": x, "y_ptr": x} | arguments
    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    (call,) = launches.record(
        lambda: triton_common.launch(kernel, (programs,), num_warps=WARPS, num_stages=1, **given),
        launches.TARGETS[target][0],
    )
    return call


def branches(call, compiled):
    given = [call.arguments[name] for name, kind in call.launch.signature if kind != "constexpr"]
    return trip_counts.executions(compiled.ttir, call.programs, given)


def executed(kernel, target, names, **arguments):
    """How often a warp of all programs together executes each instruction of these names, and whether that is exact."""
    call = record(kernel, target, **arguments)
    compiled = launches.compile_launch(call.launch, target)
    counts = instructions.count(compiled.assembly, branches(call, compiled), call.programs, WARPS)
    text = instructions.opcodes(compiled.assembly)
    found = {name: counts.executed[name] / WARPS / text[name] for name in text if name.startswith(names)}
    return found, counts.exact


PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
ENDS = torch.tensor([0, 3, 1, 5, 2, 2, 9, 4], dtype=torch.int32)


@pytest.mark.parametrize("target", NVIDIA)
def test_nested_loops_behind_a_condition(target):
    """Programs without trips, a trip count that differs between programs, and one that the kernel loads."""
    products = sum(int(ENDS[pid]) for pid in range(PROGRAMS) for i in range(pid, 6) if i % 3 == 0)
    found, exact = executed(_nested, target, PRODUCTS, ends_ptr=ENDS, n=6, BLOCK=64)
    assert exact
    assert list(found.values()) == [products]


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_unrolled_loops_are_counted_where_they_stand(target, times):
    found, exact = executed(_counted, target, "LDG.E.128", n=5, BLOCK=64, TIMES=times)
    text, _ = executed(_counted, target, "STG", n=5, BLOCK=64, TIMES=times)
    assert exact
    assert set(text.values()) == {PROGRAMS}
    call = record(_counted, target, n=5, BLOCK=64, TIMES=times)
    compiled = launches.compile_launch(call.launch, target)
    size = instructions.opcodes(compiled.assembly)["LDG.E.128"]
    of_tile = size // (1 + times)  # a is loaded once, b in each copy of the body
    (share,) = found.values()
    assert share * size == PROGRAMS * of_tile * (1 + 5 * times)


def test_unknown_numbers_are_not_exact():
    call = record(_nested, ends_ptr=ENDS.to("meta"), n=6, BLOCK=64)
    compiled = launches.compile_launch(call.launch, "sm_90")
    (outer,) = branches(call, compiled)
    (condition,) = outer.inner
    (inner,) = condition.inner
    assert (outer.known, condition.known, inner.known) == (True, True, False)
    assert inner.trips == inner.reached == condition.entered
    assert not instructions.count(compiled.assembly, [outer], PROGRAMS, WARPS).exact


def test_trips_of_a_while_loop():
    call = record(_searching, start=2, goal=9, BLOCK=128)
    compiled = launches.compile_launch(call.launch, "sm_90")
    search, repeat = branches(call, compiled)
    assert search.trips == repeat.trips == PROGRAMS // 2 * (7 + 3)
    assert repeat.lengths == {7: PROGRAMS // 2, 3: PROGRAMS // 2}


ASSEMBLY = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   MOV R2, RZ ;
.L_x_0:
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   FADD R3, R3, R2 ;
        /*0060*/                   FMUL R3, R3, R2 ;
.L_x_1:
        /*0070*/                   ISETP.GE.AND P2, PT, R2, R4, PT ;
        /*0080*/              @!P2 BRA `(.L_x_0) ;
        /*0090*/                   STG.E [R6.64], R3 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_counts_of_an_assembly():
    """Ten programs, of which four have no trips and the others twenty each, a quarter of them behind the condition."""
    condition = trip_counts.Branch(is_loop=False, reached=120, entered=30, trips=30)
    loop = trip_counts.Branch(is_loop=True, reached=10, entered=6, trips=120, inner=[condition])
    counts = instructions.count(ASSEMBLY, [loop], programs=10, num_warps=2)
    assert {name: number / 2 for name, number in counts.executed.items()} == {
        "MOV": 16, "EXIT": 16, "IADD3": 120, "BRA": 240, "FADD": 30, "FMUL": 30, "ISETP.GE.AND": 120, "STG.E": 6,
    }  # fmt: skip
    assert counts.exact
    assert counts.total == 2 * 578
    assert counts.step == round((4 * 120 + 2 * 30) / 120)
    assert instructions.sizes(ASSEMBLY) == {"instructions": 11, "step": 6}


def test_a_missing_loop_is_not_exact():
    assert not instructions.count(ASSEMBLY, [], programs=10, num_warps=2).exact


def test_snapshots_notice_a_doubled_body(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_SNAPSHOT", "1")
    once, twice = (record(_counted, n=5, BLOCK=64, TIMES=times).launch for times in (1, 2))
    file = tmp_path / "snapshot.json"
    resources.check([once], "sm_90", file)
    monkeypatch.delenv("ZOO_SNAPSHOT")
    resources.check([once], "sm_90", file)
    # the same launch by its name, with another body
    name = resources.describe(once)
    monkeypatch.setattr(resources, "describe", lambda launch: name)
    with pytest.raises(AssertionError, match=r"'step': .* before"):
        resources.check([twice], "sm_90", file)
    (found,) = json.loads(file.read_text())["resources"].values()
    assert found.keys() == {"registers", "stack", "shared", "instructions", "step"}


@pytest.mark.parametrize("name", WITH_TRITON)
def test_snapshots_hold_the_counts(name):
    kept = json.loads(Path(__file__).with_name(f"compiled_{name}.json").read_text())
    assert len(kept["resources"]) > 20
    assert [key for key, found in kept["resources"].items() if not 0 <= found["step"] <= found["instructions"]] == []


@pytest.mark.parametrize("target", launches.TARGETS)
def test_sizes_of_every_target(target):
    """The loop holds the larger part of the text, and the product is in it."""
    compiled = compilation.compile_launch(record(_counted, target, n=5, BLOCK=64, TIMES=3).launch, target)
    sizes = instructions.sizes(compiled.assembly)
    assert 100 < sizes["step"] < sizes["instructions"] < 5000
    assert compiled.stack == 0
