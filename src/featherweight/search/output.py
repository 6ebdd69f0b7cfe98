"""The output folder of a run: whose it is, and what may be lying in it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import OutputError
from ..core.files import OLD, PART, disk_message, recover_folders, write_json

JOB, RUN, STUDY = "job.json", "run.json", "study.db"
FAILURES = "failures"  # tracebacks of trials that failed for a reason that may not be their recipe's
WORK, LOCK = ".work", ".lock"
MADE = ("original", "artifact", "model", "recipe.yaml", "readings.json")
BASELINE = ".baseline.npz"  # what was measured of the original; the next run of the same job compares with the same


@contextlib.contextmanager
def claim(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """Hold `out` for the run described by `job`: new, empty, or left by an earlier run of the same job, which is gone
    on with.

    `out/job.json` says whose the folder is. What an interrupted run left half done is cleared away. If the block
    fails before anything was finished, what was made here is removed again. Raises `OutputError` if `out` is a file,
    holds something else, is in use by another process, or cannot be written.
    """
    existed = out.is_dir()
    with disk_guard(out):
        _check_free(out, job)
        _make(out)
        with _lock(out):
            _clear(out)
            if not (out / JOB).exists():
                write_json(out / JOB, job)
            try:
                yield out
            except BaseException:
                if not (out / STUDY).exists() and not (out / RUN).exists():
                    _abandon(out, existed)
                raise
            shutil.rmtree(out / WORK, ignore_errors=True)


@contextlib.contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """A new or empty folder, made now so that a path that cannot be written fails before the work; if the block fails,
    what was made here is removed again. Raises `OutputError` as `claim` does.
    """
    existed = out.is_dir()
    with disk_guard(out):
        if out.exists() and (not existed or any(out.iterdir())):
            raise OutputError(f"{out} is not an empty folder; choose another one")
        _make(out)
        try:
            yield out
        except BaseException:
            for file in out.iterdir():
                file.unlink()
            if not existed:
                out.rmdir()
            raise


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Hold the folder of a finished run against other processes; raises `OutputError` as `claim` does."""
    with disk_guard(out), _lock(out):
        yield


def work_folder(out: Path, name: str) -> Path:
    """A path below `out` for what is only needed during the run."""
    folder = out / WORK
    folder.mkdir(exist_ok=True)
    return folder / name


def finished(out: Path) -> bool:
    """Whether a run in `out` came to its end."""
    return (out / RUN).is_file()


@contextlib.contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn any error that comes from a full or unwritable disk, however deep, into one `OutputError` about `path`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if (message := disk_message(error, path)) is not None:
            raise OutputError(message) from error
        raise


def _check_free(out: Path, job: dict[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose a folder")
    if not out.is_dir() or (not _content(out)):
        return
    if not (out / JOB).is_file():
        raise OutputError(f"the folder {out} is not empty; choose another one, or empty it")
    try:
        found = json.loads((out / JOB).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{out / JOB} cannot be read; choose another folder") from error
    differing = sorted(name for name in job.keys() | found.keys() if job.get(name) != found.get(name))
    if differing:
        raise OutputError(
            f"the folder {out} holds another run (it differs in: {', '.join(differing)}); choose another folder"
        )


def _content(out: Path) -> list[str]:
    """What lies in `out` beside what a run leaves that was killed in its first moments."""
    return [
        path.name for path in out.iterdir() if path.name not in (LOCK, WORK) and not path.name.startswith(f".{JOB}.")
    ]


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOCK).touch()
    except OSError as error:
        raise OutputError(
            f"cannot write {out}: {str(error.strerror).lower()}; choose a folder that can be written"
        ) from error


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep other processes out of `out`; the system ends the lock with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are not noticed there
        yield
        return
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another run is working in {out}; wait for it, or choose another folder") from error
        yield


def _clear(out: Path) -> None:
    """Remove what a killed run left half written: candidates in work, and temporary names."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    recover_folders(out)
    stale = [path for path in out.iterdir() if path.name.startswith(".") and path.suffix in (PART, OLD)]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _abandon(out: Path, existed: bool) -> None:
    """Remove what a run made that failed before anything was finished; `out` can be used for another job then."""
    for name in (*MADE, BASELINE, WORK, JOB, LOCK):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not existed and not any(out.iterdir()):
        out.rmdir()
