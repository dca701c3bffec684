"""Instructions of compiled kernels, counted in the disassembly and weighted by how often each block runs.

Loops are found in the disassembly by its jumps, and paired in order with the loops of Triton's form of the kernel,
whose trips `trip_counts` computes. A loop that the compiler has unrolled is missing, and its instructions are counted
where they stand. Of two loops in place of one, the first has several copies of the body in each trip, and the second
makes the trips that are left; such counts are not called exact. A block behind a condition is weighted by the share of
programs that enter it; conditions that the compiler has added itself (a load that may be skipped) are taken to be true.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import inf

from zoo.kernels.trip_counts import Branch

_LABEL = re.compile(r"^(\.?[\w.$]+):")
_NVIDIA = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([\w.]+)\s*(.*?);")
_AMD = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;/]*))?")
_JUMPS = ("BRA", "JMP", "s_branch", "s_cbranch")
_ENDS = ("EXIT", "RET", "s_endpgm", "s_setpc")
# A wait for a barrier, or for tensor memory, is a loop of a few instructions, which as a rule is left at once.
_WAITS = ("SYNCS.PHASECHK", "UTCATOMSWS")
_SHORT = 16
_MOVED = ("UTCHMMA", "UTCQMMA")
_WORK = ("LDG", "STG", "LDS", "STS", "HMMA", "HGMMA", "UTC", "MUFU")


@dataclass
class _Block:
    instructions: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)  # the next block, then those of jumps
    calls: list[int] = field(default_factory=list)  # functions, which return
    may_end: bool = False  # the program, at the end of the block


@dataclass
class Loop:
    """A loop of a compiled kernel."""

    instructions: int  # of one trip, without inner loops
    inner: bool  # whether it has no loops inside
    runs: float  # trips of all programs


@dataclass
class Counts:
    """Instructions of a launch; those of a call are of all warps."""

    loops: list[Loop]
    executed: dict[str, float]  # opcode -> how often a warp executes it in a call
    exact: bool  # whether all loops of the kernel were recognised, and their trips known

    @property
    def total(self) -> int:
        """Warp instructions of a call."""
        return round(sum(self.executed.values()))

    @property
    def step(self) -> int:
        """Instructions of a trip of the innermost loop with the most work; 0 without loops."""
        inner = [loop for loop in self.loops if loop.inner]
        return max(inner, key=lambda loop: loop.instructions * loop.runs).instructions if inner else 0


def count(assembly: str, branches: list[Branch], programs: int, num_warps: int) -> Counts:
    """Count the instructions of a launch.

    Args:
        assembly: The disassembly by nvdisasm. AMD's jumps are too subtle: one on an empty mask may always be taken.
        branches: What `trip_counts.executions` returned for the launch.
        programs: The size of the grid.
        num_warps: Warps of a program.
    """
    blocks = _blocks(assembly)
    graph = _Graph(blocks)
    runs, exact = graph.frequencies(branches, programs)
    executed: dict[str, float] = dict.fromkeys(
        (name for number in graph.order for name in blocks[number].instructions), 0.0
    )
    for number in graph.order:
        for opcode in blocks[number].instructions:
            executed[opcode] += runs[number] * num_warps
    loops = []
    for header, members in graph.loops.items():
        own = [number for number in members if graph.loop_of(number) == header]
        work = sum(runs[number] * len(blocks[number].instructions) for number in own)
        inner = header not in graph.parents.values()
        loops.append(Loop(round(work / runs[header]) if runs[header] else graph.size(own), inner, runs[header]))
    return Counts(loops, executed, exact)


def sizes(assembly: str) -> dict[str, int]:
    """The instructions of a compiled kernel in all, and those of its largest innermost loop, without a launch."""
    graph = _Graph(_blocks(assembly))
    innermost = [members for header, members in graph.loops.items() if header not in graph.parents.values()]
    return {"instructions": graph.size(graph.order), "step": max(map(graph.size, innermost), default=0)}


def opcodes(assembly: str) -> Counter[str]:
    """How often each instruction occurs in a compiled kernel."""
    blocks = _blocks(assembly)
    return Counter(opcode for number in _Graph(blocks).order for opcode in blocks[number].instructions)


def _lines(assembly: str) -> Iterator[tuple[str, str, str, str]]:
    """(label, "", "", "") and ("", condition, opcode, operands) of an assembly."""
    nvidia = "/*0000*/" in assembly
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            yield label[1], "", "", ""
        elif nvidia and (found := _NVIDIA.match(line)):
            # "BRA.U !UP0, `(.L_x_3)" has its condition among the operands
            yield "", found[1] or found[3].partition("`")[0].strip(), found[2], found[3]
        elif not nvidia and (found := _AMD.match(line)):
            conditional = found[1].startswith("s_cbranch")
            yield "", "if" if conditional else "", found[1], found[2] or ""


def _blocks(assembly: str) -> list[_Block]:
    """The basic blocks of the kernel, the first being its start."""
    blocks, labels = [_Block()], {}
    jumps: list[tuple[int, str]] = []
    calls: list[tuple[int, str]] = []
    open_ended = True  # whether the last block goes on to the next
    for label, condition, opcode, operands in _lines(assembly):
        if label:
            if blocks[-1].instructions or not open_ended:
                if open_ended:
                    blocks[-1].following.append(len(blocks))
                blocks.append(_Block())
            labels[label] = len(blocks) - 1
            open_ended = True
            continue
        if not open_ended:  # behind a jump, without a label: nothing gets there
            continue
        block = blocks[-1]
        block.instructions.append(opcode)
        target = re.search(r"`\(([^)]+)\)|(\.L\w+)", operands)
        name = (target[1] or target[2]) if target else ""
        # ptxas for sm_80 jumps by CALL too, but only to labels within the kernel.
        jump = opcode.startswith(_JUMPS) or (opcode.startswith("CALL") and name.startswith(".L"))
        if opcode.startswith("CALL") and not jump:
            calls.append((len(blocks) - 1, name))
        if jump or opcode.startswith(_ENDS):
            if jump:
                jumps.append((len(blocks) - 1, name))
            open_ended = bool(condition)
            block.may_end = opcode.startswith(_ENDS) and open_ended
            if open_ended:
                block.following.append(len(blocks))
                blocks.append(_Block())
    for number, name in jumps:
        blocks[number].following += [labels[name]] if name in labels else []
    for number, name in calls:
        blocks[number].calls += [labels[name]] if name in labels else []
    return blocks


class _Graph:
    """The blocks of a kernel as a graph, and its natural loops."""

    def __init__(self, blocks: list[_Block]) -> None:
        self.blocks = blocks
        self.order = self._topological()
        self.position = {number: place for place, number in enumerate(self.order)}
        self.before: dict[int, list[int]] = {number: [] for number in self.order}
        for number in self.order:
            for other in blocks[number].following + blocks[number].calls:
                self.before[other].append(number)
        self.dominators = self._dominators()
        self.loops = self._loops()  # header -> members
        self.parents = {header: self.loop_of(header, but=header) for header in self.loops}

    def size(self, numbers: Iterable[int]) -> int:
        """The instructions of some blocks."""
        return sum(len(self.blocks[number].instructions) for number in numbers)

    def loop_of(self, number: int, but: int | None = None) -> int | None:
        """The header of the smallest loop with a block, leaving out the loop `but`."""
        around = [header for header, members in self.loops.items() if number in members and header != but]
        return min(around, key=lambda header: len(self.loops[header]), default=None)

    def _topological(self) -> list[int]:
        """Every block that can be reached, behind all blocks that lead to it except by the last jump of a loop."""
        done: list[int] = []
        seen, stack = {0}, [(0, iter(self.blocks[0].following + self.blocks[0].calls))]
        while stack:
            number, rest = stack[-1]
            other = next((other for other in rest if other not in seen), None)
            if other is None:
                done.append(number)
                stack.pop()
            else:
                seen.add(other)
                stack.append((other, iter(self.blocks[other].following + self.blocks[other].calls)))
        return done[::-1]

    def _dominators(self) -> dict[int, set[int]]:
        """For each block, the blocks that every path to it passes, itself among them."""
        found = {number: set(self.order) for number in self.order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for number in self.order[1:]:
                new = set.intersection(*(found[other] for other in self.before[number])) | {number}
                changed |= new != found[number]
                found[number] = new
        return found

    def _loops(self) -> dict[int, set[int]]:
        loops: dict[int, set[int]] = {}
        for number in self.order:
            for header in self.blocks[number].following:
                if header in self.dominators[number]:
                    members = loops.setdefault(header, {header})
                    pending = [number]
                    while pending:
                        member = pending.pop()
                        if member not in members:
                            members.add(member)
                            pending += self.before[member]
        return {
            header: loops[header]
            for header in sorted(loops, key=self.position.__getitem__)
            if not self._waits(loops[header])
        }

    def _waits(self, numbers: set[int]) -> bool:
        found = any(name.startswith(_WAITS) for number in numbers for name in self.blocks[number].instructions)
        traps = self.size(numbers) == 1  # a jump to itself, behind the end
        return traps or (found and self.size(numbers) < _SHORT)

    def frequencies(self, branches: list[Branch], programs: int) -> tuple[dict[int, float], bool]:
        """How often all programs together run each block, and whether all loops were recognised and are known."""
        loops: dict[int, Branch] = {}
        exact = self._pair(None, branches, loops)
        amounts = self._amounts(branches, loops)
        runs, arrivals = dict.fromkeys(self.order, 0.0), dict.fromkeys(self.order, 0.0)
        arrivals[0] = programs
        for number in self.order:
            block = self.blocks[number]
            runs[number] = arrivals[number]
            if number in self.loops:
                runs[number] *= self._trips(number, loops.get(number))
            for called in block.calls:
                arrivals[called] += runs[number]
            onward = [other for other in block.following if other not in self.dominators[number]]
            leaving = self._leaving(number)
            left = sum(arrivals[header] for header, _ in leaving)
            for header, other in leaving:
                if other is not None:
                    arrivals[other] += arrivals[header]
            staying = [other for other in onward if other not in {other for _, other in leaving}]
            rest = runs[number] - left
            for other in sorted(staying, key=lambda other: (number, other) not in amounts):
                share = min(amounts.get((number, other), rest), rest)
                arrivals[other] += share
                rest -= share
        ends = Counter(header for number in self.order for header, _ in self._leaving(number))
        return runs, exact and max(ends.values(), default=1) == 1 and all(branch.known for branch in _all(branches))

    def _leaving(self, number: int) -> list[tuple[int, int | None]]:
        """The loops that a block may end, each with the block behind it, None for the end of the program."""
        found: list[tuple[int, int | None]] = []
        for header, members in self.loops.items():
            if number in members:
                found += [(header, other) for other in self.blocks[number].following if other not in members]
                found += [(header, None)] if self.blocks[number].may_end else []
        # A jump out of several loops at once ends the outermost.
        outermost = {other: header for header, other in sorted(found, key=lambda pair: len(self.loops[pair[0]]))}
        return [(header, other) for other, header in outermost.items()]

    def _trips(self, header: int, loop: Branch | None) -> float:
        """Runs of a loop's first block for each time that the loop is reached."""
        if loop is None:
            return 1.0
        members = self.loops[header]
        ends = [number for number in members if any(own == header for own, _ in self._leaving(number))]
        last = max((self.position[number] for number in ends), default=0)
        up_to_end = self.size(number for number in members if self.position[number] <= last)
        if 2 * up_to_end < self.size(members):  # the test comes first
            return loop.trips / max(loop.reached, 1) + 1
        # On sm_100, Triton moves the first and last products of a loop out of it, as many as a trip has.
        inside = self._products(members)
        outside = self._products(n for n in self.order if self.loop_of(n) == self.parents[header])
        moved = outside / inside if inside else 0.0
        return max(loop.trips / max(loop.entered, 1) - moved, 0.0)

    def _work(self, numbers: set[int]) -> int:
        """The instructions of some blocks that a compiler repeats when it copies the body of a loop."""
        names = [name for number in numbers for name in self.blocks[number].instructions]
        return sum(name.startswith(_WORK) for name in names) or len(names)

    def _products(self, numbers: Iterable[int]) -> int:
        return sum(name.startswith(_MOVED) for number in numbers for name in self.blocks[number].instructions)

    def _pair(self, parent: int | None, branches: list[Branch], pairs: dict[int, Branch]) -> bool:
        """Pair the loops inside a loop with those of TTIR, in order; whether all of them fit."""
        headers = [header for header in self.loops if self.parents[header] == parent]
        wanted = [branch for branch in _same_level(branches) if branch.is_loop]
        constant = [number for number, branch in enumerate(wanted) if len(branch.lengths) == 1]
        innermost = [number for number, branch in enumerate(wanted) if not any(x.is_loop for x in _all(branch.inner))]
        for unrolled, split in (
            *((set(some), set()) for n in range(len(constant) + 1) for some in combinations(constant, n)),
            *((set(), set(some)) for n in range(1, len(innermost) + 1) for some in combinations(innermost, n)),
        ):
            candidates: list[Branch] = []
            for number, branch in enumerate(wanted):
                if number in unrolled:
                    candidates += _unrolled(branch)
                elif number in split and len(candidates) + 1 < len(headers):
                    first, second = (self._work(self.loops[header]) for header in headers[len(candidates) :][:2])
                    candidates += _split(branch, max(round(first / second), 1))
                else:
                    candidates.append(branch)
            found: dict[int, Branch] = {}
            if len(candidates) == len(headers) and all(
                self._pair(header, branch.inner, found) for header, branch in zip(headers, candidates, strict=True)
            ):
                pairs |= found | dict(zip(headers, candidates, strict=True))
                return not split
        for header, branch in zip(headers, wanted, strict=False):
            pairs[header] = branch
            self._pair(header, branch.inner, pairs)
        return False

    def _amounts(self, branches: list[Branch], loops: dict[int, Branch]) -> dict[tuple[int, int], float]:
        """How often a jump with a condition that ends no loop goes one of its ways; as a rule, the rest goes the other.

        A jump that may skip a loop has the loop's entries. The others belong to the conditions of TTIR, the longest
        first; the compiler has added those that are left, and always goes the longer way.
        """
        amounts: dict[tuple[int, int], float] = {}
        for level in (None, *self.loops):
            inside = branches if level is None else loops[level].inner if level in loops else []
            jumps = [number for number in self.order if self.loop_of(number) == level and self._chooses(number)]
            guards = {  # the last jump that may skip a loop
                header: (number, way)
                for number in jumps
                for way in self._ways(number)
                for header in loops
                if self._guards(number, way, header)
            }
            amounts |= {jump: loops[header].entered for header, jump in guards.items()}
            open_jumps = [n for n in jumps if len(self._ways(n)) == 2 and n not in {n for n, _ in guards.values()}]
            longer = {number: self._longer_way(number) for number in open_jumps}
            conditions = [branch for branch in _same_level(inside) if not branch.is_loop]
            longest = sorted(open_jumps, key=lambda n: -longer[n][1])[: len(conditions)]
            matched = dict(zip(sorted(longest, key=self.position.__getitem__), conditions, strict=False))
            amounts |= {
                (number, way): matched[number].entered if number in matched else inf
                for number, (way, _) in longer.items()
            }
        return amounts

    def _ways(self, number: int) -> list[int]:
        """The blocks that may follow a block without ending or repeating a loop."""
        leaves = {other for _, other in self._leaving(number)}
        return [x for x in self.blocks[number].following if x not in self.dominators[number] and x not in leaves]

    def _chooses(self, number: int) -> bool:
        """Whether a block ends in a jump with a condition that ends no loop."""
        ends_loop = any(other is None for _, other in self._leaving(number))
        return len(self._ways(number)) + self.blocks[number].may_end >= 2 and not ends_loop

    def _guards(self, number: int, way: int, header: int) -> bool:
        """Whether `way` is the only way from a block to a loop on the same level."""
        if self.parents[header] != self.loop_of(number):
            return False
        behind = way == header or (way in self.dominators[header] and self.before[way] == [number])
        return behind and not any(self._reaches(other, header) for other in self._ways(number) if other != way)

    def _longer_way(self, number: int) -> tuple[int, int]:
        """The way out of a block behind which more instructions run, the next block if in doubt; and their number."""
        next_one, other = self._ways(number)
        size, other_size = self._own_size(number, next_one), self._own_size(number, other)
        return (next_one, size) if size >= other_size else (other, other_size)

    def _own_size(self, number: int, way: int) -> int:
        """The instructions that only run behind one way out of a block."""
        if self.before[way] != [number]:
            return 0
        region = {other for other in self.order if way in self.dominators[other]}
        return 0 if self._waits(region) else self.size(region)

    def _reaches(self, start: int, goal: int) -> bool:
        """Whether `goal` may run after `start`, without repeating a loop."""
        seen, pending = {start}, [start]
        while pending:
            number = pending.pop()
            if number == goal:
                return True
            new = {x for x in self.blocks[number].following if x not in self.dominators[number]} - seen
            seen |= new
            pending += new
        return False


