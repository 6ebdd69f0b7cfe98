"""The parts of a compressed model that belong to one layer, and the model with only some of them switched on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from featherweight.core.soft import Mask, chains

from .held import Held
from .port import DynamicPort, Port

Parts = dict[str, list[nn.Module]]
PORTS = (Port, DynamicPort)


def parts(model: nn.Module) -> Parts:
    """The links on a layer's weights and the ports at its inputs and outputs, by the layer's full name, in order."""
    found: Parts = {}
    for name, _, _, links in chains(model):
        found.setdefault(name.rpartition(".")[0], []).extend(links)
    for layer, owned in found.items():
        owned += [module for module in _children(model, layer) if isinstance(module, PORTS)]
    if isinstance(model, fx.GraphModule):
        for layer, node in operations(model, found).items():
            found[layer] += [model.get_submodule(str(port.target)) for port in _ports(model, node)]
    return found


def _children(model: nn.Module, layer: str) -> Iterator[nn.Module]:
    try:
        yield from model.get_submodule(layer).children()
    except AttributeError:
        return


def operations(model: fx.GraphModule, layers: Iterable[str]) -> dict[str, fx.Node]:
    """The operation that reads a weight of each layer, by the layer's name, in the order of the graph."""
    wanted: set[str] = set(layers)
    found: dict[str, fx.Node] = {}
    for node in model.graph.nodes:
        for given in node.all_input_nodes:
            if given.op == "get_attr" and (layer := str(given.target).rpartition(".")[0]) in wanted:
                found.setdefault(layer, node)
    return found


def _ports(model: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The ports that an operation reads, and the one that its output goes through, behind a fused activation too."""
    found = [given for given in node.all_input_nodes if _is_port(model, given)]
    while len(node.users) == 1 and len((user := next(iter(node.users))).all_input_nodes) == 1:
        node = user
        if _is_port(model, node):
            return [*found, node]
    return found


def _is_port(model: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), PORTS)


Instead = Mapping[nn.Module, Tensor]


def weights_before(model: nn.Module, before: nn.Module) -> Instead:
    """For each link of `model` that no longer holds the weight it was put on, that weight, from the model `before`."""
    found: dict[nn.Module, Tensor] = {}
    modules = dict(before.named_modules())
    for name, module, attribute, links in chains(model):
        owner, held = modules.get(name.rpartition(".")[0]), module.parametrizations[attribute].original  # type: ignore[union-attr,index]
        for link in links:
            weight = getattr(owner, attribute, None)
            if isinstance(weight, Tensor) and (isinstance(link, Held) or _made_up(link, held, weight)):
                found[link] = weight.detach()
    return found


def _made_up(link: nn.Module, held: Tensor, before: Tensor) -> bool:
    """Whether the weights behind a mask have changed, to make up for those that it holds at zero."""
    return isinstance(link, Mask) and not torch.equal(held, before)


@contextmanager
def bypassed(modules: Iterable[nn.Module], instead: Instead) -> Iterator[None]:
    """Within this block each of these modules gives back its input, or what stands in `instead`."""
    handles = [
        module.register_forward_hook(lambda module, given, _out: instead.get(module, given[0])) for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only(owned: Parts, layers: Iterable[str], model: nn.Module, instead: Instead | None = None) -> Iterator[None]:
    """Within this block the parts of `layers` are on, and every other part of `model` (its other ports too) is off.

    A link that has dropped the weight it was put on gives what stands in `instead` (see `weights_before`).
    """
    on = {module for layer in layers for module in owned[layer]}
    every = [module for modules in parts(model).values() for module in modules]
    every += [module for module in model.modules() if isinstance(module, PORTS)]
    with bypassed(dict.fromkeys(module for module in every if module not in on), instead or {}):
        yield


class _Values(fx.Interpreter):
    """Runs a graph and keeps every value, or starts from values that are known."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)


class Replay:
    """Runs a compressed model on one batch with only some layers' parts on.

    In a captured graph, what does not follow from those parts is taken from one run with none of them. `names` are the
    inputs in the order of the graph.
    """

    def __init__(self, model: nn.Module, owned: Parts, instead: Instead | None = None):
        self.model, self.owned, self.instead = model, owned, instead or {}
        self.known: dict[fx.Node, Any] = {}
        self.inputs: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, inputs: dict[str, Tensor]) -> Any:
        """The output with every part off."""
        self.inputs = inputs
        with only(self.owned, (), self.model, self.instead):
            if not isinstance(self.model, fx.GraphModule):
                return self.model(**inputs)
            values = _Values(self.model)
            output = values.run(*inputs.values())
            self.known = dict(values.env)
            return output

    @torch.no_grad()
    def run(self, layers: Iterable[str]) -> Any:
        """The output on the same batch with the parts of `layers` on."""
        layers = list(layers)
        with only(self.owned, layers, self.model, self.instead):
            if not isinstance(self.model, fx.GraphModule):
                return self.model(**self.inputs)
            moved = self._followers(layers)
            kept = {node: value for node, value in self.known.items() if node not in moved}
            return _Values(self.model).run(*self.inputs.values(), initial_env=kept)

    def _followers(self, layers: list[str]) -> set[fx.Node]:
        """Every node whose value may change when the parts of `layers` are on."""
        assert isinstance(self.model, fx.GraphModule)
        on = {id(module) for layer in layers for module in self.owned[layer]}
        names = {name for name, module in self.model.named_modules() if id(module) in on}
        found: set[fx.Node] = set()
        for node in self.model.graph.nodes:
            starts = (node.op == "call_module" and node.target in names) or (
                node.op == "get_attr" and str(node.target).rpartition(".")[0] in layers
            )
            if starts or node.op == "output" or any(given in found for given in node.all_input_nodes):
                found.add(node)
        return found


@torch.no_grad()
def layer_outputs(model: nn.Module, inputs: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """What each of `layers` gives on these inputs, in the order in which they compute (first call only)."""
    found: dict[str, Tensor] = {}
    if isinstance(model, fx.GraphModule):
        values = _Values(model)
        values.run(*inputs.values())
        return {layer: values.env[node] for layer, node in operations(model, layers).items()}
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _given, out, layer=layer: found.setdefault(layer, out) if isinstance(out, Tensor) else None
        )
        for layer in layers
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
