"""How the tests are shared among processes."""

import pytest

# Fixtures that take most of a minute.
EXPENSIVE = {"alone", "killed", "parallel", "stopped", "timm_tests", "together", "wheel"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep a file's tests of expensive fixtures in one process, which makes them once (`--dist loadgroup`)."""
    for item in items:
        if EXPENSIVE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
