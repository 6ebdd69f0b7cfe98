"""The page and the curve of `benchmarks.lenet`, made from its ledger alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from html import escape

from .lenet_record import Ledger, Row

BARS = {"lenet-300-100": (1.6, 80.0), "lenet-5": (0.8, 200.0)}  # largest error in percent, least times smaller
PUBLISHED = {
    "lenet-300-100": (
        ("Deep Compression (arXiv:1510.00149)", 1.58, 40.0),
        ("Sparse variational dropout (arXiv:1701.05369), weights alone", 1.92, 68.0),
        ("Bayesian compression (arXiv:1705.08665)", 2.0, 113.0),
    ),
    "lenet-5": (
        ("Deep Compression (arXiv:1510.00149)", 0.74, 39.0),
        ("MIRACLE (arXiv:1810.00440)", 0.69, 555.0),
        ("Bayesian compression (arXiv:1705.08665)", 1.0, 771.0),
    ),
}
HEAD = """\
# Benchmarks: LeNets on MNIST, from training to the file

This page is generated from a ledger by the command below; do not edit it. Each network is trained from scratch with
each seed, made small by one recipe, and written as a coded checkpoint. Errors are those of the file that was read back
and run, over all 10,000 test images. Bytes are those of the whole file: header, skeleton, digests and biases included.
*Smaller* is against the parameters in float32. Means over the seeds, with the standard deviation and the range.
"""


@dataclass(frozen=True)
class Point:
    """One recipe over all seeds: errors in percent, and how many times smaller the files are."""

    name: str
    rows: list[Row]

    @property
    def errors(self) -> list[float]:
        return [row.test_error for row in self.rows]

    @property
    def ratios(self) -> list[float]:
        return [row.smaller for row in self.rows]

    @property
    def error(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def smaller(self) -> float:
        return statistics.fmean(self.ratios)


def points(ledger: Ledger, network: str) -> list[Point]:
    return [Point(name, rows) for name, rows in ledger.groups(network).items()]


def page(ledger: Ledger, drawing: str = "benchmarks-lenet.svg") -> str:
    """The whole page in Markdown; `drawing` is the file of `curve` beside it."""
    versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
    lines = [HEAD, f"* Date: {ledger.date}", f"* Machine: {ledger.machine}", f"* Versions: {versions}"]
    lines += [f"* Command: `{ledger.command}`", "", f"![Error over size of the file]({drawing})", ""]
    for network in sorted({row.network for row in ledger.rows}):
        lines += section(network, points(ledger, network))
    return "\n".join(lines).rstrip() + "\n"


def section(network: str, found: list[Point]) -> list[str]:
    most, least = BARS[network]
    lines = [f"## {network}", "", *verdict(network, found), ""]
    lines += ["| recipe | seeds | error % | range | bytes | times smaller | weights not 0 | seconds |"]
    lines += ["|---|---:|---:|---|---:|---:|---:|---:|", *map(cells, found)]
    lines += [f"| bar | | at most {most:g} | | | at least {least:g} | | |"]
    lines += [f"| {name}, published | | {error:g} | | | {ratio:g} | | |" for name, error, ratio in PUBLISHED[network]]
    steps = next((point.rows[0].steps for point in reversed(found) if point.rows[0].steps), [])
    return [*lines, "", "The steps of the smallest:", "", "```yaml", "steps:", *map(yaml, steps), "```", ""]


def yaml(step: dict[str, object]) -> str:
    def value(item: object) -> str:
        inner = ", ".join(f"{key}: {value(each)}" for key, each in item.items()) if isinstance(item, dict) else ""
        return f"{{{inner}}}" if inner else str(item)

    return f"  - {value(step)}"


def verdict(network: str, found: list[Point]) -> list[str]:
    """Which recipes meet the bar with the mean, and which with every seed."""
    most, least = BARS[network]
    small = [point for point in found if point.rows[0].steps]
    mean = [each for each in small if each.error <= most and each.smaller >= least]
    every = [each for each in mean if max(each.errors) <= most and min(each.ratios) >= least]
    text = f"Bar: at most {most:g}% error, at least {least:g} times smaller. "
    if not mean:
        return [text + "No recipe meets it."]
    best = max(mean, key=lambda each: each.smaller)
    text += (
        f"The smallest that meets it in the mean: {best.name}, {best.smaller:.0f} times smaller at {best.error:.2f}%; "
    )
    sure = max(every, key=lambda each: each.smaller, default=None)
    return [text + (f"with every seed: {sure.name}, {sure.smaller:.0f} times." if sure else "none with every seed.")]


def cells(point: Point) -> str:
    size = statistics.fmean(row.bytes for row in point.rows)
    weights = statistics.fmean(row.weights for row in point.rows)
    seconds = statistics.fmean(row.seconds for row in point.rows)
    ratio = f"{point.smaller:.0f} ± {spread(point.ratios):.0f}" if point.rows[0].steps else "1"
    error = f"{point.error:.2f} ± {spread(point.errors):.2f} | {min(point.errors):.2f} to {max(point.errors):.2f}"
    return f"| {point.name} | {len(point.rows)} | {error} | {size:,.0f} | {ratio} | {weights:,.0f} | {seconds:.0f} |"


def spread(values: list[float]) -> float:
    """The standard deviation between seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- the curve --------------------------------------------------------------------------------------------------------
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 300, 60, 44, 30, 20
STYLE = "text{font:12px sans-serif;fill:#333}.ours{fill:#1760a5}.line{stroke:#1760a5;fill:none}.theirs{fill:#b35900}"


