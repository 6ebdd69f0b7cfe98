"""Files that appear whole or not at all, what it means when the disk refuses, and digests of what files hold."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError

if TYPE_CHECKING:
    import torch

PART, OLD = ".part", ".old"  # how the names of folders end that are being written, and that are being replaced
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FULL_WORDS = (  # how libraries say that the disk is full; the last two, ONNX Runtime and torch, do not say why
    "no space left on device",
    "database or disk is full",
    "failed to write external initializers",
    "failed writing file",
)
REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO})


def disk_message(error: BaseException, path: Path | None = None) -> str | None:
    """One line about a disk that is full or refuses a path, if `error`, or what it was raised from, says so; else None.

    `path` is what was to be written: refusals of paths elsewhere are not about it. Without it any path counts.
    """
    seen: BaseException | None = error
    while seen is not None:
        named = path or getattr(seen, "filename", None)
        if (reason := _full(seen)) is not None:
            return f"cannot write{f' {named}' if named else ''}: {reason}; free some space or choose another folder"
        if isinstance(seen, OSError) and seen.errno in REFUSED and seen.filename is not None:
            reason = str(seen.strerror).lower()
            if path is None:
                return f"cannot use {seen.filename}: {reason}; check the path, and who may use it"
            if _belongs(Path(os.fsdecode(seen.filename)), path):
                return f"cannot write {path}: {reason}; choose a folder that can be written"
        seen = seen.__cause__
    return None


def _full(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in FULL:
        return os.strerror(error.errno).lower()
    return FULL_WORDS[0] if any(words in str(error).lower() for words in FULL_WORDS) else None


def _belongs(named: Path, path: Path) -> bool:
    """Whether `named` is `path`, lies below it, or is or lies below a temporary name for it."""
    home = path.absolute()
    try:
        first = named.absolute().relative_to(home.parent).parts[:1]
    except ValueError:
        return False
    return first == (home.name,) or (first != () and first[0].startswith(f".{home.name}."))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of the disk about `path` into one `OutputError`; any other passes as it is."""
    try:
        yield
    except OSError as error:
        if (message := disk_message(error, path)) is None:
            raise
        raise OutputError(message) from error


def _beside(path: Path, make: Callable[..., Any]) -> Any:
    """What `make` makes in the folder of `path` under a temporary name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return make(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    except OSError as error:
        reason = disk_message(error) if error.errno in FULL else None
        said = reason or f"cannot write {path}: {str(error.strerror).lower()}; choose a folder that can be written"
        raise OutputError(said) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place, synced, only if the block succeeds.

    Raises `OutputError` where the disk is full or refuses; any other error of the block passes as it is.
    """
    path = Path(path)
    handle, name = _beside(path, tempfile.mkstemp)
    os.close(handle)
    temporary = Path(name)
    try:
        with _explained(path):
            yield temporary
            temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
            _sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; move it into place only if the block succeeds, replacing what was
    there.

    Raises `OutputError` where the disk is full or refuses; any other error of the block passes as it is.
    """
    path = Path(path)
    temporary = Path(_beside(path, tempfile.mkdtemp))
    try:
        with _explained(path):
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, path: Path) -> None:
    """Put the folder `source` in the place of `path`, whose old content is removed.

    Where the system can exchange two names, there is a whole folder at `path` at every moment. Where it cannot, the old
    one has another name for a moment, and `recover_folder` finds it again if the process is killed then.
    """
    recover_folder(path)
    for stale in _displaced(path):
        _remove(stale)
    while path.exists():
        if _exchange(source, path):
            _remove(source)
            return
        if _swapped(source, path):
            return
    source.rename(path)


def recover_folder(path: Path) -> None:
    """Put the old folder back to `path` where a process was killed while it replaced it and nothing is there."""
    if not path.exists() and (found := _displaced(path)):
        with contextlib.suppress(OSError):  # another process recovers or replaces it as well
            max(found, key=lambda old: old.stat().st_ctime).rename(path)


def recover_folders(parent: Path) -> None:
    """`recover_folder` for every folder in `parent`."""
    for old in sorted(parent.glob(f".*{OLD}")):
        recover_folder(parent / old.name[1:].rsplit(".", 2)[0])


def _displaced(path: Path) -> list[Path]:
    """Folders that were at `path` and got another name while they were replaced."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*{OLD}"))


def _swapped(source: Path, path: Path) -> bool:
    """Replace `path` by two renames; False if another process put something there between them."""
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}{OLD}")
    path.rename(old)
    try:
        source.rename(path)
    except OSError as error:
        if path.exists() and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            _remove(old)
            return False
        old.rename(path)
        raise
    _remove(old)
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    call = _renameat2()
    here, at_once = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), at_once) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The system call of Linux that exchanges two names; None elsewhere, or where the C library does not have it."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def value_digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, in order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
