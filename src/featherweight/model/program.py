"""A captured graph as a page of JSON, and back: no pickle, no code.

torch writes Python from a graph and runs it, names and all. So a page that is read is not believed: names must be
names, what is called an operator, a module of the model or one of a few functions, what is read a tensor of the model.
"""

from __future__ import annotations

import json
import keyword
import operator
import re
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from featherweight.core.errors import ArtifactError, TaskError

from .graph import CAPTURED

_NAMED: dict[type, str] = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}
_OPS = ("placeholder", "get_attr", "call_module", "call_function", "output")
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_FILES = ("aten::from_file", "debugprims::load_tensor")  # operators that open files by name
_IMPORTING = ("__enum__", "default_factory_module")  # what makes torch import modules while it reads how values nest
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
    """The graph module that `page` describes; parameters, buffers and ports are put in afterwards, by full names.

    Raises `ValueError` or the like for a page that `dump_graph` never wrote.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in page["nodes"]:
        args, kwargs = _load(item["args"], nodes), _load(item["kwargs"], nodes)
        kwargs = {_name(key): value for key, value in kwargs.items()}
        nodes[item["name"]] = graph.create_node(item["op"], _target(item), tuple(args), kwargs, name=item["name"])
    if "arguments" in page:
        inputs, outputs = _load_tree(page["inputs"]), page["outputs"]
        for key in inputs.child(1).context if inputs.num_children == 2 and inputs.child(1).type is dict else ():
            _name(key)
        arguments = [_name(each) for each in page["arguments"]]
        tree = _PyTreeInfo(arguments, inputs, None if outputs is None else _load_tree(outputs))
        graph.set_codegen(_PyTreeCodeGen(tree))
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=CAPTURED)
    module.graph = graph
    return module.eval()


def check_graphs(model: nn.Module) -> None:
    """Raise `ArtifactError` unless all tensors that captured graphs read, and all modules that they call, are there."""
    for module in model.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op in ("get_attr", "call_module") and not _holds(module, node):
                raise ArtifactError(f"the captured graph reads {str(node.target)!r}, which is not in it")


def _holds(module: fx.GraphModule, node: fx.Node) -> bool:
    prefix, _, attribute = str(node.target).rpartition(".")
    try:
        owner = module.get_submodule(prefix)
    except AttributeError:
        return False
    if node.op == "call_module":
        return attribute in owner._modules
    return attribute in {*owner._parameters, *owner._buffers, *getattr(owner, "parametrizations", {})}


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


def _target(item: dict[str, Any]) -> Any:
    """What a node reads, calls, or is called."""
    op, target = item["op"], item["target"]
    if op == "call_function":
        return _load_function(target)
    if op not in _OPS or not _PATH.fullmatch(target):
        raise ValueError(f"a node {op!r} of {target!r}")
    return _name(target) if op == "placeholder" else target


def _name(text: Any) -> str:
    """A name that stands in Python as it is."""
    if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is no name")
    return text


def _load_function(name: str) -> Any:
    if "::" not in name:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    if not isinstance(found, torch._ops.OpOverload) or found._schema.name in _FILES:
        raise ValueError(f"{name} is no operator that a model may call")
    return found


def _load_tree(text: str) -> pytree.TreeSpec:
    if any(word in text for word in _IMPORTING):
        raise ValueError("values that nest in types of other modules")
    json.loads(text)
    return pytree.treespec_loads(text)


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
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, held)
    if not any(isinstance(found, each) and name == kind for each, name in _NAMED.items()):
        raise ValueError(f"{held!r} is no {kind}")
    return found
