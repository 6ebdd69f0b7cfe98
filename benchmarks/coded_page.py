"""The ledger of `benchmarks.coded`, and the page that shows it."""

from __future__ import annotations

import numpy as np

from .page import rows_of
from .record import Figure, Record

PEER = "nncodec"
PAGE = """\
# Benchmarks: the coded checkpoint

This page is generated from a ledger by the command below; do not edit it. Every contender codes the same network at
several settings, from coarse to fine, until one file loses no more than the limit. Two files of each are shown: the
smallest within the limit on the validation split, by which a user would choose, and the smallest within it on the test
split. *At equal accuracy*: how many times smaller than nncodec's our files are on the average over all losses on the
test split that both reach, up to ten times the limit; sizes between two settings are interpolated (as Bjontegaard's
rate, VCEG-M33, by straight lines). Brackets are 95% intervals. The file is the whole file (ours holds the skeleton of
the network and digests too); its ratio is to the parameters in float32. Seconds are of the processor, one thread.
*Before*: calibration, rounding, and training where there is any; nncodec rounds while it codes. *Coding* and
*decoding*: of all tensors, the least of several times for ours.
"""


class Point(Record):
    """One file: at what setting, how large, how fast, and how good."""

    setting: str
    bytes: int
    before_seconds: float
    encode_seconds: float
    decode_seconds: float
    validation: Figure
    test: Figure
    validation_drop: float = 0.0
    test_drop: float = 0.0


class Contender(Record):
    """All files of one contender; `state` and `reason` as in `record.Row`."""

    name: str
    state: str = "done"
    reason: str = ""
    points: list[Point] = []

    def within(self, limit: float, split: str) -> Point | None:
        """The smallest file that loses no more than `limit` on "validation" or "test"."""
        found = [point for point in self.points if getattr(point, f"{split}_drop") <= limit]
        return min(found, key=lambda point: point.bytes, default=None)


class Network(Record):
    """A network, its float32 figures, and what became of it."""

    name: str
    metric: str
    parameters: int
    validation: Figure
    test: Figure
    contenders: list[Contender] = []


class Ledger(Record):
    """The runs of one day."""

    benchmark: str = "coded"
    date: str
    commands: list[str]
    machine: str
    versions: dict[str, str]
    seed: int
    max_drop: float
    networks: list[Network] = []


def at_equal_accuracy(ours: Contender, theirs: Contender, most: float) -> float | None:
    """How many times smaller our files are, as the geometric mean over all drops on the test split, up to `most`, that
    both reach; None where they reach none in common.
    """
    mine, other = (np.array(envelope(each)) for each in (ours, theirs))
    low, high = max(mine[0, 0], other[0, 0]), min(mine[-1, 0], other[-1, 0], most)
    if low >= high:
        return None
    drops = np.linspace(low, high, 200)
    ratios = np.interp(drops, other[:, 0], other[:, 1]) - np.interp(drops, mine[:, 0], mine[:, 1])
    return float(np.exp(ratios.mean()))


def envelope(contender: Contender) -> list[tuple[float, float]]:
    """Drops on the test split, rising, and the logarithm of the fewest bytes that lose no more."""
    best: list[tuple[float, float]] = []
    for point in sorted(contender.points, key=lambda point: (point.test_drop, point.bytes)):
        if not best or np.log(point.bytes) < best[-1][1]:
            best.append((point.test_drop, float(np.log(point.bytes))))
    return best


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
    lines = [PAGE, f"* Date: {ledger.date}", f"* Machine: {ledger.machine}", f"* Versions: {versions}"]
    lines += [f"* Command: `{command}`" for command in ledger.commands]
    lines += [f"* Limit: {ledger.max_drop:g} (the metric's unit)", ""]
    for network in ledger.networks:
        lines += section(network, ledger.max_drop)
    return "\n".join(lines).rstrip() + "\n"


def section(network: Network, limit: float) -> list[str]:
    done = [each for each in network.contenders if each.state == "done"]
    peer = next((each for each in done if each.name == PEER), None)
    original = f"{network.parameters:,} parameters; float32: {text(network.test)} on test (n = {network.test.n:,}), "
    original += f"{network.validation.value:.2f} on validation (n = {network.validation.n:,})."
    head = ["contender", "chosen on", "setting", "bytes", "times smaller", f"than {PEER}", f"{network.metric}, test"]
    head += ["validation", "before (s)", "coding (s)", "decoding (s)"]
    rows = [cells(network, each, peer, limit, split) for split in ("validation", "test") for each in done]
    lines = [f"## {network.name}", "", original, "", *rows_of(head, iter(rows)), ""]
    for each in done:
        if peer is not None and each is not peer and (ratio := at_equal_accuracy(each, peer, 10 * limit)):
            lines += [f"{each.name}, at equal accuracy: {ratio:.2f}x smaller than {PEER}.", ""]
    lines += [f"{each.name}: {each.state}: {each.reason}\n" for each in network.contenders if each.state != "done"]
    lines += ["All files, as bytes / test / validation:", ""]
    for each in network.contenders:
        points = (f"{p.setting}: {p.bytes:,} / {p.test.value:.2f} / {p.validation.value:.2f}" for p in each.points)
        lines.append(f"* {each.name}: {', '.join(points) or 'none'}")
    return [*lines, ""]


def cells(network: Network, contender: Contender, peer: Contender | None, limit: float, split: str) -> list[str]:
    point = contender.within(limit, split)
    assert point is not None
    other = None if peer is None or contender is peer else peer.within(limit, split)
    return [
        contender.name,
        split,
        point.setting,
        f"{point.bytes:,}",
        f"{4 * network.parameters / point.bytes:.1f}",
        f"{other.bytes / point.bytes:.2f}x" if other else "",
        text(point.test),
        f"{point.validation.value:.2f}",
        f"{point.before_seconds:.1f}" if point.before_seconds else "",
        f"{point.encode_seconds:.2f}",
        f"{point.decode_seconds:.3f}",
    ]


def text(figure: Figure) -> str:
    return f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"
