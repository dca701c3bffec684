"""Triton decides at import whether to interpret, so the tests of each kind run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def run_alone(files, interpret, tier):
    """Run the tests of files of this folder with these marks in a new process; fail with its output."""
    # Two workers, unless pytest already runs in workers or the snapshot is being written.
    alone = "PYTEST_XDIST_WORKER" in os.environ or "ZOO_SNAPSHOT" in os.environ
    workers = ["-p", "no:xdist"] if alone else ["-n", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith(("TRITON_INTERPRET", "PYTEST_", "ZOO_KERNELS"))]:
        del environment[name]
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, *workers]
    folder = Path(__file__).parent
    command += [folder / file for file in files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
