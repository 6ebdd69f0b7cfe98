"""What a diagnosis found: the price of compressing each layer alone, and where a collapse starts. Plain records."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from .record import LeftAlone


class LayerPrice(BaseModel):
    """One layer compressed alone: what the metric loses (in its unit, with a paired 95% interval), and how far the
    model's first output stands above the noise, in decibels (None: the output is the same to the last bit).
    """

    model_config = ConfigDict(extra="forbid")
    layer: str
    how: str
    drop: float
    low: float
    high: float
    signal_db: float | None


class Collapse(BaseModel):
    """A compressed model that is of no use: how it shows, and the first layer whose own output is lost."""

    model_config = ConfigDict(extra="forbid")
    how: str
    layer: str
    sign: str


class Diagnosis(BaseModel):
    """The layers of a model by what compressing each one alone with one method costs, the worst first.

    `compressed` and `drop` are those of the whole, None where its outputs are not finite. `skip` excludes the worst
    layers; `skipped_drop` is what is then lost, measured on the same inputs. `enough` says whether that meets the bar.
    """

    model_config = ConfigDict(extra="forbid")
    task: str
    method: dict[str, Any]
    before: list[dict[str, Any]] = []
    split: str
    n: int
    metric: dict[str, Any]
    bar: float | None
    original: float
    compressed: float | None
    drop: float | None
    layers: list[LayerPrice]
    left: list[LeftAlone] = []
    skip: list[str] = []
    skipped_drop: float | None = None
    enough: bool = True
    collapse: Collapse | None = None
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """The line for the recipe that excludes the worst layers; empty if none needs to be."""
        return f"skip: [{', '.join(self.skip)}]" if self.skip else ""
