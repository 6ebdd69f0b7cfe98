"""Coupled dimensions: which channels, neurons and heads of a network can only be removed together.

They are read off the `torch.export` graph. Every index of every parameter's dimension starts with a label of its own;
one rule per ATen operator (`featherweight.model.rules`) says how labels pass from its inputs to its output and which
of them belong together from then on. An operator without a rule fixes what reaches it. What remains is checked by
running the network: silencing a unit in the old network and removing it must give the same outputs, or its group is
refused, by name.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..core.errors import TaskError
from .rules import (
    Call,
    Indices,
    NoRule,
    Shape,
    Size,
    Trace,
    Work,
    find,
    fixed_like,
    shapes_in,
    sizes_of,
)

Slot = tuple[str, int]  # a parameter or buffer by its full name, and one of its dimensions
Cut = dict[int, Indices]  # group -> the units of it to remove
IGNORED = ("_assert", "sym_", "_guards")
PARAMETRIZED = "its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: each can be removed alone, and takes with it the same number of indices at the same
    places.

    `places[tensor, dim]` holds, for each unit, the indices that go with it: units x indices per unit. `components`
    are the labels' components.
    """

    places: dict[Slot, Indices]
    components: Indices

    def __len__(self) -> int:
        return len(self.components)

    @property
    def name(self) -> str:
        """The first tensor that it cuts; enough to tell the user which group is meant."""
        return next(iter(self.places))[0]


