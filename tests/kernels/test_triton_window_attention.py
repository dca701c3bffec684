"""Window attention in Triton, interpreted and compiled. A minute and a half on one core."""

import pytest

from .processes import run_alone

pytestmark = pytest.mark.slow


def test_interpreted():
    run_alone("interpreted_window_attention.py", interpret=True)


def test_compiled():
    run_alone("compiled_window_attention.py", interpret=False)
