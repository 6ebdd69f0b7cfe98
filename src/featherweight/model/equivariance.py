"""Which bases the operators of a graph leave free: one rule per ATen operator.

A rule unites the bases of dimensions that must turn together (both sides of a contraction, the terms of a sum) and
fixes those of which the operator looks at single entries. An operator without a rule fixes all that it reads.
"""

from __future__ import annotations

import math

from torch import fx

from .bases import Axes, Axis, Value
from .followed import LISTS, Op, rule, values_in
from .rules.call import sizes_of
from .rules.reshape import runs

SINGLE = "it has a single entry"


# -- entry by entry ----------------------------------------------------------------------------------------------------
@rule("alias clone contiguous detach to _to_copy dropout type_as neg positive lift_fresh_copy")
def same(op: Op) -> Axes:
    return op.first.axes


@rule("add sub rsub")
def add(op: Op) -> Axes:
    """All terms turn together; where one is the same for all entries, equal entries must stay equal."""
    found = []
    for full, repeated in _aligned(op):
        axis = op.bases.unite(*full) if full else SINGLE
        if repeated and isinstance(axis, Axis):
            op.bases.keep_ones(axis)
        found.append(axis)
    return tuple(found)


def _aligned(op: Op) -> list[tuple[list[Axis | str], bool]]:
    """For each dimension of the output what the inputs that extend along it follow, and whether one does not."""
    values, sizes = list(values_in(op.given)), op.sizes
    scalar = any(isinstance(op[name], int | float) and op[name] != 0 for name in ("self", "other"))
    found = []
    for back in range(len(sizes), 0, -1):
        here = [value for value in values if len(value.sizes) >= back]
        full = [value.axes[-back] for value in here if value.sizes[-back] == sizes[-back]]
        found.append((full, scalar or len(full) < len(values)))
    return found


@rule("mul")
def multiply(op: Op) -> Axes:
    """A factor that is the same for all entries passes; a norm's gain passes on the condition that it can move."""
    one, other = op["self"], op["other"]
    if op.node.args[0] is op.node.args[1]:
        return _squared(op)
    if isinstance(one, Value) and isinstance(other, Value):
        for given, gain, place in ((one, other, 1), (other, one, 0)):
            node = op.node.args[place]
            if isinstance(node, fx.Node) and _is_gain(op, given, gain, node):
                op.trace.pending.append((given.axes[-1], op.node, node, None))  # type: ignore[arg-type]
                return given.axes
    return _scaled(op)


def _is_gain(op: Op, given: Value, gain: Value, node: fx.Node) -> bool:
    vector = node in op.trace.owners and math.prod(gain.sizes) == gain.sizes[-1] == given.sizes[-1]
    last = given.axes[-1]
    return vector and len(given.sizes) == len(op.sizes) and isinstance(last, Axis) and not last.squared


def _scaled(op: Op) -> Axes:
    return tuple(
        (full[0] if len(full) == 1 or size == 1 else op.bases.fix(f"{op.name} multiplies entry by entry", *full))
        if full
        else SINGLE
        for (full, _), size in zip(_aligned(op), op.sizes)
    )


@rule("div")
def divide(op: Op) -> Axes:
    if op["rounding_mode"] is not None or not isinstance(op["self"], Value):
        return op.fix_all()
    if isinstance(op["other"], Value):
        op.fix(*op["other"].axes)
    return _scaled(op)


@rule("square")
def square(op: Op) -> Axes:
    return _squared(op)


@rule("pow")
def power(op: Op) -> Axes:
    return _squared(op) if op["exponent"] == 2 else op.fix_all()


def _squared(op: Op) -> Axes:
    if any(isinstance(axis, Axis) and axis.squared for axis in op.first.axes):
        return op.fix_all()
    return tuple(Axis(axis.basis, True) if isinstance(axis, Axis) else axis for axis in op.first.axes)


