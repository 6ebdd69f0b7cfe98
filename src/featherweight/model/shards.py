"""Folders of safetensors files, read and written a few tensors at a time: nothing is mapped, only what is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import ArtifactError
from ..core.files import write_json

INDEX = "model.safetensors.index.json"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Shards:
    """The tensors of all safetensors files in a folder by name; each is read from the disk when it is asked for.

    Raises `ArtifactError` if there is no such file or one is damaged.
    """

    def __init__(self, folder: Path):
        self.places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ArtifactError(f"{folder} holds no safetensors file")
        for file in files:
            start, header = _header(file)
            for name, entry in header.items():
                if name != "__metadata__":
                    self.places[name] = (file, start, entry)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def names(self) -> list[str]:
        return list(self.places)

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in memory of its own."""
        if name not in self.places:
            raise ArtifactError(f"no shard holds the tensor {name!r}")
        file, start, entry = self.places[name]
        low, high = entry["data_offsets"]
        kind, shape = TYPES.get(entry["dtype"]), entry["shape"]
        if kind is None or high - low != math.prod(shape) * kind.itemsize:
            raise ArtifactError(
                f"{file}: the tensor {name!r} has a form that cannot be read ({entry['dtype']} {shape})"
            )
        content = torch.empty(shape, dtype=kind)
        if high > low:
            view = content.view(-1).view(torch.uint8).numpy().data
            with file.open("rb") as stream:
                stream.seek(start + low)
                if stream.readinto(view) != high - low:
                    raise ArtifactError(f"{file} is cut short: the tensor {name!r} is not all there")
        return content


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a file start, and what lies where."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError
            return 8 + length, json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged: it has no header of safetensors") from error


class ShardWriter:
    """Writes tensors to numbered files in a folder, one file for each `add`; `close` writes the index."""

    def __init__(self, folder: Path):
        self.folder, self.index, self.size = folder, {}, 0
        self.count = 0

    index: dict[str, str]

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write these tensors as one file."""
        if tensors:
            name = f"model-{self.count:05d}.safetensors"
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, self.folder / name)
            self.index |= dict.fromkeys(tensors, name)
            self.size += sum(value.numel() * value.element_size() for value in tensors.values())
            self.count += 1

    def close(self) -> None:
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.size}, "weight_map": self.index})
