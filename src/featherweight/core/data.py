"""Data as batches: from map-style data sets or from any iterable that already yields batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TaskError
from .files import tensor_digest


class Arrays:
    """A map-style data set over tensors that share their first dimension; whole batches are indexed at once.

    An item is a tuple with one entry per tensor. `augment` (if given) changes the first tensor of a training batch; it
    gets the batch and a `torch.Generator`. `convert` (if given) is applied to the first tensor of every batch, after
    `augment`: data may be kept as bytes and become floats only when they are used.
    """

    def __init__(
        self,
        *tensors: Tensor,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ):
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"the tensors must have one length; they have {sorted(lengths)}")
        self.tensors, self.augment, self.convert = tensors, augment, convert

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(items[0] for items in self.batch(torch.tensor([index])))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The items at `index` as one batch; augmented when a generator is given."""
        items = tuple(tensor[index] for tensor in self.tensors)
        if self.augment is not None and generator is not None:
            items = (self.augment(items[0], generator), *items[1:])
        if self.convert is not None:
            items = (self.convert(items[0]), *items[1:])
        return items


def is_map_style(data: Any) -> bool:
    """Whether `data` has a length and can be indexed by an integer, but is no list or tuple of ready batches."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | tuple | Mapping)


def batches(data: Any, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Any]:
    """Batches of `data`: in order, or shuffled (and augmented) by `generator`. An iterable of batches is passed through
    as it is.
    """
    if not is_map_style(data):
        yield from data
        return
    count = len(data)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for start in range(0, count, batch_size):
        index = order[start : start + batch_size]
        if hasattr(data, "batch"):
            yield data.batch(index, generator)
        else:
            yield torch.utils.data.default_collate([data[int(item)] for item in index])


def to_device(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it moved to `device`; tuples, lists and mappings keep their form."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)


# -- what data are ----------------------------------------------------------------------------------------------------
def content_digest(value: Any) -> bytes:
    """SHA-256 of tensors, arrays, numbers and text in nested tuples, lists and mappings, with their form.

    Raises `TaskError` for anything else: what cannot be hashed would not be told from other data.
    """
    digest = hashlib.sha256(type(value).__name__.encode())
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        value = torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, Tensor):
        digest.update(tensor_digest({"": value}).encode())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(repr(key).encode() + content_digest(value[key]))
    elif isinstance(value, np.ndarray | tuple | list):
        for item in value:
            digest.update(content_digest(item))
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex):
        digest.update(repr(value).encode())
    else:
        raise TaskError(f"a batch holds {type(value).__name__}, which has no digest; give the task a fingerprint")
    return digest.digest()


def unordered_digest(listed: Iterator[Any]) -> bytes:
    """A digest of batches that depends neither on the order of the inputs nor on where one batch ends."""
    total = 0
    for batch in listed:
        first = next(tensors_in(batch), None)
        count = 1 if first is None or first.dim() == 0 else len(first)
        for place in range(count):
            total += int.from_bytes(content_digest(_row(batch, place, count)))
    return (total % 2**256).to_bytes(32)


def _row(value: Any, place: int, count: int) -> Any:
    """One input of a batch of `count`: the entry at `place` of all that has one per input."""
    if isinstance(value, Tensor | np.ndarray):
        return value[place] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _row(item, place, count) for key, item in value.items()}
    if isinstance(value, tuple | list):
        plain = not any(isinstance(item, Tensor | np.ndarray | Mapping | tuple | list) for item in value)
        return value[place] if plain and len(value) == count else [_row(item, place, count) for item in value]
    return value
