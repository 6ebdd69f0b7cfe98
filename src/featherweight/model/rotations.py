"""Where a network can be rotated without changing what it computes: the free bases of its graph.

Every dimension of every parameter starts with a basis of its own, and the rules of `equivariance` say which are one
and which are fixed. A norm's gain fixes the basis of what it multiplies, unless it can move into the linear layers
behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from . import equivariance as equivariance
from .bases import Axis
from .followed import Trace, operator_name
from .groups import IGNORED, Slot, graph_of, tensors
from .rules.call import sizes_of

SMALLEST = 1e-3  # a shift is divided by gains of at least this share of the largest


@dataclass(frozen=True)
class Reader:
    """A linear layer behind a norm: its weight, the dimension of it that meets the inputs, and its bias.

    `module` is the full name of the module whose code it is.
    """

    weight: str
    dim: int
    bias: str | None
    module: str


@dataclass(frozen=True)
class Gain:
    """A norm's gain, and shift, that can move into the layers which alone read it."""

    weight: str
    bias: str | None
    readers: tuple[Reader, ...]

    @property
    def into_biases(self) -> bool:
        """Whether the shift can move into biases of all readers."""
        return all(reader.bias is not None for reader in self.readers)


@dataclass(frozen=True)
class Tie:
    """A weight that a gain would move into if it were not tied to others: `module` reads it there."""

    module: str
    weight: str


@dataclass(frozen=True)
class Basis:
    """A basis that may be rotated: the dimensions of parameters that turn with it, in blocks of `block` entries.

    `gains` must move first. With `ones` the rotation must leave vectors of equal entries as they are.
    """

    places: tuple[Slot, ...]
    block: int
    ones: bool
    gains: tuple[Gain, ...] = ()

    @property
    def name(self) -> str:
        """The first tensor that turns with it."""
        return self.places[0][0]


@dataclass(eq=False)
class Free:
    """The free bases of a network, why every other dimension is fixed, and the ties that keep gains where they are."""

    bases: list[Basis]
    fixed: dict[Slot, str]
    ties: list[Tie] = field(default_factory=list)


class Immovable(Exception):
    """A gain cannot move into the layers behind it; the message says why."""


