"""A captured graph as a page of JSON, and back: no pickle, no code."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from featherweight.core.errors import ArtifactError, TaskError

from .graph import CAPTURED

_NAMED: dict[type, str] = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}
_FUNCTIONS = {
    function.__name__: function
    for function in (
        operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv, operator.mod,
        operator.neg, operator.pow, operator.eq, operator.ne, operator.le, operator.lt, operator.ge, operator.gt,
        torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not,
    )
}  # fmt: skip


def dump_graph(module: fx.GraphModule) -> dict[str, Any]:
    """The nodes of a captured graph in order, and how its inputs and outputs are nested. Raises `TaskError` for a node
    that has no such form.
    """
    page: dict[str, Any] = {"nodes": [_dump_node(node) for node in module.graph.nodes]}
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        page["arguments"] = list(info.orig_args)
        page["inputs"] = pytree.treespec_dumps(info.in_spec)
        page["outputs"] = None if info.out_spec is None else pytree.treespec_dumps(info.out_spec)
    return page


def load_graph(page: dict[str, Any]) -> fx.GraphModule:
    """The graph module that `page` describes; parameters, buffers and ports are put in afterwards, by full names."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for item in page["nodes"]:
            target = _load_function(item["target"]) if item["op"] == "call_function" else item["target"]
            args, kwargs = _load(item["args"], nodes), _load(item["kwargs"], nodes)
            nodes[item["name"]] = graph.create_node(item["op"], target, tuple(args), kwargs, name=item["name"])
        if "arguments" in page:
            outputs = None if page["outputs"] is None else pytree.treespec_loads(page["outputs"])
            graph.set_codegen(
                _PyTreeCodeGen(_PyTreeInfo(page["arguments"], pytree.treespec_loads(page["inputs"]), outputs))
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"the captured graph cannot be rebuilt: {type(error).__name__}: {error}") from error
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=CAPTURED)
    module.graph = graph
    return module.eval()


def read_captured(module: nn.Module) -> dict[str, Any] | None:
    """The page of a captured graph as plain settings; None for any other module."""
    return {"graph": dump_graph(module)} if isinstance(module, fx.GraphModule) else None


def _dump_node(node: fx.Node) -> dict[str, Any]:
    target = _dump_function(node) if node.op == "call_function" else str(node.target)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": _dump(list(node.args)),
        "kwargs": _dump(dict(node.kwargs)),
    }


def _dump_function(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}::{node.target.name().split('::')[1]}"
    name = getattr(node.target, "__name__", str(node.target))
    if _FUNCTIONS.get(name) is not node.target:
        raise TaskError(f"the captured graph calls {name}, which cannot be saved")
    return name


def _load_function(name: str) -> Any:
    if "::" not in name:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def _dump(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [_dump(item) for item in value]
    if isinstance(value, dict):
        return {"map": {str(key): _dump(item) for key, item in value.items()}}
    if isinstance(value, float):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, name in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise TaskError(f"the captured graph holds a constant of type {type(value).__name__}, which cannot be saved")


def _load(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_load(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return nodes[held]
    if kind == "map":
        return {key: _load(item, nodes) for key, item in held.items()}
    if kind == "float":
        return float(held)
    return torch.device(held) if kind == "device" else getattr(torch, held)
