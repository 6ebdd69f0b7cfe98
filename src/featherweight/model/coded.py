"""The coded checkpoint: one file that holds a model near its entropy, and from which alone it can be rebuilt.

    magic (8 bytes) | length of the header, packed and plain (4 bytes each) | digest of the packed header (8)
    header: the skeleton, and for each tensor method, length and settings, as JSON, packed (see `core.coding.text`)
    for each tensor that takes bytes beside the header: digest of what it decodes to (8), and its bytes

Numbers are little-endian. Sizes are checked against the length of the file before anything is made room for.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ..core.coding import arrays, text
from ..core.coding.arrays import LAYOUTS, Coded
from ..core.errors import ArtifactError, OutputError
from ..core.files import tensor_digest as file_digest
from ..core.files import whole_file
from ..core.step import one_line
from .skeleton import Page

MAGIC = b"\x89FWC\r\n\x1a\n"
LENGTHS = struct.Struct("<II")
DIGEST = 8
HEADER_ROOM, HEADER_RATIO = 2**22, 128  # bytes of a header that any file may ask for, and for each byte it is packed in
ROOM, RATIO = 2**24, 2048  # bytes of tensors that any file may ask for, and for each byte of the file
DIMENSIONS = 64  # of a tensor
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Record(NamedTuple):
    """How one tensor lies in the file: method of the coder, the length of its bytes, settings of the coder."""

    method: str
    length: int
    settings: tuple[int, ...]

    @property
    def room(self) -> int:
        """The bytes that the tensor takes behind the header; one that takes none is held by the header's digest."""
        return self.length and DIGEST + self.length


class Header(BaseModel):
    """All that the file says beside the tensors: those of `page` follow in its order, each tied one once."""

    model_config = ConfigDict(extra="forbid")
    page: Page
    records: list[Record]
    notes: dict[str, Any] = {}


# -- writing ----------------------------------------------------------------------------------------------------------
def write(path: Path, page: Page, tensors: dict[str, Tensor], notes: dict[str, Any] | None = None) -> None:
    """Write the tensors of `page` to `path`; the file appears whole or not at all.

    Raises `OutputError` where the disk refuses, or for a model so repetitive that no reader would make room for it.
    """
    names = list(page.own())
    coded = [code(tensors[name]) for name in names]
    header = header_text(page, coded, notes or {})
    packed = text.pack(header)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + LENGTHS.pack(len(packed), len(header)) + _digest(packed) + packed)
        for name, each in zip(names, coded):
            file.write(tensor_digest(tensors[name]) + each.data if each.data else b"")
        file.flush()
        short = len(header) > HEADER_ROOM + HEADER_RATIO * len(packed)
        if short or sum(map(_bytes, tensors.values())) > ROOM + RATIO * temporary.stat().st_size:
            raise OutputError(f"cannot write {path}: it repeats itself so much that no reader would take it")


def header_text(page: Page, coded: list[Coded], notes: dict[str, Any]) -> bytes:
    """What the header says, as JSON; digests by which a saved folder is checked are left out."""
    records = [Record(each.method, len(each.data), each.settings) for each in coded]
    blank = {name: entry.model_copy(update={"digest": ""}) for name, entry in page.tensors.items()}
    header = Header(page=page.model_copy(update={"tensors": blank}), records=records, notes=notes)
    content = header.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def code(tensor: Tensor) -> Coded:
    """A tensor of any type as bytes near its entropy."""
    kind, matrix = _kind(tensor), _matrix(tensor)
    if kind in INTEGERS:
        found = arrays.code_integers(matrix.long().numpy())
    elif kind in LAYOUTS:
        found = arrays.code_floats(_patterns(matrix), LAYOUTS[kind])
    else:
        found = None
    return found or arrays.code_bytes(_raw(tensor))


def tensor_digest(tensor: Tensor) -> bytes:
    return _digest(_raw(tensor))


