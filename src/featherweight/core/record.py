"""What a step reports of its work: plain records, without torch, so that the report can read them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class LeftAlone(BaseModel):
    """A layer that a step did not change, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    layer: str
    reason: str


class StepRecord(BaseModel):
    """What a step did: which layers it changed and how, which it left alone and why, what the user should know."""

    model_config = ConfigDict(extra="forbid")
    step: dict[str, Any]
    changed: dict[str, str] = {}
    left: list[LeftAlone] = []
    warnings: list[str] = []
    seconds: float = 0.0
    parameters_before: int = 0
    parameters_after: int = 0
