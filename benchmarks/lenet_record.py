"""The ledger of `benchmarks.lenet`: one row for each network, seed and recipe."""

from __future__ import annotations

from typing import Any

from .record import Record


class Row(Record):
    """One network, trained with one seed and made small by one recipe: errors in percent, sizes in bytes.

    `weights` are those that are not 0, `inputs` the test images, `seconds` those of the processor for all steps.
    """

    network: str
    seed: int
    name: str
    steps: list[dict[str, Any]]
    validation_error: float
    test_error: float
    inputs: int
    bytes: int
    parameters: int
    weights: int
    seconds: float

    @property
    def smaller(self) -> float:
        """How many times smaller the file is than the parameters in float32."""
        return 4 * self.parameters / self.bytes


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "lenet"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    rows: list[Row]

    def add(self, row: Row) -> None:
        """Put a row in, in place of one of the same network, seed and name."""
        same = (row.network, row.name, row.seed)
        self.rows = [each for each in self.rows if (each.network, each.name, each.seed) != same] + [row]
        self.rows.sort(key=lambda each: (each.network, -each.bytes if each.steps else -(2**60), each.seed))

    def groups(self, network: str) -> dict[str, list[Row]]:
        """The rows of a network by name, largest files first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.network == network:
                found.setdefault(row.name, []).append(row)
        return dict(sorted(found.items(), key=lambda item: -max(row.bytes for row in item[1])))
