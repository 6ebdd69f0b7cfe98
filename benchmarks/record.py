"""The ledger: what one run of a benchmark found out, as plain records. `benchmarks.page` makes the page from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from featherweight.core.files import write_text

CHOSEN = "featherweight chosen"  # the contender that stands for us against the best of the others


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Figure(Record):
    """A value with its 95% interval, from `n` inputs or timed rounds."""

    value: float
    low: float
    high: float
    n: int


class Timing(Record):
    """Latency at one batch size: median milliseconds of a run; how many times faster than the original, by round.

    `ahead` is how many times faster our chosen file was than this one, by round.
    """

    batch: int
    threads: int
    p50_ms: Figure
    faster: Figure
    ahead: Figure | None = None


class Row(Record):
    """One contender on one network. One that fails, or is not installed, stays in the ledger with its reason.

    `ahead` is by how much our chosen file is better than this one in the metric, paired over the same inputs.
    """

    contender: str
    package: str
    about: str
    state: str = "done"
    reason: str = ""
    note: str = ""
    seconds: float = 0.0
    accuracy: Figure | None = None
    drop: Figure | None = None
    ahead: Figure | None = None
    bytes: int = 0
    timings: list[Timing] = []


class Network(Record):
    """All contenders on one network, judged on its whole test split.

    `load` is the load average of the machine over the minute before latency was measured, `timed` the
    shape of the inputs at batch 1. `clock` is wall time, or time of the processor in the thread that calls.
    """

    task: str
    metric: str
    unit: str
    higher_is_better: bool
    calibration_inputs: int
    notes: str = ""
    load: float | None = None
    clock: str = "wall"
    timed: str = ""
    rows: list[Row]


class Ledger(Record):
    """One run of a benchmark, all sides in one process on one machine.

    `max_drop` is what a contender may lose to count as fast or small, in percent of the original's figure.
    """

    benchmark: str
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    max_drop: float
    networks: list[Network]

    @staticmethod
    def path(folder: Path, benchmark: str, date: str) -> Path:
        return folder / f"{benchmark}-{date}.json"

    @classmethod
    def read(cls, path: Path) -> Ledger:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def write(self, folder: Path) -> Path:
        """Keep the ledger as `folder/<benchmark>-<date>.json`, whole or not at all."""
        path = self.path(folder, self.benchmark, self.date)
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path
