"""Who teaches: the original, tasks, saved models, deployed artifacts, and outputs that lie on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import TaskError
from ...core.files import file_digest
from ...core.outputs import first
from ...core.target import Artifact
from ...core.task import find_task
from ...model import skeleton
from .inputs import Numbered

MANIFEST = "manifest.json"


class Deployed(nn.Module):
    """An artifact that is called as the torch model is: it runs in its runtime, on the CPU, and gives tensors."""

    def __init__(self, folder: str | Path, device: torch.device):
        super().__init__()
        self.runner, self.device = Artifact(folder).open(torch.get_num_threads()), device

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        found = self.runner(*map(_array, given), **{name: _array(tensor) for name, tensor in named.items()})
        if isinstance(found, dict):
            return {name: self._tensor(array) for name, array in found.items()}
        return tuple(map(self._tensor, found)) if isinstance(found, tuple) else self._tensor(found)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


class Recorded(nn.Module):
    """Outputs that were computed before, one for each training input in order: gives those of the batch at hand.

    `outputs` is inputs x ..., or, with `several` rows of output for each input, inputs x rows x .... It is asked for
    what `data` handed out last, whatever it is called with.
    """

    def __init__(self, outputs: np.ndarray, data: Numbered, device: torch.device, several: bool = False):
        super().__init__()
        self.outputs, self.data, self.device, self.several = outputs, data, device, several

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        rows = torch.from_numpy(np.asarray(self.outputs[self.data.index.numpy()], dtype=np.float32))
        return (rows.flatten(0, 1) if self.several else rows).to(self.device)


def find_teacher(spec: str, ctx: Context, data: Numbered | None) -> nn.Module:
    """The teacher that `spec` names: a task, a folder with an artifact or a saved model, or an .npy file of outputs.

    `data` are the training inputs by number, which outputs on the disk need; None where their order is not known or
    they differ each time.
    """
    path = Path(spec)
    if path.suffix == ".npy":
        return _recorded(path, ctx, data)
    if (path / MANIFEST).is_file():
        return Deployed(path, ctx.device).eval()
    teacher = skeleton.load(path, like=ctx.task.original) if path.is_dir() else find_task(spec).original
    return teacher.to(ctx.device).eval()


def _recorded(path: Path, ctx: Context, data: Numbered | None) -> nn.Module:
    if not path.is_file():
        raise TaskError(f"distill: there is no file {path}; give outputs of a teacher, one for each training input")
    if data is None:
        raise TaskError(
            f"distill: {path} holds one output for each training input, but the training data differ each time they "
            "are gone through; take augmentation and shuffling off the data set, or give the teacher itself"
        )
    try:
        outputs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise TaskError(f"distill: {path} is no array of numbers: {' '.join(str(error).split())[:120]}") from error
    if outputs.dtype.kind not in "fiu" or len(outputs) != data.count:
        raise TaskError(
            f"distill: {path} holds {len(outputs)} outputs of type {outputs.dtype}, but there are {data.count} "
            "training inputs; give one row of numbers for each, in order"
        )
    return Recorded(outputs, data, ctx.device)


def teacher_digests(specs: Sequence[str]) -> dict[str, str]:
    """What the folders and files named in `specs` hold, so that another teacher there is another recipe."""
    found: dict[str, str] = {}
    for spec in specs:
        file = spec.rpartition(":")[0] if spec.rpartition(":")[0].endswith(".py") else spec
        for page in (Path(spec) / MANIFEST, Path(spec) / skeleton.PAGE, Path(file)):
            if page.is_file():
                found[spec] = file_digest(page)
                break
    return found


@torch.no_grad()
def check_outputs(kind: str, model: nn.Module, teachers: Sequence[nn.Module], ctx: Context) -> None:
    """Refuse, before any training, a teacher that cannot run on this task's data or answers in another shape."""
    batch = next(ctx.batches("train"), None)
    if batch is None:
        raise TaskError(f"task {ctx.task.name}: the split 'train' is empty, which {kind} needs")
    wanted = first(ctx.task.call(model.eval(), batch)).shape
    for place, teacher in enumerate(teachers):
        try:
            found = first(ctx.task.call(teacher, batch)).shape
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise TaskError(f"{kind}: teacher {place} fails on the task's inputs: {text}") from error
        if found != wanted:
            raise TaskError(
                f"{kind}: teacher {place} gives outputs of shape {tuple(found)}, the model {tuple(wanted)}; "
                "take teachers with the same outputs"
            )
