"""Codes for a unit Gaussian source beside the rate-distortion bound: `python -m benchmarks.gaussian LEDGER.json`."""

from __future__ import annotations

import math
import platform
import sys
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from featherweight.core.files import write_json
from featherweight.core.machine import describe
from featherweight.core.trellis import code, windows
from featherweight.methods.quantize.viterbi import tail_biting

BITS = (1, 2, 3, 4, 5, 6)
SAMPLES, STEPS, SEED = 2**16, 256, 2026


def bound(bits: int) -> float:
    """Least mean squared error of any code at so many bits per sample (Shannon)."""
    return 4.0**-bits


def uniform(bits: int) -> float:
    """Rounding to the nearest of equally spaced levels, with the best step: what RTN can reach."""
    steps = torch.linspace(0.05, 2.2, 4301, dtype=torch.float64)
    levels = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    return min(scalar_error(levels * step) for step in steps)


def lloyd_max(bits: int) -> float:
    """The best scalar quantizer: levels and edges are each other's means and midpoints (Lloyd, 1957)."""
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(2000):
        weight, mean = moments(levels)
        levels = mean / weight
    return scalar_error(levels)


def scalar_error(levels: Tensor) -> float:
    """Mean squared error of rounding a unit Gaussian to the nearest of sorted `levels`, exactly."""
    weight, mean = moments(levels)
    return float(1 - 2 * (levels * mean).sum() + (levels.square() * weight).sum())


def moments(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and first moment of each level's cell."""
    inner = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([torch.tensor([-math.inf]), inner, torch.tensor([math.inf])]).double()
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(edges).diff(), -density.diff()


def random_table(window: int) -> Tensor:
    """A table of samples of the Gaussian."""
    return torch.randn(2**window, generator=torch.Generator().manual_seed(1))


def sum_of_bytes(window: int) -> Tensor:
    """The computed code 1MAD of QTIP (arXiv:2406.11235): the sum of the bytes of a linear congruence."""
    mixed = (torch.arange(2**window) * 34038481 + 76625530) % 2**32
    return (sum((mixed // 256**place) % 256 for place in range(4)) - 510) / 147.8


def trellis(table: Tensor, bits: int) -> float:
    """Mean squared error of circular paths over samples of a unit Gaussian."""
    window = len(table).bit_length() - 1
    source = torch.randn(STEPS, SAMPLES // STEPS, generator=torch.Generator().manual_seed(SEED))
    values = table * math.sqrt(1 - 4.0**-bits)  # what a code of this rate at its best gives has this variance
    found = values[windows(tail_biting(source, values, bits).mT, bits, window)].mT
    return float((source - found).square().mean())


CODES = {
    "rate-distortion bound": (bound, 0),
    "uniform, best step (RTN)": (uniform, 0),
    "Lloyd-Max": (lloyd_max, 0),
    "trellis, window 12, random table": (lambda bits: trellis(random_table(12), bits), 2**13),
    "trellis, window 12, 1MAD": (lambda bits: trellis(sum_of_bytes(12), bits), 0),
    "trellis, window 8, ours": (lambda bits: trellis(code(torch.arange(2**8), 8), bits), 0),
    "trellis, window 10, ours": (lambda bits: trellis(code(torch.arange(2**10), 10), bits), 0),
    "trellis, window 12, ours (default)": (lambda bits: trellis(code(torch.arange(2**12), 12), bits), 0),
}


def main(path: Path) -> None:
    """Print every code's distortion as it is found, and write the ledger."""
    rows = []
    for name, (measure, table_bytes) in CODES.items():
        found = {str(bits): measure(bits) for bits in BITS}
        rows.append({"code": name, "table_bytes": table_bytes, "distortion": found})
        print(f"{name:36s}", *(f"{bits} bits {found[str(bits)]:.5f}" for bits in BITS), sep="  ", flush=True)
    write_json(
        path,
        {
            "benchmark": "gaussian",
            "date": date.today().isoformat(),
            "machine": describe(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": "python -m benchmarks.gaussian LEDGER.json",
            "source": f"unit Gaussian, {SAMPLES} samples, sequences of {STEPS}, seed {SEED}",
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
