"""The ledger: what one run of a benchmark found out, as plain records. `benchmarks.page` makes the page from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from featherweight.core.files import write_text


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Figure(Record):
    """A value with its 95% interval, from `n` inputs or timed rounds."""

    value: float
    low: float
    high: float
    n: int


class Timing(Record):
    """Latency at one batch size: median milliseconds of a run; how many times faster than the original, by round."""

    batch: int
    threads: int
    p50_ms: Figure
    faster: Figure


class Row(Record):
    """One contender on one network. A contender that fails stays in the ledger with its reason."""

    contender: str
    package: str
    about: str
    state: str = "done"
    reason: str = ""
    seconds: float = 0.0
    accuracy: Figure | None = None
    drop: Figure | None = None
    bytes: int = 0
    timings: list[Timing] = []


class Network(Record):
    """All contenders on one network, judged on its whole test split."""

    task: str
    metric: str
    unit: str
    higher_is_better: bool
    calibration_inputs: int
    notes: str = ""
    rows: list[Row]


class Ledger(Record):
    """One run of a benchmark, all sides in one process on one machine."""

    benchmark: str
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    max_drop: float
    networks: list[Network]

    def write(self, folder: Path) -> Path:
        """Keep the ledger as `folder/<benchmark>-<date>.json`, whole or not at all."""
        path = folder / f"{self.benchmark}-{self.date}.json"
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path
