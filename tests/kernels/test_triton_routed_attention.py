"""Routed attention in Triton: its interpreter's results, and what compilers make of it. A minute and a half."""

from . import processes


def test_interpreted():
    processes.run_alone("interpreted_routed_attention.py", interpret=True)


def test_compiled():
    processes.run_alone("compiled_routed_attention.py", interpret=False)
