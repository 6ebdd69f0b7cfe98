"""Which dimension of which weight counts a layer's outputs, and which its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from ...model.groups import Group, Slot

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A layer by its full name, with the places that count its outputs and its inputs."""

    name: str
    outputs: Slot
    inputs: Slot

    def change(self, before: Shapes, after: Shapes) -> str:
        """`64 -> 40` for its outputs, and what became of its inputs; empty if both are as they were."""
        parts = []
        for place, head in ((self.outputs, ""), (self.inputs, "inputs ")):
            old, new = (shapes[place[0]][place[1]] for shapes in (before, after))
            if old != new:
                parts.append(f"{head}{old} -> {new}")
        return ", ".join(parts)


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """The layer that `module` is, if its outputs are units: linear, convolution, embedding, recurrent."""
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.RNNBase):
        return Layer(name, (f"{prefix}weight_hh_l0", 1), (f"{prefix}weight_ih_l0", 1))
    weight = f"{prefix}{_held(module)}"
    if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)):
        return Layer(name, (weight, 0), (weight, 1))
    # transformers' Conv1D is a linear layer with its weight transposed
    turned = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if isinstance(module, _ConvTransposeNd | nn.Embedding) or turned:
        return Layer(name, (weight, 1), (weight, 0))
    return None


def _held(module: nn.Module) -> str:
    """The name in `module` of the parameter that its weight is, or is computed from, in the weight's shape."""
    if not parametrize.is_parametrized(module, "weight"):
        return "weight"
    behind = module.parametrizations["weight"]  # type: ignore[index]
    assert isinstance(behind, parametrize.ParametrizationList)
    same = (name for name, each in behind.named_parameters(recurse=False) if each.shape == module.weight.shape)
    return f"parametrizations.weight.{next(same, 'original')}"


def layers(model: nn.Module) -> list[Layer]:
    """Every layer of `model` whose outputs are units, in module order."""
    found = [layer_of(name, module) for name, module in model.named_modules()]
    return [layer for layer in found if layer is not None]


def producers(model: nn.Module, group: Group) -> list[str]:
    """The modules whose outputs are the units of `group`; of modules of other kinds all that have a matrix in it."""
    held = dict(model.named_parameters())
    found = []
    for name, dim in group.places:
        owner = name.rpartition(".")[0]
        layer = layer_of(owner, model.get_submodule(owner))
        if (layer is None and name in held and held[name].dim() > 1) or (layer and layer.outputs == (name, dim)):
            found.append(owner)
    return list(dict.fromkeys(found))


def widths(group: Group) -> list[int]:
    """How many indices one unit has along each dimension that it cuts."""
    return sorted({positions.shape[1] for positions in group.places.values()})
