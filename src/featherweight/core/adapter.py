"""Adapter files: the tensors that turn one base into something else, each file with the digest of that base.

Nothing here loads torch: a process that only runs an artifact switches adapters too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .errors import ArtifactError
from .files import whole_file

FILE = "adapter.safetensors"  # beside an artifact: the adapter that it was exported with
FORMAT = "featherweight adapter 1"
GAIN = "gain"  # the last part of the name of tensors that multiply
WHOLE = "prompt"  # the last part of the name of tensors that nothing can stand for
Slots = Mapping[str, list[int]]  # name of a tensor -> its shape, with -1 where an adapter chooses the size
Places = dict[str, tuple[str, dict[str, Any]]]  # name of a layer -> what stands around it, and what that is built from


@runtime_checkable
class Switching(Protocol):
    """A session whose adapter can be exchanged while the base stays loaded."""

    def use(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Run with these tensors in the slots from now on."""


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds: the digest of its base, what stands around which layers, and the tensors by name."""

    base: str
    places: Places
    tensors: dict[str, np.ndarray]

    def write(self, path: Path) -> None:
        """Write the file; it appears whole or not at all."""
        from safetensors.numpy import save_file

        about = {"format": FORMAT, "base": self.base, "places": json.dumps(self.places), "digest": self.digest()}
        with whole_file(path) as temporary:
            save_file({name: np.ascontiguousarray(each) for name, each in self.tensors.items()}, temporary, about)

    def digest(self) -> str:
        """SHA-256 over all that the file holds."""
        found = hashlib.sha256(json.dumps([self.base, self.places], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode() + np.ascontiguousarray(tensor).tobytes())
        return found.hexdigest()

    @classmethod
    def read(cls, path: str | Path) -> AdapterFile:
        """What `write` wrote; raises `ArtifactError` for a file that is missing, damaged, or something else."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise ArtifactError(f"there is no adapter file {path}")
        try:
            with safe_open(path, framework="np") as file:
                about, names = file.metadata() or {}, list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            places = {name: (kind, settings) for name, (kind, settings) in json.loads(about["places"]).items()}
            found = cls(about["base"], places, tensors)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"the adapter file {path} is damaged: {' '.join(str(error).split())}") from error
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} is no adapter file of this package; save_adapter writes one") from error
        if about.get("format") != FORMAT or about.get("digest") != found.digest():
            raise ArtifactError(f"the adapter file {path} was altered (its digest differs); write it again")
        return found

    def fitting(self, base: str, slots: Slots, places: Places, path: str | Path) -> dict[str, np.ndarray]:
        """A tensor for each slot of a base: this file's, and what stands for no adapter where it has none.

        `places` are those of the adapter that the slots were made for. Raises `ArtifactError` if the file belongs to
        another base, a tensor of it fits no slot, or an adapter of it computes something else with its tensors.
        """
        self.check_base(base, path)
        for place, own in self.places.items():
            if place in places and _computed(own) != _computed(places[place]):
                raise ArtifactError(
                    f"the adapter {path} has a {_shown(own)} at {place!r}, where this artifact computes a "
                    f"{_shown(places[place])}; export the base with an adapter of that kind on that layer"
                )
        for name, tensor in self.tensors.items():
            if name not in slots:
                raise ArtifactError(
                    f"the adapter {path} has {name!r}, for which this artifact has no slot; "
                    "export the base with an adapter of that kind on that layer"
                )
            if not _fits(tensor.shape, slots[name]):
                wanted = " x ".join("any" if size < 0 else str(size) for size in slots[name])
                given = " x ".join(map(str, tensor.shape))
                raise ArtifactError(f"the adapter {path} has {name!r} of {given}; this artifact takes {wanted}")
        missing = {name: slot for name, slot in slots.items() if name not in self.tensors}
        return {**self.tensors, **none(missing)}

    def check_base(self, base: str, path: str | Path) -> None:
        """Raise `ArtifactError` unless this file was trained on the base with that digest."""
        if self.base != base:
            raise ArtifactError(
                f"the adapter {path} belongs to another base (digest {self.base[:12]}, this one's is {base[:12]}); "
                "train it on this one"
            )


def _computed(place: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What an adapter computes, whatever its sizes, which its tensors show."""
    kind, settings = place
    return kind, {name: value for name, value in settings.items() if not isinstance(value, int)}


def _shown(place: tuple[str, dict[str, Any]]) -> str:
    kind, settings = _computed(place)
    return f"{kind} ({', '.join(f'{name}: {value}' for name, value in settings.items())})" if settings else kind


def _fits(shape: tuple[int, ...], slot: list[int]) -> bool:
    return len(shape) == len(slot) and all(size in (-1, given) for size, given in zip(slot, shape))


def none(slots: Slots) -> dict[str, np.ndarray]:
    """What stands for no adapter in these slots: rank 0 where the rank is free, a factor of one, else zeros.

    Raises `ArtifactError` for slots that must be filled.
    """
    found = {}
    for name, slot in slots.items():
        last, shape = name.rpartition(".")[2], [max(size, 0) for size in slot]
        if last == WHOLE:
            raise ArtifactError(
                f"the adapter tensor {name!r} is a prompt, which cannot be left out of this artifact; "
                "for the base alone open an artifact of the base"
            )
        found[name] = np.ones(shape, np.float32) if last == GAIN else np.zeros(shape, np.float32)
    return found