def _same_level(branches: list[Branch]) -> Iterator[Branch]:
    """Loops and conditions, with those inside conditions, but not inside loops."""
    for branch in branches:
        yield branch
        if not branch.is_loop:
            yield from _same_level(branch.inner)


def _all(branches: list[Branch]) -> Iterator[Branch]:
    for branch in branches:
        yield branch
        yield from _all(branch.inner)


def _unrolled(branch: Branch) -> list[Branch]:
    """The loops inside a loop, as often as the loop runs."""
    (times,) = branch.lengths
    inner = [loop for loop in _same_level(branch.inner) if loop.is_loop]
    return [_part(loop, times) for _ in range(times) for loop in inner]


def _split(branch: Branch, copies: int) -> list[Branch]:
    """A loop with several copies of its body, and the loop behind it for the trips that are left."""
    parts = []
    for trips_of in (lambda length: length // copies, lambda length: length % copies):
        trips = sum(trips_of(length) * times for length, times in branch.lengths.items())
        entered = sum(times for length, times in branch.lengths.items() if trips_of(length))
        parts.append(replace(branch, trips=trips, entered=entered))
    return parts


def _part(branch: Branch, times: int) -> Branch:
    """One of `times` copies of a branch."""
    return replace(
        branch,
        reached=branch.reached // times,
        entered=branch.entered // times,
        trips=branch.trips // times,
        inner=[_part(inner, times) for inner in branch.inner],
    )
