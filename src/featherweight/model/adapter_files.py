"""The adapters of a model as one small file, and back onto a model of the same base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..core.adapted import BASE, Adapted, adapted, adapter_of, base_digest
from ..core.adapter import AdapterFile
from ..core.errors import ArtifactError, TaskError
from ..core.soft import copied
from .layers import ADAPTERS, believed, make
from .linears import opened, opened_tables
from .replacing import exchanged


def save_adapter(model: nn.Module, file: str | Path) -> Path:
    """Write the adapters of `model` to one file with the digest of their base, and nothing of the base.

    Raises `TaskError` for a model without adapters, such as one into whose weights they were merged.
    """
    found = adapter_of(model)
    if found is None:
        raise TaskError("the model holds no adapter: keep it beside its layers (merge: false) to have it as a file")
    found.write(Path(file))
    return Path(file)


def load_adapter(model: nn.Module, file: str | Path) -> nn.Module:
    """A copy of `model` with the adapters in `file` in place of its own; nothing of the base is changed.

    Raises `ArtifactError` if the file is damaged or belongs to another base.
    """
    found = AdapterFile.read(file)
    made = without_adapters(model)
    found.check_base(base_digest(made), file)
    _open(made, found)
    for place in sorted(found.places, key=len):
        kind, settings = found.places[place]
        if kind not in {each.__name__ for each in ADAPTERS}:
            raise ArtifactError(f"the adapter {file} is a {kind}, which this version of featherweight does not know")
        with believed(f"the adapter {file}"):
            around = make(kind, dict(settings)).to_empty(device="cpu")
            base = made.get_submodule(place) if place else made
            if isinstance(weight := getattr(base, "weight", None), torch.Tensor):
                around.to(weight.dtype)
            around.base = base
            made = exchanged(made, place, around)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    with believed(f"the adapter {file}"), torch.no_grad():
        parameters = dict(made.named_parameters())
        for name, tensor in found.tensors.items():
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name!r} has another shape than its layer")
            parameters[name].copy_(torch.from_numpy(tensor))
    return made.to(device).eval()


def _open(model: nn.Module, found: AdapterFile) -> None:
    """Where `model` is a captured graph, make modules of what adapters stand around, by its name without adapters."""
    start = f"{BASE}." if "" in found.places else ""
    opened(model, [place.removeprefix(start) for place, (kind, _) in found.places.items() if kind != "Prompt"])
    if any(kind == "Prompt" for kind, _ in found.places.values()):
        opened_tables(model)


def without_adapters(model: nn.Module) -> nn.Module:
    """A copy of `model` with every adapter taken off: its base."""
    made = copied(model)
    while (place := next((name for name, _ in adapted(made)), None)) is not None:
        module = made.get_submodule(place)
        assert isinstance(module, Adapted)
        made = exchanged(made, place, module.base)
    return made
