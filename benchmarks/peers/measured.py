"""Time and peak memory of GPTQ in a process of its own; both sides of benchmarks.gptq use it.

It runs in the peers' environments, so it imports nothing of featherweight.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def layer(data: Path) -> tuple[torch.nn.Linear, torch.Tensor]:
    """The linear layer and its inputs [n, columns] of a folder with weight.npy and inputs.npy."""
    weight = torch.from_numpy(np.load(data / "weight.npy"))
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    return linear, torch.from_numpy(np.load(data / "inputs.npy"))


def measured(quantize: Callable[[], torch.Tensor], out: Path) -> None:
    """Run it, and write figures.json (seconds, MiB) and the rounded weight that it gives to the folder `out`.

    The peak is that of the process and counts libraries, weight and inputs; `start_mib` is what these take.
    """
    before, start, busy = peak(), time.perf_counter(), time.process_time()
    rounded = quantize()
    seconds, cpu_seconds, after = time.perf_counter() - start, time.process_time() - busy, peak()
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "start_mib": before, "peak_mib": after}
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    np.save(out / "weight.npy", rounded.float().numpy())


def peak() -> float:
    """The largest resident memory of this process so far, in MiB.

    From /proc where there is one: ru_maxrss starts with what the process that started this one held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
