"""Activation functions of a network: found in its modules or in its graph, and exchanged for others in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..core.blocks import observed
from .followed import operator_name

aten = torch.ops.aten
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "mish": functional.mish,
    "elu": functional.elu,
    "selu": functional.selu,
    "softplus": functional.softplus,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "hardswish": functional.hardswish,
}
TYPES: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.ELU: "elu",
    nn.CELU: "elu",
    nn.SELU: "selu",
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.Hardswish: "hardswish",
}
OPERATORS = {name: name for name in FUNCTIONS} | {"celu": "elu"}
# what may stand for each, from the cheapest to the dearest
CHEAPER: dict[str, tuple[str, ...]] = {
    "gelu": ("relu", "hardswish", "gelu_tanh"),
    "gelu_tanh": ("relu", "hardswish"),
    "quick_gelu": ("relu", "hardswish"),
    "silu": ("relu", "hardswish"),
    "mish": ("relu", "hardswish"),
    "elu": ("relu",),
    "selu": ("relu",),
    "softplus": ("relu",),
    "sigmoid": ("hardsigmoid",),
    "leaky_relu": ("relu",),
    "hardswish": ("relu",),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "hardswish": nn.Hardswish,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "hardsigmoid": nn.Hardsigmoid,
}
NODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu": (aten.relu.default, {}),
    "hardswish": (aten.hardswish.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "hardsigmoid": (aten.hardsigmoid.default, {}),
}


@dataclass(frozen=True)
class Site:
    """One place where a network applies an activation: its name, which it is, and a way to put another there (None for
    what was there at first).
    """

    name: str
    kind: str
    put: Callable[[str | None], None]


def module_sites(model: nn.Module, example: Mapping[str, Tensor]) -> list[Site]:
    """The modules of `model` that are activations and run on `example`: those of torch.nn by type, others without
    tensors by what they give for the inputs that they get. One that is used under several names is one site.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not list(module.children()) and not module.state_dict():
            names.setdefault(module, []).append(name)
    kinds = _kinds(model, {own[0] for own in names.values()}, example)
    return [
        Site(own[0], kinds[own[0]], partial(_put_module, model, own, module))
        for module, own in names.items()
        if own[0] in kinds
    ]


@torch.no_grad()
def _kinds(model: nn.Module, names: set[str], example: Mapping[str, Tensor]) -> dict[str, str]:
    """Which of these modules apply which activation when the model runs on `example`."""
    found: dict[str, str] = {}

    def note(name: str, given: tuple[Any, ...], output: Any) -> None:
        module = model.get_submodule(name)
        kind = TYPES.get(type(module)) or _computed(given, output)
        if kind is not None:
            found[name] = "gelu_tanh" if getattr(module, "approximate", "") == "tanh" else kind

    hooks = {name: (lambda given, output, name=name: note(name, given, output)) for name in names}
    observed(model.eval(), (), {key: tensor.clone() for key, tensor in example.items()}, hooks)
    return found


def _computed(given: tuple[Any, ...], output: Any) -> str | None:
    """The known function that makes an output of a module's one input, entry by entry; None if none does."""
    if len(given) != 1 or not isinstance(output, Tensor) or output.shape != given[0].shape:
        return None
    x, y = given[0].double(), output.double()
    if not x.min() < 0 < x.max():  # what leaves positive values alone could be any
        return None
    same = (kind for kind, function in FUNCTIONS.items() if (function(x) - y).abs().max() <= 1e-5 * y.abs().max())
    return next(same, None)


def _put_module(model: nn.Module, names: list[str], before: nn.Module, kind: str | None) -> None:
    made = before if kind is None else MODULES[kind]()
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, made.train(before.training))


def graph_sites(module: fx.GraphModule) -> Iterator[Site]:
    """The operators of a captured graph that are activations, named by the module whose code calls them."""
    for node in module.graph.nodes:
        kind = OPERATORS.get(operator_name(node).rstrip("_")) if node.op == "call_function" else None
        if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
            kind = "gelu_tanh"
        if kind is not None:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            owner = str(stack[-1][0]).partition("@")[0] if stack else ""
            before = node.target, node.args, node.kwargs
            yield Site(f"{owner}.{node.name}".lstrip("."), kind, partial(_put_node, module, node, before))


def _put_node(module: fx.GraphModule, node: fx.Node, before: tuple[Any, Any, Any], kind: str | None) -> None:
    target, args, kwargs = before
    if kind is not None:
        target, kwargs = NODES[kind]
        args = args[:1]
    node.target, node.args, node.kwargs = target, args, dict(kwargs)
    module.recompile()
