"""How the tests are shared among processes."""

import pytest

# Tests with a fixture that takes most of a minute, by the beginning of their names; they run in one process each.
TOGETHER = {
    "tests/recipes/test_distributed.py": "distributed",
    "tests/recipes/test_resume.py": "resume",
    "tests/test_imports.py::test_models_are_registered": "registered",
    "tests/test_packaging.py": "packaging",
    "tests/zoo/test_families.py::test_ddp_": "parallel",
    "tests/zoo/test_families.py::test_fsdp_": "parallel",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` by TOGETHER: pytest-xdist 3.8 does not see its own marker with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((group for begin, group in TOGETHER.items() if nodeid.startswith(begin)), nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None
