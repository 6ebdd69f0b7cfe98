"""Prefixes of recipes, each computed once and kept under a size limit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..core.context import Context, run_step
from ..core.errors import ArtifactError, OutputError
from ..core.files import file_digest, folder_size, recover_folder, value_digest, whole_folder, write_json
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.record import StepRecord
from ..core.step import Step
from ..model import skeleton
from .output import disk_guard

ENTRY, MODEL = "entry.json", "model"
LIMIT = 4 * 2**30  # bytes
CODE = ("core", "model", "methods")  # the folders of the package whose code decides what a step makes


class Entry(BaseModel):
    """What lies beside a stored model: what the steps reported, and the digest of every file of the model."""

    model_config = ConfigDict(extra="forbid")
    records: list[StepRecord]
    digests: dict[str, str]


class Store:
    """Models after each prefix of a recipe, one folder per digest; the least recently used go first when `limit`
    bytes are exceeded.

    Every entry is written whole, and compared with its digests when it is read; a damaged one is removed and computed
    again. Where the folder cannot be written to, that is said once and the work goes on without it.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT, progress: Progress | None = None):
        self.folder, self.limit, self.progress = folder or default_folder(), limit, progress or Progress()
        self.writable = True

    def get(self, key: str, ctx: Context, like: nn.Module | None = None) -> tuple[nn.Module, list[StepRecord]] | None:
        """The model stored under `key` and the records of its steps; None if there is none that is whole.

        It is built like `like`, the task's own model by default.
        """
        folder = self.folder / key
        recover_folder(folder)
        if not (folder / ENTRY).is_file():
            return None
        try:
            entry = Entry.model_validate_json((folder / ENTRY).read_text(encoding="utf-8"))
            for name, digest in entry.digests.items():
                if file_digest(folder / name) != digest:
                    raise ArtifactError(f"{name} differs from its digest")
            model = skeleton.load(folder / MODEL, like=ctx.task.original if like is None else like)
        except (OSError, ValueError, ArtifactError) as error:
            self.progress.say(f"a stored model is damaged and is computed again ({error})")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        _touch(folder)
        return model.eval().to(ctx.device), entry.records

    def put(self, key: str, model: nn.Module, records: list[StepRecord]) -> None:
        """Keep `model` under `key`, whole or not at all, and make room for it."""
        if not self.writable:
            return
        try:
            with disk_guard(self.folder), whole_folder(self.folder / key) as temporary:
                skeleton.save(model, temporary / MODEL)
                files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
                entry = Entry(
                    records=records, digests={str(path.relative_to(temporary)): file_digest(path) for path in files}
                )
                write_json(temporary / ENTRY, entry.model_dump(mode="json"))
            self._make_room()
        except (OSError, OutputError) as error:
            self.writable = False
            self.progress.say(
                f"models between steps are not kept ({error}); the run goes on, but a repeat computes them again"
            )

    def _make_room(self) -> None:
        entries = sorted(
            (path for path in self.folder.iterdir() if (path / ENTRY).is_file()), key=lambda path: path.stat().st_mtime
        )
        sizes = {path: folder_size(path) for path in entries}
        total = sum(sizes.values())
        for path in entries:
            if total <= self.limit:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def default_folder() -> Path:
    """`prefixes` in FEATHERWEIGHT_CACHE, or in the user's cache folder."""
    home = os.environ.get("FEATHERWEIGHT_CACHE") or Path.home() / ".cache" / "featherweight"
    return Path(home) / "prefixes"


def build(recipe: Recipe, ctx: Context, store: Store) -> tuple[nn.Module, list[StepRecord]]:
    """The model after every step of `recipe`, and what each step reported; goes on from the longest prefix that
    `store` holds.

    After each step the work goes on with the model as it was read back from the store, so that a run which was
    interrupted computes the same as one that was not. Raises what a step raises, such as `NoEffect` or `NotFinite`.
    """
    keys = [prefix_key(recipe.steps[: place + 1], ctx) for place in range(len(recipe.steps))]
    model, done, like = ctx.task.fresh(), 0, recipe.architecture(ctx.task)
    records: list[StepRecord] = []
    for place in range(len(keys), 0, -1):
        if (found := store.get(keys[place - 1], ctx, like)) is not None:
            (model, records), done = found, place
            break
    for place in range(done, len(keys)):
        item = recipe.steps[place]
        ctx.progress.say(f"step {place + 1} of {len(keys)}: {item.kind}")
        model, record = run_step(item, model, ctx)
        records = [*records, record]
        store.put(keys[place], model, records)
        if (kept := store.get(keys[place], ctx, like)) is not None:
            model = kept[0]
    return model, records


def prefix_key(steps: tuple[Step, ...], ctx: Context) -> str:
    """Digest of all that decides what the model is after `steps`: task, seed, steps, code, versions, device, and the
    target's width, or the target itself for steps that measure on it.
    """
    return value_digest(
        {
            "task": ctx.task.digest,
            "seed": ctx.seed,
            "width_multiple": ctx.width_multiple,
            "stopwatch": ctx.stopwatch.name if ctx.stopwatch and any(item.timed for item in steps) else "",
            "device": ctx.device.type,
            "steps": [item.full() for item in steps],
            "code": [code_digest(), *(_source_digest(type(item)) for item in steps)],
            "versions": {name: version(name) for name in ("featherweight", "torch")},
        }
    )


@functools.cache
def code_digest() -> str:
    """SHA-256 over the source of the package's folders that decide what a step makes, so that a changed method is
    never mistaken for the old one.
    """
    digest, home = hashlib.sha256(), Path(__file__).parent.parent
    for folder in CODE:
        for path in sorted((home / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(home)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _source_digest(kind: type[Step]) -> str:
    file = inspect.getsourcefile(kind)
    return file_digest(Path(file)) if file and Path(file).is_file() else ""


def _touch(folder: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # a cache that can only be read, or that another run just made room in, still served its model
        os.utime(folder)
