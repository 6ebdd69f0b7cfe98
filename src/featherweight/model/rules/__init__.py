"""How the dimensions of each ATen operator's output come from those of its inputs: one rule per operator."""

from . import contract, norm, part, pointwise, recurrent, reshape  # noqa: F401  each registers its rules
from .call import RULES, Call, NoRule, Result, Size, Trace, Work, find, fixed_like, shapes_in, sizes_of
from .labels import Dim, Indices, Labels, Shape, fixed, free

__all__ = [
    "RULES",
    "Call",
    "Dim",
    "Indices",
    "Labels",
    "NoRule",
    "Result",
    "Shape",
    "Size",
    "Trace",
    "Work",
    "find",
    "fixed",
    "fixed_like",
    "free",
    "shapes_in",
    "sizes_of",
]
