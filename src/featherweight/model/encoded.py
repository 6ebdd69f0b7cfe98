"""A weight held as nothing but its encoding, whatever method made it: what a file needs to give the model back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..core import additive, half, scaled, trellis  # noqa: F401  their encodings must be known before one is loaded
from ..core.encoding import Encoding, Sparse
from ..core.errors import ArtifactError
from ..core.soft import chains, copied, encodings, own_class
from .graph import Free, captured
from .held import Held


class HeldEncoding(Held, kind="encoding"):
    """Hold a weight as its `encoding`: each tensor of it a buffer under its own name. Nothing of it trains on.

    `of` names the encoding's kind, `plain` its other values, `shapes` and `kinds` the forms of its tensors: all that a
    skeleton says of it.
    """

    def __init__(
        self,
        encoding: Encoding | None = None,
        of: str = "",
        plain: dict[str, Any] | None = None,
        shapes: dict[str, list[int]] | None = None,
        kinds: dict[str, str] | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        self.dtype, self.of = dtype, of if encoding is None else encoding.kind
        values: dict[str, Any] = dict(plain or {})
        if encoding is not None:
            values = {field.name: getattr(encoding, field.name) for field in dataclasses.fields(encoding)}
        self.plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        for name, shape in (shapes or {}).items():
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, (kinds or {})[name]), device="meta")
        self.names = tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def settings(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in self.names}
        return {
            "of": self.of,
            "plain": {name: list(value) if isinstance(value, tuple) else value for name, value in self.plain.items()},
            "shapes": {name: list(value.shape) for name, value in tensors.items()},
            "kinds": {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()},
            "dtype": self.dtype,
        }

    def encode(self, weight: Tensor | None = None) -> Encoding:
        kind = next((each for each in Encoding.__subclasses__() if each.kind == self.of), None)
        if kind is None:
            raise ArtifactError(f"a weight is stored as {self.of!r}, which this version of featherweight does not know")
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in self.plain.items()}
        return kind(**plain, **{name: getattr(self, name) for name in self.names})

    def forward(self, weight: Tensor) -> Tensor:
        return self.encode(weight).decode().to(getattr(torch, self.dtype))


@torch.no_grad()
def hold(module: nn.Module, attribute: str, encoding: Encoding) -> None:
    """Hold the weight `attribute` of `module` as `encoding` alone, in place; links that were on it go."""
    weight = getattr(module, attribute)
    dtype = str(weight.dtype).removeprefix("torch.")
    if parametrize.is_parametrized(module, attribute):
        own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    if isinstance(encoding, Sparse):  # no zero of it has a sign, which would have to be stored
        encoding = dataclasses.replace(encoding, values=encoding.decode() + 0.0)
    encoding = dataclasses.replace(encoding, **_on_cpu(encoding))
    # a parameter of its own: putting the link on empties it, and others may hold the one that was there
    setattr(module, attribute, nn.Parameter(weight.detach().clone(), requires_grad=False))
    parametrize.register_parametrization(module, attribute, HeldEncoding(encoding, dtype=dtype), unsafe=True)
    module.parametrizations[attribute].unsafe = False  # type: ignore[index,union-attr]


def _on_cpu(encoding: Encoding) -> dict[str, Tensor]:
    tensors = {field.name: getattr(encoding, field.name) for field in dataclasses.fields(encoding)}
    return {name: value.detach().cpu() for name, value in tensors.items() if isinstance(value, Tensor)}


def lean(model: nn.Module) -> nn.Module:
    """A copy of `model` with equal outputs, whose soft weights are held as what they are stored as: the floats that
    they were made from are gone. Weights that hold themselves already, and chains that name no encoding, stay.
    """
    made = copied(model).cpu().eval()
    stored = encodings(made)
    for name, module, attribute, links in list(chains(made)):
        if name in stored and not isinstance(links[-1], Held):
            hold(module, attribute, stored[name])
    return made


def standalone(plain: nn.Module, stored: dict[str, Encoding], example: dict[str, Tensor], free: Free) -> fx.GraphModule:
    """The captured graph of `plain` with each weight in `stored` held as that encoding: no class of the user's is left.

    Raises `ArtifactError` if the graph does not read such a weight.
    """
    module = captured(plain, example, free)
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, encoding in stored.items():
        if name not in read:
            raise ArtifactError(
                f"the captured model does not read the weight {name!r}, which is to be stored as {encoding.form}; "
                "is that layer used?"
            )
        prefix, _, attribute = name.rpartition(".")
        hold(module.get_submodule(prefix), attribute, encoding)
    return module
