"""The linear layers and tables of a model, those of a captured graph too, as modules to put something around."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ..core.context import Context
from ..core.soft import own_class
from .replacing import called

LINEAR, LOOK_UP = torch.ops.aten.linear.default, torch.ops.aten.embedding.default


def linears(model: nn.Module, ctx: Context) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linear layers of `model` by name, and of others why nothing can be put around them.

    In a captured graph a layer is given by what holds its weight; `opened` makes a module of it.
    """
    if isinstance(model, fx.GraphModule):
        return _of_graph(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ran = called(model, [name for name in found if name], ctx)
    reasons = {name: "is not called: what surrounds it uses its weight as it is" for name in found if name not in ran}
    if "" in found:
        reasons[""] = "is the whole model; put it into an nn.Sequential"
    return {name: layer for name, layer in found.items() if name not in reasons}, reasons


def _of_graph(model: fx.GraphModule) -> tuple[dict[str, nn.Module], dict[str, str]]:
    found: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, nodes in _calls(model, LINEAR).items():
        layer = model.get_submodule(name)
        biases = {None if _bias(node) is None else str(_bias(node)) for node in nodes}
        if len(biases) > 1 or not all(_whole(node, name) for node in nodes):
            reasons[name] = "its weight and bias are not those of one layer"
        else:
            found[name] = layer
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module
    return found, reasons


def _calls(model: fx.GraphModule, kind: object) -> dict[str, list[fx.Node]]:
    """The products of a captured graph with a weight (or the look-ups in one), by the name of what holds it."""
    found: dict[str, list[fx.Node]] = {}
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target is not kind:
            continue
        weight = node.args[1 if kind is LINEAR else 0]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            prefix, _, attribute = str(weight.target).rpartition(".")
            if attribute == "weight" and prefix:
                found.setdefault(prefix, []).append(node)
    return found


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def _whole(node: fx.Node, name: str) -> bool:
    """Whether the bias of a product, if there is one, is held with its weight."""
    bias = _bias(node)
    return bias is None or (bias.op == "get_attr" and str(bias.target) == f"{name}.bias")


def opened(model: nn.Module, names: list[str]) -> None:
    """Turn these products of a captured graph into calls of linear layers with the same names, in place."""
    if isinstance(model, fx.GraphModule):
        calls = {name: nodes for name, nodes in _calls(model, LINEAR).items() if name in names}
        for name, nodes in calls.items():
            _as_linear(model.get_submodule(name), bias=_bias(nodes[0]) is not None)
        _called_by_name(model, calls, place=0)


def opened_tables(model: nn.Module) -> None:
    """Turn the look-ups of a captured graph into calls of embeddings with the same names, in place."""
    if isinstance(model, fx.GraphModule):
        calls = _calls(model, LOOK_UP)
        for name in calls:
            _as_table(model.get_submodule(name))
        _called_by_name(model, calls, place=1)


def _called_by_name(model: fx.GraphModule, calls: dict[str, list[fx.Node]], place: int) -> None:
    """Let these nodes call the modules of these names with their argument number `place`."""
    for name, nodes in calls.items():
        for node in nodes:
            with model.graph.inserting_before(node):
                call = model.graph.call_module(name, (node.args[place],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            model.graph.erase_node(node)
    if calls:
        model.graph.eliminate_dead_code()
        model.recompile()


def _as_linear(holder: nn.Module, bias: bool) -> None:
    """Make what holds a weight and a bias a linear layer; the chains on them stay."""
    outputs, inputs = _become(holder, nn.Linear)
    holder.in_features, holder.out_features = inputs, outputs  # type: ignore[assignment]
    if not bias:
        holder.register_parameter("bias", None)


def _as_table(holder: nn.Module) -> None:
    """Make what holds a table an embedding; the chains on it stay."""
    rows, columns = _become(holder, nn.Embedding)
    holder.num_embeddings, holder.embedding_dim, holder.padding_idx = rows, columns, None  # type: ignore[assignment]
    holder.max_norm, holder.norm_type, holder.scale_grad_by_freq, holder.sparse = None, 2.0, False, False  # type: ignore


def _become(holder: nn.Module, kind: type[nn.Module]) -> tuple[int, int]:
    """Give what holds a matrix another class, and give the shape of the matrix."""
    weight = holder.weight
    assert isinstance(weight, torch.Tensor)
    if parametrize.is_parametrized(holder):
        own_class(holder, kind)
    else:
        holder.__class__ = kind
    return weight.shape[0], weight.shape[1]
