"""The ledger of `benchmarks.coded`, and the page that shows it."""

from __future__ import annotations

from .page import rows_of
from .record import Figure, Record

PEER = "nncodec"
PAGE = """\
# Benchmarks: the coded checkpoint

This page is generated from a ledger by the command below; do not edit it. Every contender codes the same network at
several settings, from coarse to fine, up to the first file whose metric on the validation split is at most the limit
below that of the original; only this one is measured on the test split, whole. Brackets are 95% intervals. The file is
the whole file (ours holds the skeleton of the network and digests too); its ratio is to the parameters in float32.
Seconds are those of the processor, one thread. *Before*: calibration, rounding, and training where there is any;
nncodec rounds while it codes. *Coding* and *decoding*: of all tensors, the least of several times for ours.
"""


class Point(Record):
    """One file: at what setting, how large, how fast, and how good; `test` only for the one within the limit."""

    setting: str
    bytes: int
    before_seconds: float
    encode_seconds: float
    decode_seconds: float
    validation: Figure
    test: Figure | None = None


class Contender(Record):
    """All files of one contender; `state` and `reason` as in `record.Row`."""

    name: str
    state: str = "done"
    reason: str = ""
    points: list[Point] = []

    @property
    def chosen(self) -> Point | None:
        return next((point for point in self.points if point.test is not None), None)


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


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
    lines = [PAGE, f"* Date: {ledger.date}", f"* Machine: {ledger.machine}", f"* Versions: {versions}"]
    lines += [f"* Command: `{command}`" for command in ledger.commands]
    lines += [f"* Limit: {ledger.max_drop:g} (the metric's unit)", ""]
    for network in ledger.networks:
        lines += section(network)
    return "\n".join(lines).rstrip() + "\n"


def section(network: Network) -> list[str]:
    done = [each for each in network.contenders if each.chosen]
    peer = next((each.chosen for each in done if each.name == PEER), None)
    head = ["contender", "setting", "bytes", "times smaller", f"than {PEER}", f"{network.metric}, test", "validation"]
    head += ["before (s)", "coding (s)", "decoding (s)"]
    original = f"{network.parameters:,} parameters; float32: {text(network.test)} on test (n = {network.test.n:,}), "
    original += f"{network.validation.value:.2f} on validation (n = {network.validation.n:,})."
    lines = [f"## {network.name}", "", original, "", *rows_of(head, (cells(network, each, peer) for each in done)), ""]
    lines += [f"{each.name}: {each.state}: {each.reason}\n" for each in network.contenders if each.state != "done"]
    lines += ["All files, as bytes / metric on validation:", ""]
    for each in network.contenders:
        points = ", ".join(f"{point.setting}: {point.bytes:,} / {point.validation.value:.2f}" for point in each.points)
        lines.append(f"* {each.name}: {points or 'none'}")
    return [*lines, ""]


def cells(network: Network, contender: Contender, peer: Point | None) -> list[str]:
    point = contender.chosen
    assert point is not None and point.test is not None
    return [
        contender.name,
        point.setting,
        f"{point.bytes:,}",
        f"{4 * network.parameters / point.bytes:.1f}",
        "" if peer is None or point is peer else f"{peer.bytes / point.bytes:.2f}x",
        text(point.test),
        f"{point.validation.value:.2f}",
        f"{point.before_seconds:.1f}" if point.before_seconds else "",
        f"{point.encode_seconds:.2f}",
        f"{point.decode_seconds:.3f}",
    ]


def text(figure: Figure) -> str:
    return f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"
