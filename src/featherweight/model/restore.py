"""Encodings' own operations as a graph: from what lies on the disk to the weight."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..core.encoding import Encoding


class Restore(nn.Module):
    """Computes each weight from the parts of its encoding, which are the inputs: one mapping per weight."""

    def __init__(self, encodings: Sequence[Encoding]):
        super().__init__()
        self.encodings = tuple(encodings)

    def forward(self, parts: list[dict[str, Tensor]]) -> list[Tensor]:
        return [encoding.restore(given) for encoding, given in zip(self.encodings, parts)]


def capture_restore(encodings: Sequence[Encoding]) -> ExportedProgram:
    """The operations that give the weights: inputs are all parts in order, outputs the weights (float32)."""
    given = [parts_of(encoding) for encoding in encodings]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.export.export(Restore(encodings), (given,))


def parts_of(encoding: Encoding) -> dict[str, Tensor]:
    """What lies on the disk, on the CPU; each part is a tensor of its own."""
    return {name: part.detach().cpu().clone() for name, part in encoding.parts().items()}


def signature(encoding: Encoding) -> Hashable:
    """What the operations of `restore` depend on: encodings with equal signatures are restored by the same graph."""
    plain = []
    for field in dataclasses.fields(encoding):
        value = getattr(encoding, field.name)
        plain.append((str(value.dtype), tuple(value.shape)) if isinstance(value, Tensor) else repr(value))
    parts = tuple((name, str(part.dtype), tuple(part.shape)) for name, part in encoding.parts().items())
    return type(encoding), encoding.form, encoding.shape, tuple(plain), parts
