"""The Triton kernels of the operators, interpreted and compiled. A minute and a half per operator on one core."""

import pytest

from .calls import WITH_TRITON
from .processes import run_alone

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", WITH_TRITON)
def test_interpreted(name):
    run_alone(f"interpreted_{name}.py", interpret=True)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_compiled(name):
    run_alone(f"compiled_{name}.py", interpret=False)
