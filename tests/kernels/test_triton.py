"""The Triton kernels of the operators, interpreted and compiled. Half a minute per operator on one core."""

import pytest

from .calls import WITH_TRITON
from .processes import run_alone

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["interpreted", "compiled"])
def test_a_sixth(kind):
    """The sixth of the tests of each file that tests/conftest.py leaves in `make test`, in one process."""
    run_alone([f"{kind}_{name}.py" for name in WITH_TRITON], interpret=kind == "interpreted", tier="not long")


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_TRITON)
def test_interpreted(name):
    run_alone([f"interpreted_{name}.py"], interpret=True, tier="long")


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_TRITON)
def test_compiled(name):
    run_alone([f"compiled_{name}.py"], interpret=False, tier="long")
