"""The page of a ledger of sparse training: every figure, and by seed who won."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from featherweight.measure.statistics import mean_estimate

if TYPE_CHECKING:
    from .sparse_training import Ledger, Timed, Trained

INTRODUCTION = """\
# Benchmarks: sparse training

This page is generated from a ledger by the command below; do not edit it. Every network is trained from scratch, with
the same number of epochs, schedule and data. Accuracy is that of the whole test split. *Spread* over seeds: mean, and
its 95% interval by Student's t."""
ABOUT = {
    "dense": "all weights",
    "static": "`sparse.set` with `fraction: 0`: random connections, never exchanged",
    "set": "`sparse.set`: connections grown at random",
    "rigl": "`sparse.rigl`: connections grown by the gradient of the dense weight",
}
TIMED = """\
All ways are timed in turn in one process, in {clock}: each trains for {steps} steps a round, {rounds} rounds, and the
mean is taken to an epoch of {per_epoch} steps. *Faster* is the ratio to ordinary training of the same round. Brackets
are 95% intervals over the rounds."""


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        INTRODUCTION,
        "",
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
    ]
    if ledger.trained:
        lines += [
            "",
            f"## {ledger.task} from scratch, {ledger.sparsity:.0%} of the weights zero",
            "",
            *accuracy(ledger),
        ]
    for name in dict.fromkeys(row.task for row in ledger.timed):
        rows = [row for row in ledger.timed if row.task == name]
        lines += ["", f"## Time of an epoch: {name}", "", *times(rows)]
    return "\n".join(lines) + "\n"


def accuracy(ledger: Ledger) -> Iterator[str]:
    """Every contender over its seeds, and the difference to static sparsity, seed by seed."""
    yield f"Test inputs: {ledger.trained[0].accuracy.n}. {ledger.notes}"
    for epochs in dict.fromkeys(row.step["epochs"] for row in ledger.trained):
        rows = [row for row in ledger.trained if row.step["epochs"] == epochs]
        yield f"\n{epochs:g} epochs:\n"
        yield "| contender | zeros | accuracy by seed | spread | over static, by seed | spread | seconds |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for name in dict.fromkeys(row.contender for row in rows):
            yield contender(name, [row for row in rows if row.contender == name], rows)
        yield ""
    yield from (f"* {name}: {about}" for name, about in ABOUT.items())


def contender(name: str, own: list[Trained], rows: list[Trained]) -> str:
    static = {row.seed: row.accuracy.value for row in rows if row.contender == "static"}
    gains = [row.accuracy.value - static[row.seed] for row in own if row.seed in static and name != "static"]
    cells = [
        name,
        f"{own[0].zeros:.1%}",
        ", ".join(f"{row.accuracy.value:.2f}" for row in own),
        spread([row.accuracy.value for row in own]),
        ", ".join(f"{gain:+.2f}" for gain in gains),
        spread(gains),
        f"{sum(row.seconds for row in own) / len(own):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def times(rows: list[Timed]) -> Iterator[str]:
    head = rows[0]
    yield TIMED.format(clock=head.clock, steps=head.steps, rounds=len(head.seconds), per_epoch=head.steps_per_epoch)
    yield ""
    yield "| training | seconds an epoch | faster |"
    yield "|---|---:|---:|"
    for row in rows:
        if row.epoch is None or row.faster is None:
            yield f"| {row.way} | | refused: {row.reason} |"
        else:
            seconds = f"{row.epoch.value:.4g} [{row.epoch.low:.4g}, {row.epoch.high:.4g}]"
            yield f"| {row.way} | {seconds} | {row.faster.value:.2f}x [{row.faster.low:.2f}, {row.faster.high:.2f}] |"


def spread(values: list[float]) -> str:
    """The mean and its interval; of a single value the value alone."""
    if not values:
        return ""
    found = mean_estimate(values)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if len(values) > 1 else f"{found.value:.2f}"
