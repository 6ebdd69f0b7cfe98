"""What is written beside an artifact: what it takes and gives, what it stores, how far it agrees with its model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .outputs import Layout


class Work(BaseModel):
    """What one inference computes and holds, read off the artifact, for one input (batch 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    parameters: int
    macs: int
    integer_macs: int = 0
    weight_bytes: int
    activation_bytes: int | None = None  # that operations give to one another; None where it cannot be told


class Input(BaseModel):
    """One input of an artifact: its shape with -1 where a dimension is free, and numpy's name of its type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    shape: list[int]
    dtype: str


class Agreement(BaseModel):
    """How far the artifact's outputs are from the torch model's on real inputs; `relative` is root mean square over
    that of the outputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    batches: list[int]
    max_abs: float
    relative: float
    bound: float


class Manifest(BaseModel):
    """What an artifact is: written beside it, and checked when it is opened."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    target: dict[str, Any]
    file: str
    inputs: list[Input]
    layout: Layout
    outputs: list[str]
    stored: dict[str, str]
    dense: list[str] = []
    base: str = ""  # digest of the base that the adapters of this artifact belong to
    slots: dict[str, list[int]] = {}  # tensors of adapters that can be exchanged; -1 where an adapter chooses the size
    places: dict[str, tuple[str, dict[str, Any]]] = {}  # layer -> what its slots are computed with
    evidence: dict[str, Any] = {}
    work: Work
    agreement: Agreement
    recipe: dict[str, Any]
    digests: dict[str, str]
    versions: dict[str, str]
