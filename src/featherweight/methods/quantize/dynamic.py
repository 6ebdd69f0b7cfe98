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
from ...model.ported import add_lstm_port, add_port
from ...model.rounding import Rounding
from ...model.select import LayerStep
from .arithmetic import scale_by_error, scale_by_max


class DynamicQuantization(LayerStep, kind="quantize.dynamic"):
    """Store the weights of linear layers and LSTMs as 8-bit integers and quantize their inputs with the range seen at
    run time.

    Weights are symmetric per output channel (`weights`: scales by the largest magnitude, or by least squared error);
    each input is quantized to 8 bits as it comes, so no calibration data are needed: per `activations` "tensor" with
    its whole range, or per "token", each row of the last dimension with its largest magnitude. An LSTM is always
    quantized per tensor, and one of two directions has one scale for each weight. It suits models that spend their time
    in large linear layers. Convolutions, embeddings, GRUs and norms stay in floats. Afterwards the model can be
    trained, not reshaped.
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
        for name, layer in self.layers(model, ctx, (nn.Linear, nn.LSTM)):
            held = _matrices(layer)
            reason = obstacle(layer, name in called, stored.get(f"{name}.{held[0]}"))
            if reason:
                ctx.leave(name, reason)
                continue
            for other in [other for each in held for other in sharers(model, getattr(layer, each), name)]:
                ctx.warn(f"{name} shares its weight with {other}, which keeps floats: the weight is now stored twice")
            # the kernel of a layer in two directions takes one scale for each of them, not one per row
            axis = None if isinstance(layer, nn.LSTM) and layer.bidirectional else 0
            for each in held:
                self._round(layer, each, axis)
            ctx.change(name, f"int8 weight per {'tensor' if axis is None else 'channel'}, {self._port(layer)}")
        _leave_others(model, ctx)
        _call_sublayers(model)
        return model

    def _round(self, layer: nn.Module, attribute: str, axis: int | None) -> None:
        weight = getattr(layer, attribute)
        scale = scale_by_max(weight, axis) if self.weights == "max" else scale_by_error(weight, axis)
        parametrize.register_parametrization(layer, attribute, Rounding(scale, axis=axis))

    def _port(self, layer: nn.Module) -> str:
        """Put the port at the input of a layer; what it does, in words."""
        if isinstance(layer, nn.LSTM):
            add_lstm_port(layer)
            return "dynamic 8-bit input per tensor; the runtime may also quantize the hidden state at every step"
        assert isinstance(layer, nn.Linear)
        add_port(layer, self.activations == "token")
        return f"dynamic 8-bit input per {self.activations}"


def _matrices(layer: nn.Module) -> list[str]:
    """The names of the weights of a linear layer or an LSTM, without biases."""
    if isinstance(layer, nn.LSTM):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    return ["weight"]


def obstacle(layer: nn.Module, called: bool, stored: Encoding | None) -> str:
    """Why a linear layer or an LSTM cannot be quantized as a layer of its own; empty if it can."""
    if stored is not None and not isinstance(stored, Sparse):
        return f"its weight is already stored as {stored.form}"
    if not called:
        return "its forward is never called: the module around it reads its weight"
    kind = parametrize.type_before_parametrizations(layer)
    if kind not in (nn.Linear, nn.LSTM):
        base = "nn.LSTM" if issubclass(kind, nn.LSTM) else "nn.Linear"
        return f"is a {kind.__name__}, which may compute otherwise than {base}"
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return "projects its hidden state, for which there is no integer kernel; stays in floats"
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
    """Report every module with weights of its own that is no linear layer and no LSTM."""
    for name, module in model.named_modules():
        own = parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))
        if own and not isinstance(module, nn.Linear | nn.LSTM) and "parametrizations" not in name.split("."):
            kind = parametrize.type_before_parametrizations(module).__name__
            stays = "stays in floats (quantize.static stores its weights in integers)"
            ctx.leave(
                name,
                f"is a {kind}, not a linear layer; {stays if isinstance(module, nn.RNNBase) else 'stays in floats'}",
            )


def _call_sublayers(model: nn.Module) -> None:
    """Make transformer layers call their sublayers: the fused kernel of torch would read the weights past the ports."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
