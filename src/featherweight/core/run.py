"""What a run found out, as plain records: the search writes them, the report reads them, nothing in between."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .diagnosis import Diagnosis
from .reading import Reading
from .record import StepRecord

Objective = Literal["latency", "size", "energy", "accuracy"]


class Budget(BaseModel):
    """The user's bar: what may be lost, what must be reached, and what is to be made as good as possible.

    `max_drop` is in the metric's own unit, in its bad direction; `max_size` in bytes of the artifact; `max_latency` in
    milliseconds (p50, batch 1, one thread; for an artifact that takes one batch size only, at that one).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    objective: Objective = "latency"
    max_drop: float | None = Field(default=None, ge=0)
    max_size: int | None = Field(default=None, gt=0)
    max_latency: float | None = Field(default=None, gt=0)


class Candidate(BaseModel):
    """One recipe that the search tried, with its figures on the validation split."""

    model_config = ConfigDict(extra="forbid")

    number: int
    recipe: dict[str, Any]
    state: Literal["done", "refused", "failed"]
    reason: str = ""
    accuracy: float | None = None
    drop: float | None = None
    drop_high: float | None = None
    bytes: int | None = None
    latency_ms: float | None = None
    energy_mj: float | None = None
    feasible: bool = False
    front: bool = False
    chosen: bool = False
    seconds: float = 0.0


class Stage(BaseModel):
    """The model after one more step of the chosen recipe: figures of its artifact on the validation split. The first
    stage is the original.
    """

    model_config = ConfigDict(extra="forbid")

    after: str
    accuracy: float
    bytes: int
    latency_ms: float
    parameters: int
    macs: int


class Layer(BaseModel):
    """One weight before and after."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape_before: list[int] | None
    shape_after: list[int] | None
    bytes_before: int
    bytes_after: int
    form: str


class Run(BaseModel):
    """All that one run of `compress`, `apply` or `demo` found out; `run.json` holds it, and `report.html` shows it."""

    model_config = ConfigDict(extra="forbid")

    task: str
    task_name: str
    target: dict[str, Any]
    budget: Budget
    seed: int
    command: str = ""
    verdict: str
    feasible: bool  # whether every limit of the bar was measured and is met
    artifact: str
    recipe: dict[str, Any]
    metric: dict[str, Any]  # name, unit, higher_is_better
    readings: list[Reading]
    axes: list[dict[str, Any]] = []  # what was measured: the name of each axis, and its settings
    steps: list[StepRecord] = []
    stages: list[Stage] = []
    layers: list[Layer] = []
    candidates: list[Candidate] = []
    diagnosis: Diagnosis | None = None
    warnings: list[str] = []
    evidence: dict[str, Any] = {}
    seconds: float = 0.0
    created: str = ""
    versions: dict[str, str] = {}

    def answer(self) -> dict[str, Any]:
        """What every command prints as JSON and keeps as readings.json."""
        return {
            "verdict": self.verdict,
            "feasible": self.feasible,
            "artifact": self.artifact,
            "recipe": self.recipe,
            "readings": [reading.model_dump(mode="json") for reading in self.readings],
        }
