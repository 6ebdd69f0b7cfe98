"""Every form of weights, in every kind of layer, in every target that carries packed forms: small, right, read back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core import registry
from featherweight.core.encoding import Affine, Codebook, Encoding
from featherweight.core.half import Half
from featherweight.core.soft import Link, encodings, fold
from featherweight.core.target import PACKED, Target, target
from featherweight.core.trellis import Trellis
from featherweight.model.coded import Reader

registry.load("targets")
KINDS = sorted(
    name
    for name, kind in Target.kinds.items()
    if PACKED in kind.carries and kind.__module__.startswith("featherweight.")
)


class Stands(Link):
    """Stand for the weight of this encoding."""

    def __init__(self, encoding: Encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, weight: Tensor) -> Tensor:
        return self.encoding.decode()

    def encode(self, weight: Tensor) -> Encoding:
        return self.encoding


def affine(
    shape: tuple[int, ...],
    bits: int,
    group: int | None = None,
    axis: int | None = 0,
    signed: bool = False,
    symmetric: bool = False,
    floating: bool = False,
    half: bool = False,
) -> Affine:
    """Integers of a random weight of this shape, about 0.1 wide."""
    low = -(2 ** (bits - 1)) if signed else 0
    kind = torch.int8 if signed else torch.uint8
    middle = low + 2 ** (bits - 1)
    values = torch.randint(low, low + 2**bits, shape).to(kind)
    channels = 1 if axis is None else shape[axis]
    count = 1 if group is None else math.prod(shape) // channels // group
    entries = () if axis is None else (channels,) if group is None else (channels, count)
    scale = (torch.rand(entries) + 0.5) * 0.2 / 2**bits
    zero = torch.full(entries, middle)
    if not symmetric:
        zero = torch.randint(low, low + 2**bits, entries)
    zero = zero + torch.rand(entries) if floating else zero.to(kind)
    return Affine(values, scale.half() if half else scale, zero, axis, bits, group)


def codebook(shape: tuple[int, ...], entries: int, length: int = 1, group: int | None = None) -> Codebook:
    table = torch.randn(entries) * 0.1 if length == 1 else torch.randn(entries, length) * 0.1
    kind = torch.uint8 if entries <= 256 else torch.int16
    indices = torch.randint(0, entries, (*shape[:-1], shape[-1] // length)).to(kind)
    rows = math.prod(shape[1:])
    scale = torch.rand(shape[0]) + 0.5 if group is None else torch.rand(shape[0], rows // group) + 0.5
    return Codebook(indices, table, scale, axis=0, group=group)


def trellis(shape: tuple[int, ...], bits: int) -> Trellis:
    rows, columns = shape[0], math.prod(shape[1:])
    symbols = torch.randint(0, 2**bits, (4, rows * columns // 4)).to(torch.uint8)
    left, right = torch.rand(rows) > 0.5, torch.rand(columns) > 0.5
    return Trellis(symbols, (torch.rand(rows) + 0.5).half(), shape, bits, 8, left, right)


Make = Callable[[tuple[int, ...]], Encoding]
FORMS: dict[str, Make] = {
    **{f"int{bits}": lambda shape, bits=bits: affine(shape, bits, signed=True, symmetric=True) for bits in (1, 3, 7)},
    **{f"uint{bits} in groups": lambda shape, bits=bits: affine(shape, bits, group=16) for bits in (2, 5, 8)},
    "uint4 per tensor": lambda shape: affine(shape, 4, axis=None),
    "uint4 with float zeros": lambda shape: affine(shape, 4, group=8, floating=True),
    "int4 with half scales": lambda shape: affine(shape, 4, group=32, signed=True, symmetric=True, half=True),
    "float16": lambda shape: Half((torch.randn(shape) * 0.1).half()),
    "trellis2": lambda shape: trellis(shape, 2),
    "codebook4": lambda shape: codebook(shape, 16, group=16),
    "codebook3": lambda shape: codebook(shape, 6),
    "codebook9 of pairs": lambda shape: codebook(shape, 300, length=2) if shape[-1] % 2 == 0 else codebook(shape, 300),
}


FEW = ("float16", "int3", "uint5 in groups", "uint8 in groups", "int4 with half scales", "codebook4")
SHAPES = {"linear": (32, 32), "convolution": (16, 32, 3), "embedding": (32, 32)}


class Side(nn.Module):
    """One layer of a kind for each form, all reading the input; the outputs side by side."""

    def __init__(self, kind: str, tied: bool = False):
        super().__init__()
        make = {
            "linear": lambda: nn.Linear(32, 32),
            "convolution": lambda: nn.Conv1d(32, 16, 3),
            "embedding": lambda: nn.Embedding(32, 32),
        }
        self.kind, self.tied = kind, tied
        self.forms = tuple(FORMS) if kind == "linear" else FEW
        self.layers = nn.ModuleDict({name.replace(" ", "_"): make[kind]() for name in self.forms})
        for name, layer in zip(self.forms, self.layers.values()):
            encoding = FORMS[name](SHAPES[kind])
            parametrize.register_parametrization(layer, "weight", Stands(encoding))

    def forward(self, x: Tensor) -> Tensor:
        if not self.tied:
            return torch.stack([layer(x) for layer in self.layers.values()], -1)
        weights = [(layer, layer.weight) for layer in self.layers.values()]
        return torch.stack([layer(x).mean(1) @ weight.t() for layer, weight in weights], -1)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_every_form_is_stored_small_and_agrees(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"linear": (3, 32), "convolution": (3, 32, 5), "embedding": (3, 7)}[kind]
    x = torch.randint(0, 32, shape) if kind == "embedding" else torch.randn(shape)
    check(name, Side(kind).eval(), x, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_tied_weight_is_stored_once(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(name, Side("embedding", tied=True).eval(), torch.randint(0, 32, (3, 7)), tmp_path)


def check(name: str, model: Side, x: Tensor, folder: Path) -> None:
    artifact = target(name).export(model, {"x": x[:2]}, folder / "out")
    plain = fold(model)
    with torch.no_grad():
        want = plain(x).numpy()
    got = artifact.open()(x=x)
    for place, form in enumerate(model.forms):
        size = float(np.abs(want[..., place]).max())
        np.testing.assert_allclose(got[..., place], want[..., place], atol=1e-5 * size, err_msg=form)
    asked = encodings(model)
    assert {each.form for each in asked.values()} >= {form.split()[0] for form in model.forms}
    assert {key: artifact.manifest.stored[key] for key in asked} == {key: each.form for key, each in asked.items()}
    tensors = dict(plain.named_parameters())
    parts = sum(part.numel() * part.element_size() for each in asked.values() for part in each.parts().values())
    biases = sum(4 * tensor.numel() for key, tensor in tensors.items() if key not in asked)
    stored = artifact.manifest.work.weight_bytes  # as they are read; a coded file decodes them first
    if name == "coded":
        stored = sum(record.length for record in Reader(artifact.file).header.records)
    assert stored <= 1.02 * parts + biases + 64 * len(asked)
    assert artifact.manifest.work.parameters == sum(tensors[key].numel() for key in artifact.manifest.stored)
    macs = {"linear": 32 * 32, "convolution": 16 * 32 * 3 * 3, "embedding": 32 * 32 if model.tied else 0}[model.kind]
    assert artifact.manifest.work.macs == macs * len(model.forms), "what restores a weight is no work of a run"