# -- sums over dimensions ----------------------------------------------------------------------------------------------
@rule("mean sum")
def reduce(op: Op) -> Axes:
    """The sum of squares stays under any rotation, that of the entries under those that leave equal entries equal."""
    for place in _dims(op):
        axis = op.first.axes[place]
        if isinstance(axis, Axis) and not axis.squared:
            op.bases.keep_ones(axis)
    return _without(op, _dims(op))


@rule("linalg_vector_norm norm")
def norm(op: Op) -> Axes:
    order = op["ord"] if op.name == "linalg_vector_norm" else op["p"]
    return _without(op, _dims(op)) if order in (2, None) else op.fix_all()


def _dims(op: Op) -> set[int]:
    count, dims = len(op.first.sizes), op["dim"]
    dims = range(count) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return {dim % count for dim in dims}


def _without(op: Op, dims: set[int]) -> Axes:
    rest = [axis for place, axis in enumerate(op.first.axes) if place not in dims]
    if not op["keepdim"]:
        return tuple(rest)
    return tuple(SINGLE if place in dims else axis for place, axis in enumerate(op.first.axes))


@rule("layer_norm rms_norm")
def normalize(op: Op) -> Axes:
    """Normalizing to a length turns with its input; so does taking the mean off where equal entries stay equal."""
    given = op["input"]
    axis = given.axes[-1]
    if len(op["normalized_shape"]) != 1 or isinstance(axis, str):
        return op.fix_all()
    if axis.squared:
        return op.fix_all()
    if op.name == "layer_norm":
        op.bases.keep_ones(axis)
    weight, bias = (_argument(op, name) for name in ("weight", "bias"))
    if bias is not None:
        op.bases.unite(axis, op["bias"].axes[0])
    if weight is not None:
        op.trace.pending.append((axis, op.node, weight, bias))
    return given.axes


def _argument(op: Op, name: str) -> fx.Node | None:
    names = [item.name for item in op.node.target._schema.arguments]  # type: ignore[union-attr]
    if name not in names:
        return None
    place = names.index(name)
    found = op.node.args[place] if place < len(op.node.args) else op.node.kwargs.get(name)
    return found if isinstance(found, fx.Node) else None


# -- contractions ------------------------------------------------------------------------------------------------------
@rule("linear")
def linear(op: Op) -> Axes:
    given, weight = op["input"], op["weight"]
    op.bases.unite(given.axes[-1], weight.axes[1])
    out = op.bases.unite(weight.axes[0], op["bias"].axes[0]) if op["bias"] is not None else weight.axes[0]
    return (*given.axes[:-1], out)


@rule("addmm")
def addmm(op: Op) -> Axes:
    one, other, added = op["mat1"], op["mat2"], op["self"]
    op.bases.unite(one.axes[1], other.axes[0])
    if added.sizes != (other.sizes[1],):
        return op.fix_all()
    return one.axes[0], op.bases.unite(other.axes[1], added.axes[0])


@rule("matmul bmm mm")
def matmul(op: Op) -> Axes:
    one, other = op["self"], op["other"] if op["other"] is not None else op["mat2"]
    if len(one.sizes) < 2 or len(other.sizes) < 2:
        return op.fix_all()
    op.bases.unite(one.axes[-1], other.axes[-2])
    batch = _batch(op, one.axes[:-2]) if len(other.sizes) == 2 else _batch(op, (*one.axes[:-2], *other.axes[:-2]), True)
    return (*batch, one.axes[-2], other.axes[-1])


def _batch(op: Op, axes: Axes, fix: bool = False) -> Axes:
    """What the batch dimensions of a product follow: their own where only one side has them."""
    return (op.fix(*axes),) * (len(op.sizes) - 2) if fix else axes


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Axes:
    """Queries and keys meet in products, so they turn together; values are mixed over positions, and turn alone."""
    query, key, value = op["query"], op["key"], op["value"]
    op.bases.unite(query.axes[-1], key.axes[-1])
    rest: list[Axis | str] = [axis for each in (query, key, value) for axis in each.axes[:-1]]
    rest += op["attn_mask"].axes if op["attn_mask"] is not None else ()
    return (*(op.fix(*rest),) * (len(op.sizes) - 1), value.axes[-1])