def free_bases(model: nn.Module, example: Mapping[str, Tensor], keep: Mapping[str, str] | None = None) -> Free:
    """The free bases of `model` in evaluation mode, found on `example` (inputs by name).

    `keep` names parameters that must stay as they are, each with the reason. The model is not changed. Raises
    `TaskError` if `torch.export` cannot trace it.
    """
    held, keep = tensors(model), keep or {}
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in held.items()}
    program = graph_of(model.eval(), example)
    signature, stored = program.graph_signature, set(model.state_dict())
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    placed = {
        node: names[owners[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder" and owners.get(node.name) in stored
    }
    trace = Trace(placed, held)
    trace.walk(program.graph)
    for name, reason in keep.items():
        trace.bases.fix(reason, *trace.known.get(names[name], ()))
    gains, ties = _gains(trace, {names[name]: reason for name, reason in keep.items()})
    trace.bases.fix("it is an output of the model", *trace.outputs)
    return Free(*_collected(trace, gains), ties)


def _collected(trace: Trace, gains: list[tuple[Axis, Gain]]) -> tuple[list[Basis], dict[Slot, str]]:
    bases = trace.bases
    places: dict[int, list[Slot]] = {}
    fixed: dict[Slot, str] = {}
    for name, axes in trace.known.items():
        for dim, axis in enumerate(axes):
            reason = axis if isinstance(axis, str) else bases.reason(axis.basis)
            if reason:
                fixed[name, dim] = reason
            elif isinstance(axis, Axis):
                places.setdefault(bases.find(axis.basis), []).append((name, dim))
    found = []
    for root, slots in places.items():
        moving = tuple(gain for axis, gain in gains if bases.find(axis.basis) == root)
        found.append(Basis(tuple(slots), bases.block(root), bases.ones(root), moving))
    return found, fixed


def _gains(trace: Trace, keep: Mapping[str, str]) -> tuple[list[tuple[Axis, Gain]], list[Tie]]:
    """The gains that move, each with the axis that it frees; the axes of all others are fixed."""
    found: list[tuple[Axis, Gain]] = []
    ties: list[Tie] = []
    for axis, node, weight, bias in trace.pending:
        name = trace.owners.get(weight)
        trace.bases.fix("it is the gain of a norm", *trace.known.get(name or "", ()))
        if name is not None and bool((trace.held[name] == trace.held[name].flatten()[0]).all()):
            continue  # a gain that is the same for all entries is in nobody's way
        if trace.bases.reason(axis.basis):
            continue
        try:
            found.append((axis, _gain(trace, axis, node, weight, bias, keep, ties)))
        except Immovable as reason:
            trace.bases.fix(str(reason), axis)
    return found, ties


def _gain(
    trace: Trace,
    axis: Axis,
    node: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    keep: Mapping[str, str],
    ties: list[Tie],
) -> Gain:
    name, shift = trace.owners.get(weight), trace.owners.get(bias) if bias is not None else None
    if name is None or (bias is not None and shift is None):
        raise Immovable("the gain of a norm is no parameter")
    if any(len(each.users) != 1 for each in (weight, bias) if each is not None):
        raise Immovable(f"the gain {name} is used more than once")
    nodes = dict(_readers(trace, axis, node, name))
    for reader, (place, _, _) in nodes.items():
        tensor = reader.args[place]
        assert isinstance(tensor, fx.Node)
        if trace.owners[tensor] in keep:
            raise Immovable(f"the gain {name} cannot move into {trace.owners[tensor]}: {keep[trace.owners[tensor]]}")
        if not set(tensor.users) <= set(nodes):
            module = _module(reader)
            ties.append(Tie(module, trace.owners[tensor]))
            raise Immovable(
                f"the gain {name} cannot move into {module}, whose weight is tied (untie: true gives it its own)"
            )
    found = Gain(name, shift, tuple(_reader(trace, reader, *places) for reader, places in nodes.items()))
    gain = trace.held[name].detach().abs()
    if shift is not None and not found.into_biases and float(gain.min()) < SMALLEST * float(gain.max()):
        raise Immovable(f"{shift} cannot be divided by the gain {name}, which is nearly zero in places")
    return found


# A factor per entry of the last dimension is the same before and behind them, as long as they leave that one alone.
MOVES = frozenset(
    {
        "alias", "clone", "contiguous", "detach", "to", "_to_copy", "dropout", "type_as", "view", "reshape",
        "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "mT", "expand",
        "slice", "select", "mean",
    }
)  # fmt: skip
READS = {"linear": (1, 1, 2), "addmm": (2, 0, 0), "matmul": (1, 0, None), "mm": (1, 0, None)}
Places = tuple[int, int, int | None]  # where a layer has its weight, which dimension meets the input, its bias


def _readers(trace: Trace, axis: Axis, node: fx.Node, name: str) -> Iterator[tuple[fx.Node, Places]]:
    """The linear layers behind `node`; raises `Immovable` if its output goes anywhere else."""
    for user in node.users:
        kind = operator_name(user)
        if kind.startswith(IGNORED):
            continue
        places = READS.get(kind)
        if places is not None and _reads(trace, user, node, places):
            yield user, places
        elif kind in MOVES and _moved(trace, axis, user):
            yield from _readers(trace, axis, user, name)
        else:
            raise Immovable(f"the gain {name} cannot move: its output goes into {kind or user.op} as well")


def _reads(trace: Trace, user: fx.Node, node: fx.Node, places: Places) -> bool:
    given = 1 if operator_name(user) == "addmm" else 0
    bias = user.args[places[2]] if places[2] is not None and places[2] < len(user.args) else None
    return user.args[given] is node and user.args[places[0]] in trace.owners and (bias is None or bias in trace.owners)


def _moved(trace: Trace, axis: Axis, user: fx.Node) -> bool:
    """Whether the entries along the axis are still the last dimension, in their order."""
    axes, value = trace.state[user].axes, user.meta["val"]
    last = axes[-1] if axes else ""
    before = sizes_of(user.args[0].meta["val"])[-1]  # type: ignore[union-attr]
    same = isinstance(last, Axis) and trace.bases.find(last.basis) == trace.bases.find(axis.basis)
    return isinstance(value, torch.Tensor) and same and sizes_of(value)[-1] == before


def _reader(trace: Trace, node: fx.Node, place: int, dim: int, bias: int | None) -> Reader:
    held = node.args[bias] if bias is not None and bias < len(node.args) else None
    shift = trace.owners[held] if isinstance(held, fx.Node) and len(held.users) == 1 else None
    return Reader(trace.owners[node.args[place]], dim, shift, _module(node))  # type: ignore[index]


def _module(node: fx.Node) -> str:
    """The full name of the innermost module whose code made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]).partition("@")[0] if stack else ""
