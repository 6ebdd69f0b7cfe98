"""quantize.dynamic: 8-bit linear layers whose activation ranges are found at run time."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.encoding import Encoding, Sparse
from ...core.soft import encodings
from ...core.step import OneOf, Place, Trait
from ...model.ported import add_port
from ...model.rounding import Rounding
from ...model.select import LayerStep
from .arithmetic import scale_by_error, scale_by_max


class DynamicQuantization(LayerStep, kind="quantize.dynamic"):
    """Store the weights of linear layers as 8-bit integers and quantize their inputs with the range seen at run time.

    Weights are symmetric per output channel (`weights`: scales by the largest magnitude, or by least squared error);
    each input is quantized to 8 bits as it comes, so no calibration data are needed: per `activations` "tensor" with
    its whole range, or per "token", each row of the last dimension with its largest magnitude. It suits models that spend their time in large linear layers. Convolutions, embeddings and norms stay in floats. Afterwards
    the model can be trained, not reshaped.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"int8"})
    place: ClassVar[Place | None] = Place.ENCODE
    paper: ClassVar[str] = "arXiv:2004.09602"

    weights: Annotated[Literal["max", "mse"], OneOf("max", "mse")] = "max"
    activations: Literal["tensor", "token"] = "tensor"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        called, stored = called_layers(model, ctx), encodings(model)
        for name, layer in self.layers(model, ctx, (nn.Linear,)):
            assert isinstance(layer, nn.Linear)
            reason = obstacle(layer, name in called, stored.get(f"{name}.weight"))
            if reason:
                ctx.leave(name, reason)
                continue
            for other in sharers(model, layer.weight, name):
                ctx.warn(f"{name} shares its weight with {other}, which keeps floats: the weight is now stored twice")
            scale = scale_by_max(layer.weight, 0) if self.weights == "max" else scale_by_error(layer.weight, 0)
            parametrize.register_parametrization(layer, "weight", Rounding(scale, axis=0))
            add_port(layer, self.activations == "token")
            ctx.change(name, f"int8 weight per channel, dynamic 8-bit input per {self.activations}")
        _leave_others(model, ctx)
        _call_sublayers(model)
        return model


def obstacle(layer: nn.Linear, called: bool, stored: Encoding | None) -> str:
    """Why a linear layer cannot be quantized as a layer of its own; empty if it can."""
    if stored is not None and not isinstance(stored, Sparse):
        return f"its weight is already stored as {stored.form}"
    if not called:
        return "its forward is never called: the module around it reads its weight"
    kind = parametrize.type_before_parametrizations(layer)
    if kind is not nn.Linear:
        return f"is a {kind.__name__}, which may compute otherwise than nn.Linear"
    return ""


def sharers(model: nn.Module, weight: Tensor, owner: str) -> list[str]:
    """The names of the parameters of other layers than `owner` that are the same tensor as `weight`."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter is weight and name.rpartition(".")[0] != owner]


@torch.no_grad()
def called_layers(model: nn.Module, ctx: Context) -> set[str]:
    """The names of the modules whose `forward` runs when the model runs on the example inputs."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _module, _given, _out, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        model.eval()(**ctx.example)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _leave_others(model: nn.Module, ctx: Context) -> None:
    """Report every module with weights of its own that is no linear layer."""
    for name, module in model.named_modules():
        own = parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))
        if own and not isinstance(module, nn.Linear) and "parametrizations" not in name.split("."):
            kind = parametrize.type_before_parametrizations(module).__name__
            ctx.leave(name, f"is a {kind}, not a linear layer; stays in floats")


def _call_sublayers(model: nn.Module) -> None:
    """Make transformer layers call their sublayers: the fused kernel of torch would read the weights past the ports."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