# -- reading ----------------------------------------------------------------------------------------------------------
class Reader:
    """A coded checkpoint: its `page` and `notes`, and its tensors one after the other.

    Raises `ArtifactError`, which names the tensor, for a file that is cut short, altered, or asks for too much.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.header, self.start = self._read_header(file)
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {str(error.strerror).lower()}") from error
        self.page, self.notes = self.header.page, self.header.notes
        self._check_sizes()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, decoded as it is asked for: only one is held here at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for (name, entry), record in zip(self.page.own().items(), self.header.records):
                digest, data = file.read(record.room - record.length), file.read(record.length)
                try:
                    found = decode(Coded(record.method, record.settings, data), entry.shape, entry.dtype)
                except ValueError as error:
                    raise self._altered(name, str(error)) from error
                if data and tensor_digest(found) != digest:
                    raise self._altered(name, "its digest differs")
                yield name, found

    def _altered(self, name: str, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: the tensor {name!r} was altered ({' '.join(reason.split())}); pack it again"
        )

    def _read_header(self, file: BinaryIO) -> tuple[Header, int]:
        fixed = file.read(len(MAGIC) + LENGTHS.size + DIGEST)
        if fixed[: len(MAGIC)] != MAGIC:
            raise ArtifactError(f"{self.path} is no coded checkpoint of featherweight")
        if len(fixed) < len(MAGIC) + LENGTHS.size + DIGEST:
            raise ArtifactError(f"{self.path} is cut short within its header; pack it again")
        packed, plain = LENGTHS.unpack(fixed[len(MAGIC) : -DIGEST])
        size = self.path.stat().st_size
        if len(fixed) + packed > size:
            raise ArtifactError(f"{self.path} is cut short within its header; pack it again")
        if plain > HEADER_ROOM + HEADER_RATIO * packed:
            raise ArtifactError(f"{self.path}: its header was altered (it says to be {plain} bytes); pack it again")
        data = file.read(packed)
        if _digest(data) != fixed[-DIGEST:]:
            raise ArtifactError(f"{self.path}: its header was altered (its digest differs); pack it again")
        return self._parse(data, plain), len(fixed) + packed

    def _parse(self, data: bytes, plain: int) -> Header:
        try:
            return Header.model_validate(json.loads(text.unpack(data, plain)))
        except ValidationError as error:
            raise ArtifactError(f"{self.path}: its header is damaged: {one_line(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.path}: its header is damaged: {' '.join(str(error).split())}") from error

    def _check_sizes(self) -> None:
        """Before any room is made: lengths that fill the file, known types, and shapes that such a file can hold."""
        own, records, size = self.page.own(), self.header.records, self.path.stat().st_size
        if len(own) != len(records):
            raise ArtifactError(f"{self.path}: its header names {len(own)} tensors and holds {len(records)}")
        room, end = ROOM + RATIO * size, self.start
        for (name, entry), record in zip(own.items(), records):
            kind = getattr(torch, entry.dtype, None)
            if not isinstance(kind, torch.dtype) or record.length < 0 or not _possible(entry.shape):
                raise self._altered(name, "it has no form that a tensor can have")
            room -= math.prod(entry.shape) * kind.itemsize
            if room < 0:
                raise self._altered(name, "it asks for more memory than such a file can fill")
            end += record.room
            if end > size:
                raise ArtifactError(f"{self.path} is cut short: the tensor {name!r} is not whole; pack it again")
        if end != size:
            raise ArtifactError(f"{self.path} was altered: {size - end} bytes follow the last tensor; pack it again")


def decode(coded: Coded, shape: list[int], kind: str) -> Tensor:
    """The tensor; `ValueError` if that is not what the bytes hold."""
    rows, columns = _rows(shape)
    dtype = getattr(torch, kind)
    if coded.method == "bytes" or (kind not in INTEGERS and kind not in LAYOUTS):
        data = arrays.decode_bytes(coded, math.prod(shape) * dtype.itemsize)
        return (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)
        )
    if kind in LAYOUTS:
        patterns = arrays.decode_floats(coded, (rows, columns), LAYOUTS[kind])
        narrow = patterns.astype(f"u{dtype.itemsize}").view(f"i{dtype.itemsize}")
        return torch.from_numpy(narrow).view(dtype).reshape(shape)
    values = arrays.decode_integers(coded, (rows, columns))
    if kind != "int64" and values.size:
        low, high = (0, 1) if kind == "bool" else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if int(values.min()) < low or int(values.max()) > high:
            raise ValueError(f"an integer beyond {kind}")
    return torch.from_numpy(values).to(dtype).reshape(shape)


def digested(page: Page, tensors: dict[str, Tensor]) -> Page:
    """`page` with the digests by which a saved folder is checked."""
    return page.model_copy(
        update={
            "tensors": {
                name: entry.model_copy(update={"digest": file_digest({"": tensors[entry.tied or name]})})
                for name, entry in page.tensors.items()
            }
        }
    )


# -- forms ------------------------------------------------------------------------------------------------------------
def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rows(shape: list[int]) -> tuple[int, int]:
    """A tensor as a matrix: its first dimension by all others; a vector is one row."""
    count = math.prod(shape)
    rows = shape[0] if len(shape) > 1 and count else 1
    return rows, count // rows


def _possible(shape: list[int]) -> bool:
    """Whether a tensor can have this shape, empty ones among them."""
    full = math.prod(max(1, each) for each in shape[:DIMENSIONS])
    return len(shape) <= DIMENSIONS and all(each >= 0 for each in shape) and full < 2**62


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(_rows(list(tensor.shape)))


def _patterns(matrix: Tensor) -> NDArray[np.uint64]:
    size = matrix.element_size()
    return matrix.view(PATTERNS[size]).numpy().view(f"u{size}").astype(np.uint64)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]