@rule("embedding")
def embedding(op: Op) -> Axes:
    table = op["weight"]
    op.fix(table.axes[0])
    return (*op["indices"].axes, table.axes[1])


@rule("conv1d conv2d conv3d")
def convolve(op: Op) -> Axes:
    """The channels turn as in a linear layer, if each output sees all of them."""
    given, weight = op["input"], op["weight"]
    if op["groups"] != 1 or len(given.sizes) != len(weight.sizes):
        return op.fix_all()
    op.bases.unite(given.axes[1], weight.axes[1])
    reason = op.fix(*given.axes[2:], *weight.axes[2:])
    out = op.bases.unite(weight.axes[0], op["bias"].axes[0]) if op["bias"] is not None else weight.axes[0]
    return (given.axes[0], out, *(reason,) * (len(given.sizes) - 2))


# -- rearranged dimensions ---------------------------------------------------------------------------------------------
@rule("permute")
def permute(op: Op) -> Axes:
    return tuple(op.first.axes[place] for place in op["dims"])


@rule("transpose t mT")
def transpose(op: Op) -> Axes:
    axes = list(op.first.axes)
    if len(axes) < 2:
        return tuple(axes)
    one, other = (op["dim0"], op["dim1"]) if op.name == "transpose" else (-2, -1)
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


@rule("view reshape _unsafe_view flatten unflatten squeeze unsqueeze")
def view(op: Op) -> Axes:
    """The innermost dimension of each run that is merged or cut carries the basis on, in blocks that divide it."""
    given, sizes = op.first, op.sizes
    found: list[Axis | str] = [SINGLE] * len(sizes)
    for ins, outs in runs(list(given.sizes), sizes):
        outer = op.bases.fix("a reshape merges it with others", *(given.axes[place] for place in ins[:-1]))
        for place in outs[:-1]:
            found[place] = outer
        axis = given.axes[ins[-1]]
        if isinstance(axis, Axis) and axis.squared and (len(ins) > 1 or len(outs) > 1):
            axis = op.fix(axis)
        found[outs[-1]] = op.bases.cut(axis, sizes[outs[-1]])
    return tuple(found)


@rule("expand")
def expand(op: Op) -> Axes:
    new = len(op.sizes) - len(op.first.sizes)
    old = ("it was expanded",) * new + op.first.axes
    sizes = (1,) * new + op.first.sizes
    return tuple(axis if had == has else "it was expanded" for axis, had, has in zip(old, sizes, op.sizes))


@rule("slice")
def part(op: Op) -> Axes:
    axes, dim = list(op.first.axes), (op["dim"] or 0) % len(op.sizes)
    if op["step"] != 1:
        return op.fix_all()
    start = min(max(op["start"] or 0, -op.first.sizes[dim]), op.first.sizes[dim])
    axes[dim] = op.bases.cut(axes[dim], start % op.first.sizes[dim], op.sizes[dim])
    return tuple(axes)


@rule("select")
def select(op: Op) -> Axes:
    dim = op["dim"] % len(op.first.sizes)
    op.fix(op.first.axes[dim])
    return tuple(axis for place, axis in enumerate(op.first.axes) if place != dim)


@rule("cat")
def cat(op: Op) -> Axes:
    values, found = list(values_in(op["tensors"])), []
    for place, _ in enumerate(op.sizes):
        axis = op.bases.unite(*(value.axes[place] for value in values))
        if place == (op["dim"] or 0) % len(op.sizes):
            axis = op.bases.cut(axis, *(value.sizes[place] for value in values))
        found.append(axis)
    return tuple(found)


def split(op: Op) -> list[Value]:
    """Parts of one dimension turn alike, in blocks that divide each of them."""
    given, outputs = op.first, op.node.meta["val"]
    dim = (op["dim"] or 0) % len(given.sizes)
    sizes = [sizes_of(output) for output in outputs]
    op.bases.cut(given.axes[dim], *(size[dim] for size in sizes))
    return [Value(size, given.axes) for size in sizes]


LISTS.update(dict.fromkeys(("split", "chunk", "split_with_sizes"), split))
