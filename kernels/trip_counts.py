"""How often the loops and conditions of a launch run, from Triton's own form of its kernel (TTIR) and its arguments.

TTIR has structured loops. Their bounds are scalars that follow from the number of the program and from the arguments,
so they are computed here for all programs at once, as tensors of integers. Tensors of the kernel are not computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A number, or a tensor of one for each program; a pointer is a tuple of a tensor and an offset; None if unknown.
Value = Any


@dataclass
class Branch:
    """A loop or a condition of a kernel, with sums over all programs."""

    is_loop: bool
    reached: int = 0  # how often programs arrive at it
    entered: int = 0  # how often the loop runs at least once, or the condition is true
    trips: int = 0  # all runs of the loop's body, or of the condition's first block
    known: bool = True  # else it depends on numbers of the kernel's tensors, and is taken to run once
    lengths: Counter[int] = field(default_factory=Counter)  # a number of trips -> how often the loop has it
    inner: list[Branch] = field(default_factory=list)


@dataclass
class _Op:
    name: str
    results: list[str]
    text: str  # what follows the name
    operands: list[str]
    regions: list[list[_Op]] = field(default_factory=list)
    block_arguments: list[str] = field(default_factory=list)  # of the last region


def executions(ttir: str, programs: int, arguments: Sequence[Any]) -> list[Branch]:
    """The loops and conditions of a kernel, in order, for a launch of `programs`.

    Args:
        ttir: The text of the kernel.
        programs: The size of the grid.
        arguments: What the compiled kernel takes, in order. Numbers that a kernel loads one by one, such as the ends of
            lists, are known if their tensor has contents.
    """
    lines = iter(ttir.splitlines())
    head = next(line for line in lines if "tt.func public" in line)
    names = re.findall(r"%([\w$.-]+): ", head)
    body = list(_operations(lines))
    env: dict[str, Value] = {}
    for name, value in zip(names, arguments, strict=True):
        env[name] = (value, 0) if isinstance(value, Tensor) else value if isinstance(value, int) else None
    branches = _outline(body)
    _Evaluation(body, programs).run(body, env, torch.ones(programs, dtype=torch.int64), iter(branches))
    return branches


def _operations(lines: Iterator[str]) -> Iterator[_Op]:
    """The operations up to the brace that closes their block; "next" stands for the start of a second block."""
    for raw in lines:
        line = re.sub(r"\s*loc\(.*$", "", raw).strip()
        if line.startswith(("} else {", "} do {")):
            yield _Op("next", [], "", [])
            continue
        if line.startswith("}"):
            return
        if line.startswith("^"):
            yield _Op("block", re.findall(r"%([\w$.-]+): ", raw), "", [])
            continue
        found = re.match(r'(?:%([\w$.-]+)(?::(\d+))? = )?"?([\w.]+)"?(.*)$', line)
        if not found:
            continue
        result, number, name, text = found.groups()
        results = [f"{result}#{i}" for i in range(int(number))] if number else [result] if result else []
        op = _Op(name, results, text, re.findall(r"%([\w$.-]+(?:#\d+)?)", text))
        if line.endswith("{"):
            op.regions = [[]]
            for inner in _operations(lines):
                if inner.name == "next":
                    op.regions.append([])
                elif inner.name == "block":
                    op.block_arguments = inner.results
                else:
                    op.regions[-1].append(inner)
        yield op


def _is_control(op: _Op) -> bool:
    return op.name in ("scf.for", "scf.while", "scf.if")


def _outline(ops: list[_Op]) -> list[Branch]:
    return [
        Branch(op.name != "scf.if", inner=[branch for region in op.regions for branch in _outline(region)])
        for op in ops
        if _is_control(op)
    ]


def _pairs(op: _Op) -> list[tuple[str, str]]:
    """The variables of a loop and their first values."""
    text = op.text.partition("iter_args")[2] if op.name == "scf.for" else op.text
    return re.findall(r"%([\w$.-]+) = %([\w$.-]+(?:#\d+)?)", text.partition("->")[0])


class _Evaluation:
    """Computes the scalars that control flow depends on, in the order of the kernel."""

    def __init__(self, body: list[_Op], programs: int) -> None:
        self.programs = programs
        self.sources: dict[str, set[str]] = {}  # a name -> the names that its value follows from
        self.needed: set[str] = set()
        self._trace(body)
        pending = list(self.needed)
        while pending:
            for source in self.sources.get(pending.pop(), set()) - self.needed:
                self.needed.add(source)
                pending.append(source)

    def _trace(self, ops: list[_Op]) -> None:
        for op in ops:
            ends = [region[-1].operands for region in op.regions if region]
            if op.name == "scf.for":
                self.needed |= set(op.operands[1:4])
                # The first value of the counter is a source of nothing else, so it may stay out of `needed`.
                self._add([op.operands[0]], [op.operands[1]])
                for number, (variable, first) in enumerate(_pairs(op)):
                    self._add([variable], [first, ends[0][number]])
                    self._add(op.results[number : number + 1], [variable])
            elif op.name == "scf.while":
                condition, *passed = ends[0]
                self.needed.add(condition)
                for number, (variable, first) in enumerate(_pairs(op)):
                    self._add([variable], [first, ends[1][number]])
                for names in (op.block_arguments, op.results):
                    for name, source in zip(names, passed, strict=False):
                        self._add([name], [source])
            elif op.name == "scf.if":
                self.needed.add(op.operands[0])
                for number, result in enumerate(op.results):
                    self._add([result], [end[number] for end in ends] + op.operands[:1])
            else:
                self._add(op.results, op.operands)
            for region in op.regions:
                self._trace(region)

    def _add(self, names: list[str], sources: list[str]) -> None:
        for name in names:
            self.sources.setdefault(name, set()).update(sources)

    def run(self, ops: list[_Op], env: dict[str, Value], weight: Tensor, branches: Iterator[Branch]) -> list[Value]:
        """Evaluate a block that each program runs `weight` times; the values that it yields."""
        for op in ops:
            if op.name in ("scf.yield", "scf.condition"):
                return [env.get(name) for name in op.operands]
            if _is_control(op):
                control = {"scf.for": self._for, "scf.while": self._while, "scf.if": self._if}[op.name]
                control(op, env, weight, next(branches))
            elif not self.needed.isdisjoint(op.results):
                env[op.results[0]] = self._value(op, [env.get(name) for name in op.operands])
        return []

    def _for(self, op: _Op, env: dict[str, Value], weight: Tensor, branch: Branch) -> None:
        bounds: list[Value] = [env.get(name) for name in op.operands[1:4]]
        first, stop, step = bounds
        known = all(bound is not None for bound in bounds)
        trips = torch.ones_like(weight)
        if known:
            trips = (-((first - stop) // step) + torch.zeros_like(weight)).clamp(min=0)
        _note(branch, weight, trips, known)
        variables = _pairs(op)
        changing = {op.operands[0], *(name for name, _ in variables)}
        if not branch.inner and self.needed.isdisjoint(op.results):
            return
        if not known or self.needed.isdisjoint(changing):
            self.run(op.regions[0], env, weight * trips, iter(branch.inner))
            return
        values = [env.get(first) for _, first in variables]
        for turn in range(int(trips[weight > 0].max()) if (weight > 0).any() else 0):
            runs = turn < trips
            env |= dict(zip((name for name, _ in variables), values, strict=True))
            env[op.operands[0]] = first + turn * step
            after = self.run(op.regions[0], env, weight * runs, iter(branch.inner))
            values = [_either(runs, new, old) for new, old in zip(after, values, strict=True)]
        env |= dict(zip(op.results, values, strict=True))

    def _while(self, op: _Op, env: dict[str, Value], weight: Tensor, branch: Branch) -> None:
        names, values = [name for name, _ in _pairs(op)], [env.get(first) for _, first in _pairs(op)]
        inside = len(_outline(op.regions[0]))
        trips, runs = torch.zeros_like(weight), weight > 0
        passed: list[Value] = []
        while True:
            env |= dict(zip(names, values, strict=True))
            condition, *now = self.run(op.regions[0], env, weight * runs, iter(branch.inner[:inside]))
            passed = [_either(runs, new, old) for new, old in zip(now, passed or now, strict=True)]
            if condition is None:
                _note(branch, weight, torch.ones_like(weight), known=False)
                break
            runs = runs & (condition != 0)
            if not runs.any():
                _note(branch, weight, trips, known=True)
                break
            trips += runs
            env |= dict(zip(op.block_arguments, passed, strict=True))
            after = self.run(op.regions[1], env, weight * runs, iter(branch.inner[inside:]))
            values = [_either(runs, new, old) for new, old in zip(after, values, strict=True)]
        env |= dict(zip(op.results, passed, strict=False))

    def _if(self, op: _Op, env: dict[str, Value], weight: Tensor, branch: Branch) -> None:
        condition = env.get(op.operands[0])
        known = condition is not None
        holds = (condition != 0) & (weight >= 0) if known else torch.ones_like(weight, dtype=torch.bool)
        _note(branch, weight, holds.long(), known)
        inside = len(_outline(op.regions[0]))
        first = self.run(op.regions[0], env, weight * holds, iter(branch.inner[:inside]))
        second = first
        if len(op.regions) > 1:
            second = self.run(op.regions[1], env, weight * ~holds, iter(branch.inner[inside:]))
        env |= {
            name: _either(holds, a, b) if known else None for name, a, b in zip(op.results, first, second, strict=True)
        }

    def _value(self, op: _Op, operands: list[Value]) -> Value:
        if op.name == "arith.constant":
            found = re.match(r" (?:(true|false)|(-?\d+)) ?(?::|$)", op.text)
            return None if not found else int(found[2]) if found[2] else int(found[1] == "true")
        if op.name == "tt.get_program_id":
            return torch.arange(self.programs) if op.text.startswith(" x") else 0
        if op.name == "tt.get_num_programs":
            return self.programs if op.text.startswith(" x") else 1
        if "tensor<" in op.text or any(value is None for value in operands):
            return None
        if op.name == "arith.cmpi":
            kind = op.text.split(",")[0].strip()
            return _COMPARISONS[kind](*operands) + 0 if kind in _COMPARISONS else None
        return _SCALARS[op.name](*operands) if op.name in _SCALARS else None


def _note(branch: Branch, weight: Tensor, trips: Tensor, known: bool) -> None:
    branch.reached += int(weight.sum())
    branch.entered += int((weight * (trips > 0)).sum())
    branch.trips += int((weight * trips).sum())
    branch.known &= known
    for length in trips[weight > 0].unique().tolist():
        branch.lengths[length] += int(weight[trips == length].sum())


def _either(condition: Tensor, yes: Value, no: Value) -> Value:
    if yes is None or no is None or isinstance(yes, tuple) or isinstance(no, tuple):
        return None
    return torch.where(condition, yes, no)


def _divide(a: Value, b: Value) -> Value:
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")


def _load(pointer: Value, mask: Value = 1, other: Value = 0) -> Value:
    tensor, offset = pointer
    if tensor.is_meta or tensor.is_floating_point():
        return None
    offset, taken = torch.as_tensor(offset), torch.as_tensor(mask) != 0
    return torch.where(taken, tensor.flatten().long()[torch.where(taken, offset, 0)], other)


_COMPARISONS: dict[str, Callable[[Value, Value], Value]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}
_SCALARS: dict[str, Callable[..., Value]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": _divide,
    "arith.remsi": lambda a, b: a - _divide(a, b) * b,
    "arith.minsi": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "arith.maxsi": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.extsi": lambda a: a,
    "arith.extui": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.index_cast": lambda a: a,
    "arith.select": lambda c, a, b: torch.where(torch.as_tensor(c) != 0, a, b),
    "tt.addptr": lambda pointer, offset: (pointer[0], pointer[1] + offset),
    "tt.load": _load,
}
