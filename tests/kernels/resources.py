"""The resources and instructions of compiled kernels, against hard limits and against a snapshot."""

import json
import os
from pathlib import Path

import triton

from zoo.kernels import instructions
from zoo.kernels.launches import record_case

from . import compilation

STACK = 64  # bytes; more means that registers spill in the loops
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
ROOM = 1.1


def describe(launch):
    """A readable key: the kernel, its constants, the dtypes of its tensors, its options, sizes divisible by 16."""
    constants = ",".join(f"{name}={value}" for name, value in launch.constants)
    types = ",".join(kind for _, kind in launch.signature if kind.startswith("*"))
    options = ",".join(f"{name}={value}" for name, value in launch.options)
    tensors = {name for name, kind in launch.signature if kind.startswith("*")}
    aligned = "".join(f" {name}%16" for name in launch.aligned if name not in tensors)
    return f"{launch.name}[{constants}]({types}){{{options}}}{aligned}"


def check(launches, target, file):
    """Compile each different launch for `target` and compare with the snapshot `file`, made by one version of Triton.

    ZOO_SNAPSHOT=1 writes the file.
    """
    path = Path(__file__).parent / file
    kept = json.loads(path.read_text()) if path.exists() else {"triton": triton.__version__, "resources": {}}
    same_version = kept["triton"].split(".")[:2] == triton.__version__.split(".")[:2]
    writing = os.environ.get("ZOO_SNAPSHOT") == "1"
    if writing and not same_version:
        kept = {"triton": triton.__version__, "resources": {}}
    faults = []
    for launch in dict.fromkeys(launches):
        compiled = compilation.compile_launch(launch, target)
        key = f"{target} {describe(launch)}"
        found = {"registers": compiled.registers, "stack": compiled.stack, "shared": compiled.shared}
        found |= instructions.sizes(compiled.assembly)
        if compiled.stack > STACK or compiled.shared > SHARED[target]:
            faults.append(f"{key}: {found}; at most {STACK} bytes of stack, {SHARED[target]} of shared memory")
        if writing:
            kept["resources"][key] = found
        elif same_version:
            before = kept["resources"].get(key)
            if before is None:
                faults.append(f"{key} is not in {file}: look at {found}, then run with ZOO_SNAPSHOT=1")
            elif any(found[what] > before[what] * ROOM for what in found.keys() & before.keys()):
                faults.append(f"{key}: {found}, before {before}")
    if writing:
        kept["resources"] = dict(sorted(kept["resources"].items()))
        path.write_text(json.dumps(kept, indent=1) + "\n")
    assert not faults, "\n".join(faults)


def check_cases(cases, names, dtype, target):
    """`check` for the passes of these cases of an operator, given its module of cases."""
    operator = cases.__name__.split(".")[-2]
    found = []
    for name in names:
        recorded = record_case(cases, cases.CASES[name], batch=8, dtype=dtype, gpu=compilation.TARGETS[target][0])
        found += [call.launch for calls in recorded.values() for call in calls]
    check(found, target, f"compiled_{operator}.json")
