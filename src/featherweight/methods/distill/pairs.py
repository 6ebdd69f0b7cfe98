"""Which layer of the teacher a layer of the student learns from: by name, by place, or by shape and order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...core.context import Context
from ...core.errors import TaskError
from ...core.outputs import first, named_outputs
from ...model.parts import operations

Form = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A layer of the student, the one of the teacher that it learns from, and how wide the outputs of both are."""

    student: str
    teacher: str
    widths: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.student} from {self.teacher}"


@dataclass(frozen=True)
class Layer:
    """A layer that ran once on the example: the shape of its first output, and whether it is a block of a row."""

    name: str
    shape: Form
    block: bool

    @property
    def width(self) -> int:
        return self.shape[1] if len(self.shape) > 3 else self.shape[-1]

    @property
    def stage(self) -> Form:
        """All of the shape but the width."""
        return (self.shape[0], *self.shape[2:]) if len(self.shape) > 3 else self.shape[:-1]


TAPS = "taps"


class Watch:
    """Keeps the first output of some layers, while it is entered, each time that the model runs.

    The layers of a captured graph only hold weights: what is kept there is the output of the operation that reads them.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model, self.names = model, list(dict.fromkeys(names))
        self.found: dict[str, Tensor] = {}
        self.calls = dict.fromkeys(self.names, 0)

    def __enter__(self) -> Watch:
        tapped = _insert_taps(self.model, self.names) if isinstance(self.model, fx.GraphModule) else {}
        self.handles = [
            (tapped.get(name) or self.model.get_submodule(name)).register_forward_hook(
                lambda _m, _given, out, name=name: self._note(name, out)
            )
            for name in self.names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        if isinstance(self.model, fx.GraphModule):
            _remove_taps(self.model)
        self.found.clear()

    def _note(self, name: str, out: object) -> None:
        self.calls[name] += 1
        try:
            tensor = first(out)
        except (LookupError, StopIteration):  # nothing is in it
            return
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 1:
            self.found[name] = tensor


@torch.no_grad()
def seen(model: nn.Module, ctx: Context) -> dict[str, Layer]:
    """The layers of `model` that run once and give features, in the order in which they end; not what gives the
    model's own outputs.
    """
    names = [name for name, _ in model.named_modules() if name and "parametrizations" not in name.split(".")]
    with Watch(model.eval(), names) as watch:
        outputs = {id(each) for each in named_outputs(model(**ctx.example))[1].values()}
        blocks = _blocks(model)
        return {
            name: Layer(name, tuple(tensor.shape), name in blocks)
            for name, tensor in watch.found.items()
            if watch.calls[name] == 1 and id(tensor) not in outputs
        }


def _insert_taps(model: fx.GraphModule, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Put a module that gives back its input behind the operation of each of these layers that has one."""
    found: dict[str, nn.Module] = {}
    for layer, node in operations(model, layers).items():
        name = f"{TAPS}.{node.name}"
        model.add_submodule(name, tap := nn.Identity())
        with model.graph.inserting_after(node):
            put = model.graph.call_module(name, (node,))
        for user in [user for user in node.users if user is not put]:
            user.replace_input_with(node, put)
        found[layer] = tap
    model.recompile()
    return found


