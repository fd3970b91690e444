"""Kernels for what a compiler leaves on the table; the program that XLA makes is the default, and what they are tested against."""

from lionax.kernels.cpu import one_pass

__all__ = ["one_pass"]
