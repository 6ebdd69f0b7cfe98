"""A target that computes one small network with numpy alone, and artifacts of it that misbehave in one chosen way.

Measuring can be tested against it to the microsecond and the microjoule: how long it takes, what it allocates, what it
gives and what it counts on an energy counter are settings.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from featherweight.core.target import Artifact, Session, Target, Work

if TYPE_CHECKING:  # the memory tests say that a process which runs this target holds no torch
    from torch import Tensor, nn

    from featherweight.core.encoding import Encoding


class NumpyTarget(Target):
    """Runs `TwoInputs` of tests/measured_task.py with numpy."""

    name: ClassVar[str] = "numpy"
    file: ClassVar[str] = "weights.npz"

    delay: float = 0.0  # seconds that each call takes besides
    spoil: bool = False  # give NaN in the second output
    flip: int = 0  # name another class for this many of the inputs of each batch
    hold: int = 0  # bytes that stay allocated once it is loaded
    counter: str = ""  # a file in which each call adds `microjoules`
    microjoules: int = 0
    fail: str = ""  # raise this in load

    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        np.savez(path, **{name: tensor.numpy() for name, tensor in plain.state_dict().items()})  # type: ignore[arg-type]

    def load(self, path: Path, threads: int = 1) -> Session:
        if self.fail:
            raise RuntimeError(self.fail)
        with np.load(path) as file:
            weights = {name: file[name] for name in file.files}
        held = np.ones(self.hold, dtype=np.uint8)

        def run(x: np.ndarray, kind: np.ndarray) -> list[np.ndarray]:
            time.sleep(self.delay + 0 * held.size)
            hidden = np.maximum(
                (x + weights["embed.weight"][kind]) @ weights["first.weight"].T + weights["first.bias"], 0
            )
            logits = hidden @ weights["second.weight"].T + weights["second.bias"]
            logits[: self.flip] = -logits[: self.flip]
            self._count()
            return [logits, hidden * (np.nan if self.spoil else 1)]

        return run

    def _count(self) -> None:
        if self.counter:
            path = Path(self.counter)
            limit = int((path.parent / "max_energy_range_uj").read_text())
            path.write_text(str((int(path.read_text()) + self.microjoules) % (limit + 1)))

    def stored(self, path: Path) -> dict[str, str]:
        with np.load(path) as file:
            return {name: str(file[name].dtype) for name in file.files}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        with np.load(path) as file:
            sizes = {name: file[name].size for name in file.files}
        return Work(
            parameters=sum(sizes.values()),
            macs=sizes["first.weight"] + sizes["second.weight"],
            weight_bytes=4 * sum(sizes.values()),
        )


def variant(artifact: Artifact, folder: Path, work: dict[str, Any] | None = None, **settings: Any) -> Artifact:
    """A copy of `artifact` in `folder` whose target has these settings, and whose manifest states this work."""
    shutil.copytree(artifact.folder, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["target"] |= settings
    manifest["work"] |= work or {}
    path.write_text(json.dumps(manifest))
    return Artifact(folder)
