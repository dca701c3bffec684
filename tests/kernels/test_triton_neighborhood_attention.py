"""The Triton neighborhood attention, in the interpreter and compiled. Some 50 and 50 seconds on one core."""

from .processes import run_alone


def test_interpreted():
    run_alone("interpreted_neighborhood_attention.py", interpret=True)


def test_compiled():
    run_alone("compiled_neighborhood_attention.py", interpret=False)
