"""The Triton kernels of the operators, interpreted and compiled. Half a minute per operator on one core."""

import pytest

from .calls import WITH_TRITON
from .processes import run_alone

pytestmark = pytest.mark.slow

every_operator = pytest.mark.parametrize("name", WITH_TRITON)
# `make test` runs a sixth of the tests of each file; see tests/conftest.py
every_tier = pytest.mark.parametrize(
    "tier", [pytest.param("not long", id="a_part"), pytest.param("long", id="the_rest", marks=pytest.mark.long)]
)


@every_operator
@every_tier
def test_interpreted(name, tier):
    run_alone(f"interpreted_{name}.py", interpret=True, tier=tier)


@every_operator
@every_tier
def test_compiled(name, tier):
    run_alone(f"compiled_{name}.py", interpret=False, tier=tier)
