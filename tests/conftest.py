"""How the tests are shared among tiers and processes."""

import gc
import re
from collections import defaultdict
from zlib import crc32

import pytest

from zoo import manifest
from zoo.kernels import OPERATORS

# Tests with a fixture that takes most of a minute, by the beginning of their names; they run in one process each.
TOGETHER = {
    "tests/recipes/test_distributed.py": "distributed",
    "tests/recipes/test_recipe_files.py": "recipes",
    "tests/recipes/test_resume.py": "resume",
    "tests/test_imports.py::test_models_are_registered": "registered",
    "tests/test_packaging.py": "packaging",
    "tests/zoo/test_families.py::test_ddp_": "parallel",
    "tests/zoo/test_families.py::test_fsdp_": "parallel",
}
# Models for tests, recipes for dense prediction and operators. A test of less than MANY is about these, not about all.
SHARED = re.compile(rf"test_[a-z0-9_]+|(coco|ade20k|cityscapes)(_panoptic|_instance)?/\w+|{'|'.join(OPERATORS)}")
# Published models. Tests of them are shared, too, except those of what defines a model.
PUBLISHED = {name.partition(".")[0] for name in manifest.counts() if not name.startswith("test_")}
WHOLE = {
    "test_classifier_matches_official",
    "test_key_map_covers_every_official_key_once",
}
MANY = 6
KEPT = 6  # One in so many of them stays in its tier.


# Nothing that the collection makes is garbage, so looking for some takes time only; `pytest_runtestloop` resumes.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():  # which the process that distributes the tests has, too
    """Leave the tests and modules that exist now out of every later search for garbage.

    MMEngine asks for a search whenever a data set is opened, and torch when it resets its compiler.
    """
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Let Python take everything apart at its end; extension modules print what is left over."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test of many models, recipes or operators stays in its tier for a sixth; for the others it goes to the next.

    Which sixth differs from test to test, so that each tier has tests of every family. `make test-all` has all tests,
    and so has `pytest -k test_van`. Of the tests of Triton's kernels, which test_triton.py runs, a sixth isn't long.
    """
    tests = defaultdict(lambda: defaultdict(list))
    slow = {}
    for item in items:
        slow[item] = bool(item.get_closest_marker("slow"))
        if item.path.name == "test_triton.py":  # shares the tests below by itself
            continue
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            if not isinstance(value, str):
                continue
            if SHARED.fullmatch(value) or (value in PUBLISHED and item.originalname not in WHOLE):
                tests[item.nodeid.partition("[")[0]][value].append(item)
        if item.path.name.startswith(("interpreted_", "compiled_")):
            tests[item.path.name][item.nodeid].append(item)
    for test, by_value in tests.items():
        if len(by_value) < MANY and not test.endswith(".py"):
            continue
        for number, value in enumerate(by_value, crc32(test.encode())):
            for item in by_value[value] if number % KEPT else ():
                item.add_marker("long" if slow[item] or test.endswith(".py") else "slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` by TOGETHER: pytest-xdist 3.8 does not see its own marker with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((group for begin, group in TOGETHER.items() if nodeid.startswith(begin)), nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None