def _remove_taps(model: fx.GraphModule) -> None:
    for node in list(model.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(f"{TAPS}."):
            node.replace_all_uses_with(node.all_input_nodes[0])
            model.graph.erase_node(node)
    model.delete_submodule(TAPS)
    model.recompile()


def _blocks(model: nn.Module) -> set[str]:
    """Children, with modules of their own, of rows; only the outermost."""
    found: set[str] = set()
    for prefix, row in model.named_modules():
        if isinstance(row, nn.Sequential | nn.ModuleList) and not any(prefix.startswith(f"{each}.") for each in found):
            children = [(f"{prefix}.{name}" if prefix else name, child) for name, child in row.named_children()]
            own = {name: child for name, child in children if any(True for _ in child.children())}
            if not all(isinstance(child, nn.Sequential | nn.ModuleList) for child in own.values()):
                found |= set(own)  # a row of rows is gone into instead
    return found


def find_pairs(
    kind: str,
    student: nn.Module,
    teacher: nn.Module,
    ctx: Context,
    layers: Mapping[str, str],
    blocks: Sequence[tuple[int, int]],
    last: bool,
    positions: bool,
) -> list[Pair]:
    """Pairs of layers by name (`layers`), by place among the blocks (`blocks`), or, without both, by shape and order.

    By shape and order those are matched whose outputs differ in width alone: the last block of each resolution, or,
    where all blocks have one, each block of the student with one of the teacher's, spread evenly. Without blocks it is
    the last layer of each resolution. With `last` only the last pair is taken; with `positions` vectors (N x D) are
    not. Raises `TaskError` for a layer that is not there, gives no features, or differs in more than the width.
    """
    mine, theirs = seen(student, ctx), seen(teacher, ctx)
    if layers or blocks:
        rows = [[each for each in found.values() if each.block] for found in (mine, theirs)]
        named = [
            (_named(kind, "student", one, mine), _named(kind, "teacher", other, theirs))
            for one, other in layers.items()
        ] + [
            (_placed(kind, "student", one, rows[0]), _placed(kind, "teacher", other, rows[1])) for one, other in blocks
        ]
        for one, other in named:
            _check(kind, one, other, positions)
    else:
        named = automatic(list(mine.values()), list(theirs.values()), positions)
        named = named[-1:] if last else named
    if not named:
        raise TaskError(
            f"{kind}: no layer of the student gives what one of the teacher's gives but for its width; "
            "name pairs in layers"
        )
    return [Pair(one.name, other.name, (one.width, other.width)) for one, other in named]


def automatic(student: list[Layer], teacher: list[Layer], positions: bool) -> list[tuple[Layer, Layer]]:
    """Layers in order whose outputs differ in width alone; see `find_pairs`."""
    rows = all(any(each.block for each in side) for side in (student, teacher))
    sides = [[each for each in side if each.block or not rows] for side in (student, teacher)]
    stages = [stage for stage in dict.fromkeys(each.stage for each in sides[0]) if stage[1:] or not positions]
    groups = [[[each for each in side if each.stage == stage] for side in sides] for stage in stages]
    groups = [group for group in groups if group[1]]
    if rows and len(groups) == 1:
        return spread(*groups[0])
    return [(mine[-1], theirs[-1]) for mine, theirs in groups]


def spread(student: list[Layer], teacher: list[Layer]) -> list[tuple[Layer, Layer]]:
    """Each of the student's, or the last ones of a longer row, with one of the teacher's at the same depth; the last
    with the last.
    """
    mine = student[-len(teacher) :]
    return [(one, teacher[round((place + 1) * len(teacher) / len(mine)) - 1]) for place, one in enumerate(mine)]


def _named(kind: str, whose: str, name: str, found: Mapping[str, Layer]) -> Layer:
    if name not in found:
        near = ", ".join(list(found)[-6:])
        raise TaskError(
            f"{kind}: the {whose} has no layer {name!r} that runs once and gives features; it has, among others: {near}"
        )
    return found[name]


def _placed(kind: str, whose: str, place: int, row: Sequence[Layer]) -> Layer:
    if not -len(row) <= place < len(row):
        raise TaskError(
            f"{kind}: the {whose} has {len(row)} blocks in rows, none at place {place}; name layers instead"
        )
    return row[place]


def _check(kind: str, one: Layer, other: Layer, positions: bool) -> None:
    sides = f"{one.name} gives {one.shape}, {other.name} of the teacher {other.shape}"
    images = len(one.shape) == len(other.shape) > 3
    if one.stage != other.stage and not images:
        raise TaskError(f"{kind}: {sides}; they may differ in width (and images in size) alone")
    if positions and len(one.shape) < 3:
        raise TaskError(f"{kind}: {sides}; attention needs features with positions, sequences or images")
