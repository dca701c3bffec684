"""Selective scan: the state-space recurrence of Mamba, along rows and columns of a map."""

from zoo.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