def curve(ledger: Ledger) -> str:
    """Error over how many times smaller (logarithmic), one drawing below the other, as SVG."""
    networks = sorted({row.network for row in ledger.rows})
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(networks)}">'
    parts = [head, f"<style>{STYLE}</style>", '<rect width="100%" height="100%" fill="white"/>']
    for place, network in enumerate(networks):
        parts += [f'<g transform="translate(0 {place * HEIGHT})">', *drawing(network, points(ledger, network)), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawing(network: str, found: list[Point]) -> list[str]:
    ours = sorted((each for each in found if each.rows[0].steps), key=lambda each: each.smaller)
    most, least = BARS[network]
    errors = [error for each in ours for error in each.errors] + [error for _, error, _ in PUBLISHED[network]] + [most]
    ratios = [ratio for each in ours for ratio in each.ratios] + [ratio for *_, ratio in PUBLISHED[network]] + [least]
    low, high = math.log(min(ratios) / 1.3), math.log(max(ratios) * 1.3)
    bottom, top = min(errors) - 0.1, max(errors) + 0.1

    def x(ratio: float) -> float:
        return LEFT + (math.log(ratio) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        return HEIGHT - BOTTOM - (error - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<text x="{LEFT}" y="16">{network}: error in % over times smaller; the shaded corner meets the bar</text>'
    ]
    parts += [
        f'<rect x="{x(least):.1f}" y="{y(most):.1f}" width="{WIDTH - RIGHT - x(least):.1f}" '
        f'height="{HEIGHT - BOTTOM - y(most):.1f}" fill="#e4f1e4"/>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
    ]
    for ratio in ticks(min(ratios) / 1.3, max(ratios) * 1.3):
        parts.append(f'<text x="{x(ratio):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{ratio:g}</text>')
    for tenth in range(math.ceil(bottom * 5), math.floor(top * 5) + 1):
        parts.append(f'<text x="{LEFT - 6}" y="{y(tenth / 5) + 4:.1f}" text-anchor="end">{tenth / 5:.1f}</text>')
    if ours:
        line = " ".join(f"{x(each.smaller):.1f},{y(each.error):.1f}" for each in ours)
        parts.append(f'<polyline class="line" points="{line}"/>')
    for each in ours:
        for row in each.rows:
            title = escape(f"{each.name}, seed {row.seed}: {row.test_error:.2f}%, {row.bytes:,} bytes")
            place = f'cx="{x(row.smaller):.1f}" cy="{y(row.test_error):.1f}"'
            parts.append(f'<circle class="ours" {place} r="3"><title>{title}</title></circle>')
    for name, error, ratio in PUBLISHED[network]:
        parts.append(f'<circle class="theirs" cx="{x(ratio):.1f}" cy="{y(error):.1f}" r="4"/>')
        side, shift = ("end", -7) if x(ratio) > WIDTH / 2 else ("start", 7)
        label = escape(name.split(" (")[0])
        parts.append(f'<text x="{x(ratio) + shift:.1f}" y="{y(error) + 4:.1f}" text-anchor="{side}">{label}</text>')
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, three for each power of ten."""
    found = [base * 10.0**power for power in range(5) for base in (1, 2, 5)]
    return [each for each in found if low <= each <= high]
