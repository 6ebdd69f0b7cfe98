"""Stored weights in place of float initializers, in the layout that the graph reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featherweight.core.encoding import Affine, Encoding
from featherweight.core.errors import ArtifactError, NotCarried

from .edit import Editor, array

if TYPE_CHECKING:
    from onnxscript import ir

LAYOUT = frozenset({"Transpose", "Slice", "Split", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Identity"})
BETWEEN, PART = "|", ":"  # an initializer "a|b" holds the weights a and b; "a:0" and "a:1" are parts of the weight a


@dataclass(frozen=True)
class Form:
    """One weight as arrays of its own shape: floats, or integers with scale and zero point; and the names of the weights that it holds."""

    values: np.ndarray
    scale: np.ndarray | None
    zero: np.ndarray | None
    names: tuple[str, ...]

    @property
    def parts(self) -> list[np.ndarray]:
        return [part for part in (self.values, self.scale, self.zero) if part is not None]


def weights_in(name: str) -> list[str]:
    """The torch names of the weights that the initializer `name` holds, whole or in part."""
    return [part.rpartition(PART)[0] or part for part in name.split(BETWEEN)]


def place(edit: Editor, stored: dict[str, Encoding], parameters: set[str]) -> None:
    """Swap the initializers named in `stored` for integers with DequantizeLinear, and lay out every weight as the graph reads it.

    Transpositions, slices and concatenations of weights are carried out on what is stored, wherever that stores nothing twice.
    Raises `ArtifactError` if the graph holds no initializer of that name and shape.
    """
    forms = {value: _form(name, value, stored.get(name)) for name, value in edit.graph.initializers.items() if name in parameters | set(stored)}
    for name, encoding in stored.items():
        found = edit.graph.initializers.get(name)
        if found is None or found not in forms or not found.uses():
            raise ArtifactError(f"the exported graph does not read the weight {name!r}, which is to be stored as {encoding.form}; is that layer used?")
    for value, form in [*_laid_out(edit.graph, forms), *forms.items()]:
        if value.uses() or value.is_graph_output():
            _store(edit, value, form)
    edit.sweep()


def _form(name: str, value: ir.Value, encoding: Encoding | None) -> Form:
    floats = array(value)
    assert floats is not None
    if encoding is None:
        return Form(floats, None, None, (name,))
    if not isinstance(encoding, Affine) or encoding.bits != 8:
        raise NotCarried(f"the weight {name!r} is stored as {encoding.form}, which onnxruntime does not carry")
    values = encoding.values.cpu().numpy()
    if values.shape != floats.shape:
        raise ArtifactError(f"the weight {name!r} has the shape {values.shape}, but {floats.shape} in the exported graph")
    return Form(values, *(_spread(part.cpu().numpy(), values, encoding.axis) for part in (encoding.scale, encoding.zero)), (name,))


def _spread(entries: np.ndarray, values: np.ndarray, axis: int | None) -> np.ndarray:
    """Entries per tensor or per channel, as a view of the shape of `values`."""
    shape = [1] * values.ndim
    if axis is not None and entries.size > 1:
        shape[axis] = -1
    return np.broadcast_to(entries.reshape(shape), values.shape)


def channel_axis(*arrays: np.ndarray) -> int | None:
    """The one dimension along which the arrays vary; None if they are constant; raises ValueError if they vary along several."""
    moving = [axis for axis in range(arrays[0].ndim) if any((part != part.take([0], axis)).any() for part in arrays)]
    if len(moving) > 1:
        raise ValueError(f"scales vary along dimensions {moving}")
    return moving[0] if moving else None


# -- layout -----------------------------------------------------------------------------------------------------------
def _laid_out(graph: ir.Graph, forms: dict[ir.Value, Form]) -> list[tuple[ir.Value, Form]]:
    """The rearranged weights that the graph reads, computed here; only where together they are no larger than the weights they come from."""
    known = dict(forms)
    for node in graph:
        if node.op_type in LAYOUT and _readable(node, known):
            known.update(_evaluate(node, known))
    edge = [value for value in known if value not in forms and any(not _folds(usage.node, known) for usage in value.uses())]
    direct = {value for value in forms if any(not _folds(usage.node, known) for usage in value.uses())}
    done: list[tuple[ir.Value, Form]] = []
    for names, group in _components(edge, known):
        sources = [value for value, form in forms.items() if set(form.names) & names]
        size = sum(known[value].values.size for value in group) + sum(forms[value].values.size for value in sources if value in direct)
        if size <= sum(forms[value].values.size for value in sources) and all(_has_one_axis(known[value]) for value in group):
            done += _named([(value, known[value]) for value in group])
    return done


def _readable(node: ir.Node, known: dict[ir.Value, Form]) -> bool:
    data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    if not all(value in known for value in data) or any(array(value) is None for value in node.inputs[len(data) :] if value is not None):
        return False
    return len({(known[value].scale is None, known[value].values.dtype) for value in data if value is not None}) == 1


def _folds(node: ir.Node, known: dict[ir.Value, Form]) -> bool:
    return node.op_type in LAYOUT and node.outputs[0] in known


def _evaluate(node: ir.Node, known: dict[ir.Value, Form]) -> dict[ir.Value, Form]:
    """What a layout operation makes of values, scales and zero points alike."""
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    data = list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])
    rest = {value.name: array(value) for value in node.inputs[len(data) :] if value is not None}
    run = ReferenceEvaluator(ir.serde.serialize_node(node))
    parts = [run.run(None, {**rest, **dict(zip([value.name for value in data], each))}) for each in zip(*(known[value].parts for value in data))]
    names = tuple(dict.fromkeys(name for value in data for name in known[value].names))
    made = {}
    for place, output in enumerate(node.outputs):
        values, scale, zero = [part[place] for part in parts] + [None] * (3 - len(parts))
        made[output] = Form(values, scale, zero, names)
    return made


def _has_one_axis(form: Form) -> bool:
    try:
        channel_axis(*form.parts[1:]) if form.scale is not None else None
    except ValueError:
        return False
    return True


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
    if value.is_initializer() and form.scale is None:
        return
    held = edit.hold(value, form.values) if value.is_initializer() else edit.initializer(name, form.values)
    if form.scale is None:
        edit.replace(value, held)
        return
    assert form.zero is not None
    axis = channel_axis(form.scale, form.zero)
    scale, zero = (part.reshape(-1)[0] if axis is None else np.moveaxis(part, axis, -1).reshape(-1, part.shape[axis])[0] for part in (form.scale, form.zero))
    inputs = [held, edit.constant(scale.astype(np.float32)), edit.constant(zero.astype(form.values.dtype))]  # QGemm is not made without a zero point
    made = edit.insert(edit.graph[0], "DequantizeLinear", inputs, **({} if axis is None else {"axis": axis}))
    edit.take_over(value, made)
