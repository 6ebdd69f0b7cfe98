"""One measured figure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Subject = Literal["original", "compressed"]


class Reading(BaseModel):
    """One figure read off an artifact: what, of which subject, with its spread, and where it comes from.

    `low` and `high` bound a 95% interval of `value`, in the same `unit`; `n` counts what was averaged (inputs for an
    accuracy, timed runs for a latency). `kind` says whether the figure was measured or follows from a stated model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    subject: Subject
    axis: str
    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    kind: Literal["measured", "modelled"] = "measured"
    split: str | None = None
    conditions: dict[str, int | float | str] = {}
    runtime: str
    machine: str


def find(readings: list[Reading], subject: str, name: str, **conditions: int | float | str) -> Reading | None:
    """The first reading of `subject` called `name` whose conditions include `conditions`; None if there is none."""
    for reading in readings:
        fits = all(reading.conditions.get(key) == value for key, value in conditions.items())
        if fits and reading.subject == subject and reading.name == name:
            return reading
    return None
