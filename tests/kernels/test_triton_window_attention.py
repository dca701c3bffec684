"""The Triton window attention, in the interpreter and through the compiler. Some 35 and 60 seconds on one core."""

from .processes import run_alone


def test_interpreted():
    run_alone("interpreted_window_attention.py", interpret=True)


def test_compiled():
    run_alone("compiled_window_attention.py", interpret=False)
