"""What all steps share that put factors in place of layers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...core.step import Between
from ...model.replacing import Replacing


class Factoring(Replacing):
    """A step that puts factors in place of the weights of chosen layers.

    `keep` is the share of the parameters of the layers that are factored. A layer whose factors would not be smaller is
    left alone.
    """

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.2, 0.9)] = 0.5
