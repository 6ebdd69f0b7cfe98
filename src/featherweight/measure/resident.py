"""The fresh process of the axis memory: load one artifact, run it, and print what was resident as a line of JSON.

It is run as `python -m featherweight.measure.resident JOB`, and imports as little as can be: all that it imports is
weighed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, float]:
    """Load `job["file"]` with the target `job["class"]`, run it, and give floor, peak and added bytes."""
    import numpy as np

    settings = {key: value for key, value in job["target"].items() if key != "name"}
    target = getattr(importlib.import_module(job["module"]), job["class"])(**settings)
    for package in target.packages[:1]:  # the runtime itself; the others only write artifacts
        importlib.import_module(package)
    with np.load(job["example"], allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    for name in job["free"]:
        arrays[name] = np.take(arrays[name], np.arange(job["size"]) % len(arrays[name]), axis=0)
    before, floor = peak(), resident()
    forget_peak()
    session = target.load(Path(job["file"]), job["threads"])
    for _ in range(job["runs"]):
        session(**arrays)
    after = peak()
    return {"floor_bytes": floor, "peak_bytes": max(before, after), "added_bytes": max(0, after - floor)}


def peak() -> int:
    """The most bytes that were resident in this process so far, or since `forget_peak`."""
    if sys.platform == "linux":  # not getrusage: after a fork it starts with the peak of the parent
        return _status("VmHWM")
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident() -> int:
    """Bytes that are resident now."""
    if sys.platform == "linux":
        return _status("VmRSS")
    import psutil

    return int(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    """Let the system count the peak anew from here, where it can: else the imports' own peak stands for the floor."""
    switch = Path("/proc/self/clear_refs")
    if os.access(switch, os.W_OK):
        switch.write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
