"""The graph of a model: captured once, with dimensions that are really dynamic."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from featherweight.core.errors import TaskError

CAPTURED = "CapturedModel"
Free = dict[str, dict[int, str]]


def capture(model: nn.Module, example: dict[str, Tensor], free: Free) -> ExportedProgram:
    """Export `model` (evaluation mode) with the dimensions in `free` dynamic: input name -> {dimension: label}.

    Where Python code fixes a size (such as `len(x)`), which makes the exporter refuse, the model is exported at two
    sizes; the constants that differ between the two graphs are what depends on the size, and are put back as such.
    `example` holds at least two inputs. Raises `TaskError` if the model cannot be exported.
    """
    free = {name: dims for name, dims in free.items() if dims and name in example}
    try:
        return _export(model, example, free)
    except Exception as error:
        if not free:
            raise TaskError(f"torch.export cannot capture the model: {_brief(error)}") from error
        try:
            return _export(_freed(model, example, free), example, free)
        except TaskError:
            raise
        except Exception as again:
            raise TaskError(f"torch.export cannot capture the model: {_brief(again)}") from error


def captured(model: nn.Module, example: dict[str, Tensor], free: Free) -> fx.GraphModule:
    """`model` as a graph module of ATen operators that computes what it computes in evaluation mode; weights keep their
    full names.
    """
    module = _as_graph_module(capture(model, example, free))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    return plain_graph(module)


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """The graph and the submodules of `module` in an ordinary `torch.fx.GraphModule`, which can be trained, copied and
    edited.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    made = fx.GraphModule(module, graph, class_name=CAPTURED)
    return made.eval()


def _export(model: nn.Module, example: dict[str, Tensor], free: Free) -> ExportedProgram:
    shapes = {name: dict.fromkeys(free.get(name, {}), Dim.DYNAMIC) or None for name in example}
    clones = {name: tensor.detach().clone() for name, tensor in example.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # such as that a recurrent layer lists its own weights
        return torch.export.export(model, (), kwargs=clones, dynamic_shapes=shapes if free else None)


def _as_graph_module(program: ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# -- sizes that Python code has fixed ---------------------------------------------------------------------------------
def _freed(model: nn.Module, example: dict[str, Tensor], free: Free) -> fx.GraphModule:
    """The model as a graph in which every constant that follows a free dimension is computed from it again."""
    names = sorted({label for dims in free.values() for label in dims.values()})
    base = _static(model, example)
    others = {label: _static(model, _grown(example, free, label)) for label in names}
    sizes = {label: _size(example, free, label) for label in names}
    sources = _insert_sizes(base, example, free, names)
    nodes = [node for node in base.graph.nodes if node.op == "call_function" and node not in sources.values()]
    others_nodes = {
        label: [node for node in other.graph.nodes if node.op == "call_function"] for label, other in others.items()
    }
    for label, listed in others_nodes.items():
        if [node.target for node in listed] != [node.target for node in nodes]:
            raise TaskError(
                f"the model computes differently when the dimension {label!r} grows by one; it cannot be left dynamic"
            )
    for place, node in enumerate(nodes):
        other_args = {label: (listed[place].args, listed[place].kwargs) for label, listed in others_nodes.items()}
        node.args, node.kwargs = _merge(
            (node.args, node.kwargs), other_args, sizes, _Builder(base.graph, node, sources)
        )
    base.recompile()
    return base


def _static(model: nn.Module, example: dict[str, Tensor]) -> fx.GraphModule:
    return _as_graph_module(_export(model, example, {}))


def _size(example: dict[str, Tensor], free: Free, label: str) -> int:
    return next(
        example[name].shape[place] for name, dims in free.items() for place, each in dims.items() if each == label
    )


def _grown(example: dict[str, Tensor], free: Free, label: str) -> dict[str, Tensor]:
    """The example with every dimension called `label` longer by one (its first entry stands again at the end)."""
    grown = dict(example)
    for name, dims in free.items():
        for place, each in dims.items():
            if each == label:
                grown[name] = torch.cat([grown[name], grown[name].narrow(place, 0, 1)], place)
    return grown


def _insert_sizes(
    module: fx.GraphModule, example: dict[str, Tensor], free: Free, names: list[str]
) -> dict[str, fx.Node]:
    """One node per label that reads the size of that dimension off an input."""
    inputs = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    last = list(inputs.values())[-1]
    sources = {}
    for label in names:
        name, place = next(
            (name, place) for name, dims in free.items() for place, each in dims.items() if each == label
        )
        with module.graph.inserting_after(last):
            sources[label] = module.graph.call_function(torch.ops.aten.sym_size.int, (inputs[name], place))
    return sources


class _Builder:
    """Inserts `factor * size + rest` before a node."""

    def __init__(self, graph: fx.Graph, before: fx.Node, sources: dict[str, fx.Node]):
        self.graph, self.before, self.sources = graph, before, sources

    def __call__(self, label: str, factor: int, rest: int) -> fx.Node:
        value = self.sources[label]
        with self.graph.inserting_before(self.before):
            if factor != 1:
                value = self.graph.call_function(operator.mul, (value, factor))
            return self.graph.call_function(operator.add, (value, rest)) if rest else value


def _merge(value: Any, others: dict[str, Any], sizes: dict[str, int], build: Callable[[str, int, int], fx.Node]) -> Any:
    """`value` with each integer that differs in one of `others` replaced by what it is as a function of that label's
    size.
    """
    if isinstance(value, tuple | list):
        parts = [
            _merge(item, {label: other[place] for label, other in others.items()}, sizes, build)
            for place, item in enumerate(value)
        ]
        return type(value)(parts)
    if isinstance(value, dict):
        return {
            key: _merge(item, {label: other[key] for label, other in others.items()}, sizes, build)
            for key, item in value.items()
        }
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    moved = {label: other - value for label, other in others.items() if other != value}
    if not moved:
        return value
    if len(moved) > 1:
        raise TaskError(
            f"a size in the model depends on {' and '.join(sorted(moved))} together; "
            "give the task only one dynamic dimension"
        )
    ((label, factor),) = moved.items()
    return build(label, factor, value - factor * sizes[label])
