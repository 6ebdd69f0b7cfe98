"""The target `coded`: the coded checkpoint. One small file that is decoded when it is opened, and run with PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from featherweight.core.errors import ArtifactError
from featherweight.core.target import PACKED, Session, Target, Work

if TYPE_CHECKING:  # not at run time: asking which targets there are must not load torch
    from torch import Tensor, fx, nn

    from featherweight.core.encoding import Encoding
    from featherweight.model.coded import Reader


class CodedCheckpoint(Target, name="coded"):
    """Write every tensor through an adaptive arithmetic coder into one file, from which alone the model is rebuilt.

    It is the form for storing and sending: opening it decodes everything, and PyTorch then computes in floats. What it
    stores of a weight is its encoding (integers, indices, symbols, kept values), near the entropy of it.
    """

    file: ClassVar[str] = "model.fwc"
    carries: ClassVar[frozenset[str]] = frozenset({"int8", "uint8", "sparse", PACKED})
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        from featherweight.model import coded
        from featherweight.model.encoded import standalone
        from featherweight.model.skeleton import skeleton

        module = standalone(plain, stored, example, free)
        notes = {"inputs": {name: sorted(dims) for name, dims in free.items()}}
        coded.write(path, *skeleton(module), notes)

    def load(self, path: Path, threads: int = 1) -> Session:
        import torch

        from featherweight.core.outputs import as_arrays

        module = _module(_reader(path))

        def run(**inputs: np.ndarray) -> list[np.ndarray]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    output = as_arrays(module(**{name: torch.from_numpy(array) for name, array in inputs.items()}))
            finally:
                torch.set_num_threads(before)
            if isinstance(output, np.ndarray):
                return [output]
            return list(output.values()) if isinstance(output, dict) else list(output)

        return run

    def stored(self, path: Path) -> dict[str, str]:
        return {name: form for name, (form, _) in sorted(_weights(_reader(path)).items())}

    def evidence(self, path: Path) -> dict[str, Any]:
        """Every weight that is held in another form than floats: it is decoded before anything is computed."""
        page = _reader(path).page
        return {"float_layers": sorted(page.chains)}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        from featherweight.model.macs import multiply_accumulates

        reader = _reader(path)
        batched = {name for name, dims in reader.notes.get("inputs", {}).items() if 0 in dims}
        held = reader.page.own().values()
        return Work(
            parameters=sum(math.prod(shape) for _, shape in _weights(reader).values()),
            macs=multiply_accumulates(_module(reader), example, batched),
            weight_bytes=sum(math.prod(entry.shape) * _itemsize(entry.dtype) for entry in held),
        )


def _reader(path: Path) -> Reader:
    from featherweight.model.coded import Reader

    return Reader(path)


def _module(reader: Reader) -> fx.GraphModule:
    """The graph with all weights as floats."""
    from torch import fx

    from featherweight.core.soft import fold
    from featherweight.model.layers import believed
    from featherweight.model.skeleton import rebuilt

    made = rebuilt(reader.page, dict(reader.tensors()), reader.path)
    with believed(f"the model in {reader.path}"):
        module = fold(made)
    if not isinstance(module, fx.GraphModule):
        raise ArtifactError(f"{reader.path} holds a checkpoint, not an artifact; unpack it and load the folder")
    return module


def _weights(reader: Reader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The form and the shape of every weight, as the file says them."""
    from featherweight.model.encoded import HeldEncoding
    from featherweight.model.layers import believed

    page, found = reader.page, {}
    for name, entry in page.tensors.items():
        if entry.role == "parameter" and ".parametrizations." not in f".{name}":
            found[name] = entry.dtype, tuple(entry.shape)
    for name, chain in page.chains.items():
        if [link.kind for link in chain] != [HeldEncoding.kind]:
            raise ArtifactError(f"{reader.path}: the weight {name!r} is held in a way that no artifact holds one")
        with believed(f"{reader.path}: the weight {name!r}"):
            encoding = HeldEncoding(**chain[0].settings).encode()
            found[name] = encoding.form, encoding.shape
    return found


def _itemsize(kind: str) -> int:
    import torch

    return getattr(torch, kind).itemsize
