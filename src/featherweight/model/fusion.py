"""Layers that follow each other with nothing between them, and layers side by side, found in a graph and made one."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .norms import CONVOLUTIONS, LINEAR, attribute, can_fold

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """The full names of a layer and of what computes on its outputs alone: a batch norm (`norm`) or a linear map."""

    first: str
    second: str
    norm: bool


def pairs(module: fx.GraphModule) -> Iterator[Pair]:
    """Every layer of a captured graph with the batch norm, or the linear layer or convolution of kernel one, behind it.

    Layers in groups, and convolutions that move with a stride or padding behind another, are none.
    """
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.batch_norm.default and can_fold(node, frozenset()):
            yield Pair(_owner(node.args[0].args[1]), _owner(node.args[3]), True)
        elif _is_pointwise(node) and _is_alone(node.args[0], node.target):
            yield Pair(_owner(node.args[0].args[1]), _owner(node.args[1]), False)


def _owner(node: Any) -> str:
    return str(node.target).rpartition(".")[0]


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a node maps the channels of each place, all by one matrix."""
    if node.target is LINEAR:
        return True
    weight = _value(node.args[1]) if node.target in CONVOLUTIONS else None
    if weight is None or weight.shape[2:].numel() != 1:
        return False
    rest = [*node.args[3:], *node.kwargs.values()]
    numbers = [each for item in rest for each in (item if isinstance(item, list | tuple) else [item])]
    stride, padding = (_numbers(node, place) for place in (3, 4))
    return set(stride) <= {1} and set(padding) <= {0} and "same" not in numbers and _groups(node) == 1


def _is_alone(node: Any, kind: Any) -> bool:
    """Whether a node is a layer of this kind, not in groups, whose outputs nothing else reads."""
    same = isinstance(node, fx.Node) and node.target is kind and len(node.users) == 1
    return same and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr" and _groups(node) == 1


def _numbers(node: fx.Node, place: int) -> list[Any]:
    value = node.args[place] if len(node.args) > place else []
    return list(value) if isinstance(value, list | tuple) else [value]


def _groups(node: fx.Node) -> Any:
    return 1 if node.target is LINEAR else node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)


def _value(node: Any) -> Tensor | None:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def composed(first: Tensor, bias: Tensor | None, second: Tensor, after: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the one layer that computes `second` behind `first`: [middle, inputs, ...] and [outputs,
    middle, 1, ...] to [outputs, inputs, ...].
    """
    matrix = second.double().flatten(1)
    weight = (matrix @ first.double().flatten(1)).reshape(len(second), *first.shape[1:])
    moved = None if bias is None else matrix @ bias.double()
    total = moved if after is None else after.double() + (0 if moved is None else moved)
    return weight.to(first.dtype), None if total is None else total.to(first.dtype)


@torch.no_grad()
def join_parallel(module: fx.GraphModule) -> list[list[str]]:
    """Make one layer, in place, of all linear layers that read the same value; gives the names of each such set.

    Its weight is theirs, one under the other, by the name of the first with "_joined" behind it; its output is split.
    """
    reading: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is LINEAR and _is_own(node):
            reading.setdefault(node.args[0], []).append(node)
    done = []
    for given, nodes in reading.items():
        biased = [node for node in nodes if len(node.args) > 2 and node.args[2] is not None]
        for part in (biased, [node for node in nodes if node not in biased]):
            if len(part) > 1:
                done.append(_join(module, given, part))
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    return done


def _is_own(node: fx.Node) -> bool:
    """Whether the weight and the bias of a linear layer are parameters that nothing else reads."""
    held = [each for each in node.args[1:3] if each is not None]
    return all(isinstance(each, fx.Node) and each.op == "get_attr" and len(each.users) == 1 for each in held)


def _join(module: fx.GraphModule, given: fx.Node, nodes: list[fx.Node]) -> list[str]:
    names = [_owner(node.args[1]) for node in nodes]
    owner = f"{names[0]}_joined"
    module.add_submodule(owner, nn.Module())
    held = {}
    for place, last in ((1, "weight"), (2, "bias")):
        if len(nodes[0].args) > place and nodes[0].args[place] is not None:
            parts = [attribute(module, node.args[place].target) for node in nodes]  # type: ignore[union-attr]
            held[last] = nn.Parameter(torch.cat(parts), requires_grad=parts[0].requires_grad)
            module.get_submodule(owner).register_parameter(last, held[last])
    sizes = [len(attribute(module, node.args[1].target)) for node in nodes]  # type: ignore[union-attr]
    with module.graph.inserting_before(nodes[0]):
        read = [module.graph.get_attr(f"{owner}.{last}") for last in held]
        whole = module.graph.call_function(LINEAR, (given, *read))
        split = module.graph.call_function(aten.split_with_sizes.default, (whole, sizes, -1))
        parts_of = [module.graph.call_function(operator.getitem, (split, place)) for place in range(len(nodes))]
    for node, part in zip(nodes, parts_of):
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        module.graph.erase_node(node)
    return names
