"""Batch norm folded into the layer before it, on a captured graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from featherweight.core.outputs import difference

from .graph import plain_graph

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LINEAR = aten.linear.default
FOLDABLE = (*CONVOLUTIONS, *TRANSPOSED, LINEAR)


def folded(
    weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor, float], axis: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that computes what the layer and the batch norm behind it compute in evaluation mode.

    `norm` holds gamma, beta, running mean, running variance and epsilon; `axis` is the output channel dimension of
    `weight`. Jacob et al., arXiv:1712.05877, section 3.2.
    """
    gamma, beta, mean, variance, epsilon = norm
    factor = torch.rsqrt(variance.double() + epsilon) * (1.0 if gamma is None else gamma.double())
    shape = [1] * weight.dim()
    shape[axis] = -1
    shift = (0.0 if bias is None else bias.double()) - mean.double()
    moved = shift * factor + (0.0 if beta is None else beta.double())
    return (weight.double() * factor.reshape(shape)).to(weight.dtype), moved.to(weight.dtype)


@torch.no_grad()
def fold_norms(module: fx.GraphModule, keep: frozenset[str] = frozenset()) -> list[str]:
    """Fold, in place, every batch norm whose input is a convolution or linear layer that feeds nothing else.

    Gives the names of the layers that took a batch norm in; weights named in `keep` are left as they are. Grouped
    transposed convolutions keep theirs.
    """
    done = []
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is aten.batch_norm.default and can_fold(node, keep):
            done.append(_fold(module, node))
    if done:
        module.graph.eliminate_dead_code()
        module.recompile()
        module.delete_all_unused_submodules()
    return done


@torch.no_grad()
def without_norms(
    module: fx.GraphModule, example: Mapping[str, Tensor], keep: frozenset[str] = frozenset()
) -> tuple[fx.GraphModule, list[str], str]:
    """`module` with its batch norms folded (see `fold_norms`) if that changes its outputs on `example` by no more than
    rounding, else as it is.

    Also gives the names of the layers that took a batch norm in, and why none did if the outputs would differ.
    """
    made = plain_graph(copy.deepcopy(module))
    layers = fold_norms(made, keep)
    if not layers:
        return module, [], ""
    want, got = (graph(**{name: tensor.clone() for name, tensor in example.items()}) for graph in (module, made))
    reason = difference(want, got)
    return (module, [], reason) if reason else (made, layers, "")


def can_fold(norm: fx.Node, keep: frozenset[str]) -> bool:
    """Whether the layer before a batch norm of a captured graph can take it in: it feeds nothing else, and its weight
    is not named in `keep`.
    """
    layer, training = norm.args[0], norm.args[5]
    if training or not isinstance(layer, fx.Node) or layer.target not in FOLDABLE or len(layer.users) != 1:
        return False
    if layer.target in TRANSPOSED and len(layer.args) > 6 and layer.args[6] != 1:
        return False
    if isinstance(layer.args[1], fx.Node) and layer.args[1].target in keep:
        return False
    if layer.target == LINEAR and (layer.meta.get("val") is None or layer.meta["val"].dim() != 2):
        return False  # behind a linear layer on sequences, batch norm normalizes the sequence, not the outputs
    used_once = all(
        not isinstance(item, fx.Node) or (item.op == "get_attr" and len(item.users) == 1) for item in layer.args[1:3]
    )
    return used_once and all(
        item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in norm.args[1:5]
    )


def _fold(module: fx.GraphModule, norm: fx.Node) -> str:
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    weight_node, bias_node = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    gamma, beta, mean, variance = (None if item is None else attribute(module, item.target) for item in norm.args[1:5])  # type: ignore[union-attr]
    name = str(weight_node.target)  # type: ignore[union-attr]
    axis = 1 if layer.target in TRANSPOSED else 0
    bias = None if bias_node is None else attribute(module, bias_node.target)  # type: ignore[union-attr]
    weight, bias = folded(attribute(module, name), bias, (gamma, beta, mean, variance, norm.args[7]), axis)  # type: ignore[arg-type]
    prefix, _, _ = name.rpartition(".")
    owner = module.get_submodule(prefix)
    trainable = attribute(module, name).requires_grad
    setattr(owner, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=trainable))
    if bias_node is None:
        bias_name = _free_bias(owner, name.rpartition(".")[2])
        owner.register_parameter(bias_name, nn.Parameter(bias, requires_grad=trainable))
        with module.graph.inserting_before(layer):
            bias_node = module.graph.get_attr(f"{prefix}.{bias_name}".lstrip("."))
        layer.args = (*layer.args[:2], bias_node, *layer.args[3:])
    else:
        target = str(bias_node.target)  # type: ignore[union-attr]
        setattr(
            module.get_submodule(target.rpartition(".")[0]),
            target.rpartition(".")[2],
            nn.Parameter(bias, requires_grad=trainable),
        )
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return prefix


def _free_bias(owner: nn.Module, weight: str) -> str:
    """A name for the bias that belongs to `weight`, which nothing in `owner` bears: "bias" for "weight"."""
    name = wanted = f"{weight[:-6]}bias" if weight.endswith("weight") else f"{weight}_bias"
    count = 1
    while getattr(owner, name, None) is not None:
        name, count = f"{wanted}_{count}", count + 1
    return name


def attribute(module: nn.Module, name: object) -> Tensor:
    """The tensor with this full name."""
    prefix, _, last = str(name).rpartition(".")
    return getattr(module.get_submodule(prefix), last)
