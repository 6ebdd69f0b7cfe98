"""substitute.fused: layers with nothing between them become one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.outputs import difference
from ...core.soft import fold
from ...core.step import Place, Trait
from ...model.fusion import Pair, composed, join_parallel, pairs
from ...model.graph import captured
from ...model.matrices import CONVOLUTIONS, TRANSPOSED, sharers
from ...model.norms import folded
from ...model.replacing import called, filled, replaced
from ...model.select import LayerStep, excluded

PLAIN = (nn.Linear, *CONVOLUTIONS)


class FusedLayers(LayerStep, kind="substitute.fused"):
    """Make one layer of those that follow each other with nothing between them; the outputs stay as they are.

    A batch norm is folded into the layer before it (arXiv:1712.05877, section 3.2; `norms`), and a linear layer, or a
    convolution with a kernel of one, is multiplied into the layer before it where that computes less (`linears`). What
    was taken in becomes an identity. With `parallel` linear layers that read the same value, such as those of queries,
    keys and values, are put under each other as one whose output is split: the model becomes a captured graph, which
    can still be trained, not reshaped. Pairs are found in the captured graph; after each the outputs are compared, and
    what changes them beyond rounding is left as it was. Raises `TaskError` if the model cannot be captured.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    place: ClassVar[Place | None] = None  # on request: runtimes fold batch norms by themselves
    paper: ClassVar[str] = "arXiv:1712.05877, arXiv:2101.03697"

    norms: bool = True
    linears: bool = True
    parallel: bool = False

    def ended(self) -> Trait:
        return self.takes if self.parallel else Trait(0)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = dict(self.layers(model, ctx, (*PLAIN, *TRANSPOSED)))
        running, gone = called(model, list(layers), ctx), set()
        while True:  # what became one may have something behind it again
            fresh = [each for each in pairs(self._graph(model, ctx)) if self._wanted(each) and each not in gone]
            if not fresh:
                break
            for pair in fresh:
                if isinstance(model.get_submodule(pair.first), nn.Identity):
                    continue  # it became part of another a moment ago; what is behind it now is behind that one
                gone.add(pair)
                if reason := self._obstacle(pair, layers, running, model) or self._fuse(pair, model, ctx):
                    ctx.leave(pair.first, reason)
        if self.parallel:
            model = self._joined(model, ctx)
        told = {*ctx.record.changed, *(each.layer for each in ctx.record.left)}
        for name in layers:
            if name not in told:
                ctx.leave(name, "nothing that can become part of it is right behind it")
        return model

    def _graph(self, model: nn.Module, ctx: Context) -> fx.GraphModule:
        return captured(fold(model), ctx.example, {name: ctx.task.free(name) for name in ctx.example})

    def _wanted(self, pair: Pair) -> bool:
        return self.norms if pair.norm else self.linears

    def _obstacle(self, pair: Pair, layers: dict[str, nn.Module], running: set[str], model: nn.Module) -> str:
        """Why the two of a pair stay apart; empty if they become one."""
        if reason := excluded(pair.first, self.only, self.skip):
            return reason
        for name in (pair.first,) if pair.norm else (pair.first, pair.second):
            layer = model.get_submodule(name)
            if name not in layers or type(layer) not in (*PLAIN, *TRANSPOSED):
                return f"{name} is a {type(layer).__name__}, which may compute otherwise than the layer it is made from"
            if parametrize.is_parametrized(layer) or sharers(model, layer):
                return f"the weight of {name} is stored otherwise, or shared"
            if name not in running:
                return f"{name} is not called: what surrounds it uses its weight as it is"
        return "" if pair.norm else _gainless(model.get_submodule(pair.first), model.get_submodule(pair.second))

    @torch.no_grad()
    def _fuse(self, pair: Pair, model: nn.Module, ctx: Context) -> str:
        """Make one of two layers, in place; why it was not done if the outputs would differ."""
        first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
        wanted = model.eval()(**ctx.example)
        replaced(model, pair.first, with_norm(first, second) if pair.norm else with_linear(first, second))
        replaced(model, pair.second, nn.Identity())
        if reason := difference(wanted, model(**ctx.example)):
            replaced(model, pair.first, first)
            replaced(model, pair.second, second)
            return f"with {pair.second} the outputs would differ: {reason}"
        how = f"{pair.second} {'folded' if pair.norm else 'multiplied'} in"
        before = ctx.record.changed.get(pair.first)
        ctx.change(pair.first, f"{before}; {how}" if before else how)
        ctx.change(pair.second, f"became part of {pair.first}")
        return ""

    def _joined(self, model: nn.Module, ctx: Context) -> nn.Module:
        graph = self._graph(model, ctx)
        done = join_parallel(graph)
        for names in done:
            for name in names:
                ctx.change(name, f"one layer with {', '.join(other for other in names if other != name)}")
        return graph if done else model


def _gainless(first: nn.Module, second: nn.Module) -> str:
    """Why two layers in a row compute no less as one; empty if they do."""
    one, other = _weight(first), _weight(second)
    apart, together = one.numel() + other.numel(), len(other) * one[0].numel()
    return "" if together < apart else f"one layer of both would compute {together / apart:.2f} times as much"


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def with_norm(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """The layer that computes what `layer` and the batch norm behind it compute in evaluation mode."""
    of: Any = norm
    parts = of.weight, of.bias, of.running_mean, of.running_var, of.eps
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    weight, bias = folded(_weight(layer), layer.bias, parts, axis)  # type: ignore[arg-type]
    return filled(_like(layer, len(bias)), weight, bias)


def with_linear(layer: nn.Module, behind: nn.Module) -> nn.Module:
    """The layer that computes what the two in a row do; `behind` is a linear map of channels."""
    weight, bias = composed(_weight(layer), layer.bias, _weight(behind), behind.bias)  # type: ignore[arg-type]
    return filled(_like(layer, len(weight), bias is not None), weight, bias)


def _like(layer: nn.Module, outputs: int, bias: bool = True) -> nn.Module:
    """A layer as `layer` is, with so many outputs."""
    old: Any = layer
    if isinstance(layer, nn.Linear):
        return nn.Linear(old.in_features, outputs, bias=bias)
    where = (old.kernel_size, old.stride, old.padding)
    more = {"groups": old.groups, "bias": bias, "dilation": old.dilation, "padding_mode": old.padding_mode}
    if isinstance(layer, TRANSPOSED):
        more["output_padding"] = old.output_padding
    kind: Any = type(layer)
    made: nn.Module = kind(old.in_channels, outputs, *where, **more)
    return made
