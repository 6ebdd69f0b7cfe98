"""What a teacher says of every training input: computed in one pass, kept on the disk, never computed again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from ...core.context import Context, fingerprint
from ...core.data import content_digest
from ...core.errors import TaskError
from ...core.files import value_digest, whole_file
from ...core.outputs import first
from .inputs import Numbered, NumberedBatches
from .teachers import Deployed, Recorded

LIMIT = 4 * 2**30  # bytes: what is kept without being asked for


class CannotKeepError(Exception):
    """Why a teacher's outputs do not fit into one array of a size that is taken without being asked for."""


@contextmanager
def recorded(
    teachers: Sequence[nn.Module], ctx: Context, data: Numbered, folder: str = "", limit: int | None = None
) -> Iterator[list[nn.Module]]:
    """Within this block each teacher's first output on every training input lies in an .npy file: float32, in order of
    the data.

    They stay in `folder`, where a later run with the same teacher and task takes them as they are; without one they
    are temporary. Raises `CannotKeepError` if outputs differ in shape from batch to batch, or one teacher's take more
    than `limit` bytes.
    """
    with ExitStack() as stack:
        home = Path(folder or stack.enter_context(TemporaryDirectory(prefix="featherweight-outputs-")))
        names = [_digest(each, ctx, data)[:16] if folder else str(place) for place, each in enumerate(teachers)]
        pairs = [(each, home / f"outputs-{name}.npy") for each, name in zip(teachers, names)]
        yield [each if isinstance(each, Recorded) else _record(each, path, ctx, data, limit) for each, path in pairs]


def _record(teacher: nn.Module, path: Path, ctx: Context, data: Numbered, limit: int | None) -> Recorded:
    if not path.is_file():
        with whole_file(path) as temporary:
            _fill(temporary, teacher, ctx, data, limit)
    outputs = np.load(path, mmap_mode="r", allow_pickle=False)
    return Recorded(outputs, data, ctx.device, several=outputs.ndim > _dimensions(teacher, ctx))


@torch.no_grad()
def _dimensions(teacher: nn.Module, ctx: Context) -> int:
    return first(ctx.task.call(teacher, next(ctx.batches("train")))).dim()


@torch.no_grad()
def _fill(path: Path, teacher: nn.Module, ctx: Context, data: Numbered, limit: int | None) -> None:
    outputs: np.memmap | None = None
    for batch in ctx.progress.track(ctx.batches("train"), "recording the teacher"):
        found = first(ctx.task.call(teacher, batch)).detach().float().cpu().numpy()
        index = data.index.numpy()
        rows, rest = divmod(len(found), len(index))
        if rest or not rows:
            raise CannotKeepError(f"{len(found)} rows of output for {len(index)} inputs")
        shape = found.shape[1:] if rows == 1 else (rows, *found.shape[1:])
        if outputs is None:
            if limit is not None and 4 * data.count * math.prod(shape) > limit:
                raise CannotKeepError(f"the outputs take more than {limit / 2**30:g} GiB")
            outputs = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(data.count, *shape))
        if outputs.shape[1:] != shape:
            raise CannotKeepError(f"outputs of shape {outputs.shape[1:]} and of shape {shape}")
        if not np.isfinite(found).all():
            raise TaskError("distill: a teacher gives NaN or infinite outputs on the training data")
        outputs[index] = found.reshape(len(index), *shape)
    assert outputs is not None  # check_outputs has seen a batch
    outputs.flush()


def _digest(teacher: nn.Module, ctx: Context, data: Numbered) -> str:
    """Of the teacher, and of the inputs in their order."""
    who = teacher.runner.manifest.digests if isinstance(teacher, Deployed) else fingerprint(teacher)
    ordered = content_digest(list(data.data)).hex() if isinstance(data, NumberedBatches) else ""
    return value_digest([who, ctx.task.digest, ordered])