@dataclass(eq=False)
class Coupling:
    """The groups of a network, what is fixed and why, and what its calls cost in terms of the groups.

    `dims` holds the labels of every parameter's and buffer's dimension, `component` the component of every label.
    Tied tensors go by one name; `names` gives it for each. `repair` names the groups whose removal needs integer
    attributes of modules to follow.
    """

    groups: list[Group]
    dims: dict[Slot, Indices]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    component: Indices
    fixed: dict[Slot, str]
    sizes: list[Size]
    works: list[Work]
    repair: set[int] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)

    def gone(self, cut: Cut) -> np.ndarray:
        """For every label whether `cut` removes it."""
        removed = np.zeros(self.component.max(initial=-1) + 1, dtype=bool)
        for group, units in cut.items():
            removed[self.groups[group].components[units]] = True
        return removed[self.component]

    def touches(self, labels: Indices, groups: set[int]) -> bool:
        """Whether one of `groups` has a unit among `labels`."""
        components = self.component[labels]
        return any(bool(np.isin(components, self.groups[group].components).any()) for group in groups)

    def free(self) -> list[int]:
        """The groups that passed the check."""
        return [place for place in range(len(self.groups)) if place not in self.refused]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its full name, tied ones under each of their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def graph_of(model: nn.Module, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The graph of `model` on `example`, with whole operators and fixed sizes; raises `TaskError` if it cannot be
    exported.
    """
    given = {name: tensor.detach().clone() for name, tensor in example.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's remarks on the model's insides are nothing to act on
            return torch.export.export(model, (), kwargs=given, strict=False)
    except Exception as error:
        brief = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TaskError(
            f"torch.export cannot trace {type(model).__name__} ({brief[:200]}), so its channels cannot be told apart; "
            "prune.weights works without that"
        ) from error


def walk(graph: fx.Graph, trace: Trace, state: dict[fx.Node, Any]) -> Any:
    """Follow labels through `graph`, whose placeholders are in `state`; return what its output gets."""
    for node in graph.nodes:
        if node.op == "output":
            return _resolved(node.args[0], state)
        if node.op == "get_attr":
            held: Any = graph.owning_module
            for part in str(node.target).split("."):
                held = getattr(held, part)
            state[node] = held if isinstance(held, fx.GraphModule) else fixed_like(held, "it is a constant")
        elif node.op == "call_function":
            state[node] = _follow(node, trace, state)
    return None


def _resolved(value: Any, state: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(value, lambda node: state.get(node))


def _follow(node: fx.Node, trace: Trace, state: dict[fx.Node, Any]) -> Any:
    target: Any = node.target
    args = _resolved(node.args, state)
    if target is operator.getitem:
        return args[0][args[1]]
    if not hasattr(target, "_schema") or any(isinstance(item, fx.GraphModule) for item in args):
        return _follow_inner(node, list(args), trace)
    given = {**dict(zip((item.name for item in target._schema.arguments), args)), **_resolved(node.kwargs, state)}
    call = Call(node, {item.name: given.get(item.name, item.default_value) for item in target._schema.arguments}, trace)
    if call.name.startswith(IGNORED):
        return None
    return _apply(call)


def _apply(call: Call) -> Any:
    """What the call's rule gives; without a rule everything that goes in is fixed."""
    output = call.node.meta.get("val")
    reason = f"the operator {call.name} has no rule"
    found = find(call.node.target) if call.shapes else None
    if found is not None:
        try:
            result = found(call)
            if _fits(result, output):
                return result
            reason = f"the rule of the operator {call.name} does not cover this use of it"
        except NoRule as refusal:
            reason = f"there is no rule for {refusal}"
    call.freeze_all(reason)
    return fixed_like(output, reason if call.shapes else f"the operator {call.name} makes it")


def _fits(result: Any, output: Any) -> bool:
    if isinstance(output, Tensor):
        return isinstance(result, Shape) and tuple(dim.size for dim in result) == sizes_of(output)
    return isinstance(output, list | tuple) and len(output) == len(result) and all(map(_fits, result, output))


def _follow_inner(node: fx.Node, args: list[Any], trace: Trace) -> Any:
    """Graphs within the graph (code under `no_grad` or `autocast`) are followed; other functions fix what they get."""
    inner = next((item for item in args if isinstance(item, fx.GraphModule)), None)
    if inner is not None and str(node.target).startswith("wrap_with"):
        holders = [item for item in inner.graph.nodes if item.op == "placeholder"]
        return walk(inner.graph, trace, dict(zip(holders, args[args.index(inner) + 1 :])))
    for shape in shapes_in(args):
        for dim in shape:
            trace.labels.freeze(dim, f"the function {node.name} has no rule")
    return fixed_like(node.meta.get("val"), f"the function {node.name} has no rule")


def trace_model(
    program: torch.export.ExportedProgram, names: dict[str, str], choices: dict[str, int]
) -> tuple[Trace, dict[Slot, Indices], dict[Slot, str]]:
    """Label all parameters and buffers and follow the labels to the outputs; `names` gives each tensor its one name."""
    trace, signature = Trace(choices=choices), program.graph_signature
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state: dict[fx.Node, Any] = {}
    known: dict[str, Shape] = {}
    used: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        value, owner = node.meta.get("val"), owners.get(node.name)
        if owner is None:
            state[node] = fixed_like(
                value, "it is an input of the model" if node.name in signature.user_inputs else "it is a constant"
            )
            continue
        node.meta["owner"] = owner.rpartition(".")[0]
        name = names[owner]
        if name not in known:
            known[name] = Shape(trace.labels.fresh(size) for size in sizes_of(value))
        state[node] = known[name]
        used |= {name} if node.users else set()
    for name in known.keys() - used:
        for dim in known[name]:
            trace.labels.freeze(dim, "it is not used on the example inputs")
    for name in known:
        if "parametrizations" in name.split("."):
            for dim in known[name]:
                trace.labels.freeze(dim, PARAMETRIZED)
    for shape in shapes_in(walk(program.graph, trace, state)):
        for dim in shape:
            trace.labels.freeze(dim, "it is an output of the model")
    dims = {
        (name, place): dim.labels
        for name, shape in known.items()
        for place, dim in enumerate(shape)
        if dim.labels is not None
    }
    rest = {
        (name, place): dim.reason
        for name, shape in known.items()
        for place, dim in enumerate(shape)
        if dim.labels is None
    }
    return trace, dims, rest


def grouped(
    trace: Trace, dims: dict[Slot, Indices], component: Indices, frozen: Mapping[int, str], parameters: frozenset[str]
) -> list[Group]:
    """Components that cut the same places, and change the same sizes, become the units of one group.

    Those that may not be removed, or stand alone, give none.
    """
    units: dict[int, dict[Slot, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, labels in dims.items():
        for index, owner in enumerate(component[labels].tolist()):
            if owner not in frozen:
                units[owner][place].append(index)
    changes: dict[int, list[int]] = defaultdict(list)
    for number, size in enumerate(trace.sizes):
        for owner in np.unique(component[size.labels]).tolist():
            changes[owner].append(number)
    alike: dict[Any, list[int]] = defaultdict(list)
    for owner, places in units.items():
        if any(name in parameters for name, _ in places):
            signature = tuple((place, len(indices)) for place, indices in places.items())
            alike[signature, tuple(changes[owner])].append(owner)
    return [
        Group({place: np.array([units[owner][place] for owner in owners]) for place, _ in signature}, np.array(owners))
        for (signature, _), owners in alike.items()
        if len(owners) > 1
    ]


def couple(model: nn.Module, example: Mapping[str, Tensor]) -> Coupling:
    """The coupled dimensions of `model`, every group of them checked on `example` (inputs by name).

    The model is not changed; it is traced and run in evaluation mode on the CPU. Raises `TaskError` if `torch.export`
    cannot trace it.
    """
    from .cut import probe

    plain = copy.deepcopy(model).cpu().eval()
    example = {name: tensor.detach().cpu() for name, tensor in example.items()}
    program = graph_of(plain, example)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors(plain).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(plain).items()}
    parameters = frozenset(names[name] for name, _ in plain.named_parameters())
    best: Coupling | None = None
    for choices in _attempts():
        trace, dims, rest = trace_model(program, names, dict(choices))
        component, reasons = trace.labels.components()
        found = Coupling(
            groups=grouped(trace, dims, component, reasons, parameters),
            dims=dims,
            names=names,
            shapes={name: shapes[name] for name in names.values()},
            parameters=parameters,
            component=component,
            fixed=rest | _reasons(dims, component, reasons),
            sizes=trace.sizes,
            works=trace.works,
        )
        probe(found, plain, example)
        if best is None or _reach(found) > _reach(best):
            best = found
        if not _turn(choices, trace, found, reasons):
            break
    assert best is not None
    return best


def _attempts() -> Iterator[dict[str, int]]:
    """One dictionary of choices, handed out again and again while it is changed; four times is as many ways as a
    reshape has.
    """
    choices: dict[str, int] = {}
    for _ in range(4):
        yield choices


def _reasons(dims: dict[Slot, Indices], component: Indices, frozen: Mapping[int, str]) -> dict[Slot, str]:
    """Why dimensions are fixed, in whole or in part."""
    found: dict[Slot, str] = {}
    for place, labels in dims.items():
        for owner in component[labels].tolist():
            if owner in frozen:
                found[place] = frozen[owner]
                break
    return found


def _reach(coupling: Coupling) -> int:
    """How many indices of parameters the groups that passed may remove."""
    return sum(indices.size for place in coupling.free() for indices in coupling.groups[place].places.values())


def _turn(choices: dict[str, int], trace: Trace, coupling: Coupling, frozen: Mapping[int, str]) -> bool:
    """Choose the next way where labels are fixed or failed the check; False if there is none left.

    Calls of one operator in the code of one module (the heads of query, key and value) turn together.
    """
    bad = set(frozen) | {int(owner) for place in coupling.refused for owner in coupling.groups[place].components}
    together = {
        (call.module, call.name)
        for call, _, parts in trace.open.values()
        if set(coupling.component[np.concatenate(parts)].tolist()) & bad
    }
    turned = False
    for node, (call, ways, _) in trace.open.items():
        if (call.module, call.name) in together and choices.get(node, 0) < ways - 1:
            choices[node] = choices.get(node, 0) + 1
            turned = True
    return turned
