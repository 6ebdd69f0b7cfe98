"""Stored weights in place of float initializers, in the layout that the graph reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.core.encoding import Affine, Encoding
from featherweight.core.errors import ArtifactError

from .edit import Editor, array

if TYPE_CHECKING:
    from onnxscript import ir

LAYOUT = frozenset({"Transpose", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Identity"})
BETWEEN, PART = "|", ":"  # an initializer "a|b" holds the weights a and b; "a:0" and "a:1" are parts of the weight a


@dataclass(frozen=True)
class Form:
    """One weight as arrays of its own shape: floats, or integers with scale and zero point; and the names of the
    weights that it holds.
    """

    values: np.ndarray
    scale: np.ndarray | None
    zero: np.ndarray | None
    names: tuple[str, ...]

    @property
    def storable(self) -> bool:
        """Whether one scale, or one per channel, says it all."""
        return self.scale is None or self.zero is None or len(varying(self.scale, self.zero)) <= 1

    @property
    def parts(self) -> list[np.ndarray]:
        return [part for part in (self.values, self.scale, self.zero) if part is not None]


def weights_in(name: str) -> list[str]:
    """The torch names of the weights that the initializer `name` holds, whole or in part."""
    return [part.rpartition(PART)[0] or part for part in name.split(BETWEEN)]


def check_read(edit: Editor, stored: dict[str, Encoding]) -> None:
    """Raise `ArtifactError` unless the graph reads an initializer of the name and the shape of every stored weight."""
    for name, encoding in stored.items():
        found = edit.graph.initializers.get(name)
        if found is None or not (found.uses() or found.is_graph_output()):
            raise ArtifactError(
                f"the exported graph does not read the weight {name!r}, which is to be stored as {encoding.form}; "
                "is that layer used?"
            )
        floats = array(found)
        if floats is None or floats.shape != encoding.shape:
            shape = None if floats is None else floats.shape
            raise ArtifactError(
                f"the weight {name!r} has the shape {encoding.shape}, but {shape} in the exported graph"
            )


def place(edit: Editor, stored: dict[str, Encoding], parameters: set[str]) -> None:
    """Swap the initializers named in `stored` for integers with DequantizeLinear, and lay out every weight as the graph
    reads it.

    Transpositions, slices and concatenations of weights are carried out on what is stored, wherever that stores nothing
    twice.
    """
    forms = {
        value: _form(name, value, stored.get(name))
        for name, value in edit.graph.initializers.items()
        if name in parameters | set(stored)
    }
    for value, form in [*_laid_out(edit.graph, forms), *forms.items()]:
        if value.uses() or value.is_graph_output():
            _store(edit, value, form)
    edit.sweep()


def _form(name: str, value: ir.Value, encoding: Encoding | None) -> Form:
    floats = array(value)
    assert floats is not None
    if encoding is None:
        return Form(floats, None, None, (name,))
    assert isinstance(encoding, Affine)
    values, entries = encoding.values.cpu().numpy(), (encoding.scale.float(), encoding.zero)
    scale, zero = (_spread(part.cpu().numpy(), values, encoding.axis) for part in entries)
    return Form(values, scale, zero, (name,))


def _spread(entries: np.ndarray, values: np.ndarray, axis: int | None) -> np.ndarray:
    """Entries per tensor or per channel, as a view of the shape of `values`."""
    shape = [1] * values.ndim
    if axis is not None and entries.size > 1:
        shape[axis] = -1
    return np.broadcast_to(entries.reshape(shape), values.shape)


def varying(*arrays: np.ndarray) -> list[int]:
    """The dimensions along which at least one of these arrays of one shape is not constant."""
    return [axis for axis in range(arrays[0].ndim) if any((part != part.take([0], axis)).any() for part in arrays)]


# -- layout -----------------------------------------------------------------------------------------------------------
def _laid_out(graph: ir.Graph, forms: dict[ir.Value, Form]) -> list[tuple[ir.Value, Form]]:
    """The rearranged weights that the graph reads, computed here.

    Only where together they are no larger than the weights they come from, and where their scales still vary along at
    most one dimension.
    """
    known = dict(forms)
    for node in graph:
        if node.op_type in LAYOUT and _readable(node, known):
            known.update(_evaluate(node, known))
    read = [value for value in known if any(not _folds(usage.node, known) for usage in value.uses())]
    done: list[tuple[ir.Value, Form]] = []
    for names, group in _components([value for value in read if value not in forms], known):
        sources = [value for value, form in forms.items() if set(form.names) & names]
        still_read = [value for value in sources if value in read]
        if _size([*group, *still_read], known) <= _size(sources, known) and all(
            known[value].storable for value in group
        ):
            done += _named([(value, known[value]) for value in group])
    return done


def _size(values: list[ir.Value], known: dict[ir.Value, Form]) -> int:
    return sum(known[value].values.size for value in values)


def _data(node: ir.Node) -> list[ir.Value]:
    """What a layout operation rearranges: all inputs of Concat, the first of any other."""
    return [value for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1]) if value is not None]


def _readable(node: ir.Node, known: dict[ir.Value, Form]) -> bool:
    """Whether a layout operation rearranges weights of one type only, in a way that is known now."""
    data = _data(node)
    if not all(value in known for value in data):
        return False
    if any(value is not None and array(value) is None for value in node.inputs[len(data) :]):
        return False
    return len({(known[value].scale is None, known[value].values.dtype) for value in data}) == 1


def _folds(node: ir.Node, known: dict[ir.Value, Form]) -> bool:
    return node.op_type in LAYOUT and node.outputs[0] in known


def _evaluate(node: ir.Node, known: dict[ir.Value, Form]) -> dict[ir.Value, Form]:
    """What a layout operation makes of values, scales and zero points alike."""
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    data = _data(node)
    rest = {str(value.name): array(value) for value in node.inputs[len(data) :] if value is not None}
    evaluator = ReferenceEvaluator(ir.serde.serialize_node(node))
    results: list[list[np.ndarray]] = []
    for each in zip(*(known[value].parts for value in data)):
        given: dict[str, Any] = {**rest, **{str(value.name): part for value, part in zip(data, each)}}
        results.append(evaluator.run(None, given))  # type: ignore[arg-type]
    names = tuple(dict.fromkeys(name for value in data for name in known[value].names))
    made = {}
    for place, output in enumerate(node.outputs):
        parts = [result[place] for result in results]
        scale, zero = (parts[1], parts[2]) if len(parts) == 3 else (None, None)
        made[output] = Form(parts[0], scale, zero, names)
    return made


def _components(values: list[ir.Value], known: dict[ir.Value, Form]) -> Iterator[tuple[set[str], list[ir.Value]]]:
    """Values that share a source, together: the names of their sources, and they themselves."""
    groups: list[tuple[set[str], list[ir.Value]]] = []
    for value in values:
        names, members = set(known[value].names), [value]
        apart = []
        for group in groups:
            if group[0] & names:
                names, members = names | group[0], group[1] + members
            else:
                apart.append(group)
        groups = [*apart, (names, members)]
    yield from groups


def _named(found: list[tuple[ir.Value, Form]]) -> list[tuple[ir.Value, Form]]:
    """Number the parts where one weight lies in several initializers."""
    count: dict[str, int] = {}
    for _, form in found:
        for name in form.names:
            count[name] = count.get(name, 0) + 1
    seen: dict[str, int] = {}
    named = []
    for value, form in found:
        names = []
        for name in form.names:
            seen[name] = seen.get(name, -1) + 1
            names.append(f"{name}{PART}{seen[name]}" if count[name] > 1 else name)
        named.append((value, Form(form.values, form.scale, form.zero, tuple(names))))
    return named


# -- storing ----------------------------------------------------------------------------------------------------------
def _store(edit: Editor, value: ir.Value, form: Form) -> None:
    """Let the graph read `form` in place of `value`."""
    name = BETWEEN.join(form.names)
    if form.scale is None or form.zero is None:
        if not value.is_initializer():
            edit.replace(value, edit.initializer(name, form.values))
        return
    axes = varying(form.scale, form.zero)
    scale, zero = (_entries(part, axes) for part in (form.scale, form.zero))
    # the zero point stands there even if it is zero: without it ONNX Runtime makes no QGemm
    inputs = [edit.initializer(name, form.values), edit.constant(scale), edit.constant(zero.astype(form.values.dtype))]
    attributes = {"axis": axes[0]} if axes else {}
    edit.take_over(value, edit.insert(edit.graph[0], "DequantizeLinear", inputs, **attributes))


def _entries(spread: np.ndarray, axes: list[int]) -> np.ndarray:
    """One entry, or one per index of the one dimension in `axes`."""
    if not axes:
        return spread.reshape(-1)[0]
    return np.moveaxis(spread, axes[0], -1).reshape(-1, spread.shape[axes[0]])[0]
