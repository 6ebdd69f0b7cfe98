"""Rules of operators that take parts of a dimension, or put parts together: slice, split, cat, pad, repeat, index."""

from __future__ import annotations

import numpy as np

from .call import Call, NoRule, Result, fixed_like, rule
from .labels import Dim, Shape, fixed, free


def replaced(shape: Shape, place: int, *dims: Dim) -> Shape:
    """`shape` with the dimension at `place` replaced by `dims` (by none: taken away)."""
    return Shape((*shape[:place], *dims, *shape[place + 1 :]))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Result:
    """Labels follow each other along the dimension; the others become one."""
    shapes = [shape for shape in call["tensors"] if not (len(shape) == 1 and shape[0].size == 0)]
    place = (call["dim"] or 0) % len(shapes[0])
    dims = [call.unite(*column) for column in zip(*(replaced(shape, place) for shape in shapes), strict=True)]
    parts = [shape[place] for shape in shapes]
    if any(part.free for part in parts):
        joined = free(np.concatenate([call.labels.explicit(part) for part in parts]))
    else:
        joined = fixed(sum(part.size for part in parts), parts[0].reason)
    return Shape((*dims[:place], joined, *dims[place:]))


@rule("stack")
def stack(call: Call) -> Result:
    """A new dimension that counts the tensors; the others become one."""
    shapes = call["tensors"]
    place = (call["dim"] or 0) % (len(shapes[0]) + 1)
    dims = [call.unite(*column) for column in zip(*shapes, strict=True)]
    return Shape((*dims[:place], fixed(len(shapes), "it counts stacked tensors"), *dims[place:]))


def parts(call: Call, dim: Dim, lengths: list[int], written: bool) -> list[Dim]:
    """`dim` cut into pieces of these lengths; `written`: the lengths stand in the model's code and may have to be
    changed.

    Pieces of one length can lose the same place each (first choice); then code that halves what is there still does
    so.
    """
    if dim.labels is None:
        return [fixed(length, dim.reason) for length in lengths]
    pieces = np.split(dim.labels, np.cumsum(lengths)[:-1])
    equal = len(set(lengths)) == 1 and len(lengths) > 1
    if equal and (not written or call.choose(2, dim.labels) == 0):
        call.labels.couple(np.stack(pieces), pieces[0])
    elif not written:
        call.freeze(dim, f"the operator {call.name} cuts it into unequal parts")
        return [fixed(length, f"the operator {call.name} cuts it into unequal parts") for length in lengths]
    for length, piece in zip(lengths, pieces, strict=True):
        if written:
            call.size(length, piece)
    return [free(piece) for piece in pieces]


@rule("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "glu")
def split(call: Call) -> Result:
    """Pieces of a dimension; `glu` multiplies two halves."""
    given: Shape = call.shapes[0]
    if call.name in ("tensor_split", "hsplit"):
        raise NoRule(call.name)
    place = (call["dim"] if call["dim"] is not None else 0) % len(given)
    if call.name == "glu":
        halves = parts(call, given[place], [given[place].size // 2] * 2, written=False)
        return replaced(given, place, call.unite(*halves))
    outputs = call.node.meta["val"]
    lengths = [output.shape[place] for output in outputs]
    cut = parts(call, given[place], lengths, written=call.name != "chunk")
    return [replaced(given, place, piece) for piece in cut]


@rule("unbind")
def unbind(call: Call) -> Result:
    """One output per index, so the indices stay."""
    given: Shape = call.shapes[0]
    place = (call["dim"] or 0) % len(given)
    call.freeze(given[place])
    return [replaced(given, place) for _ in range(given[place].size)]


@rule("select", "index_select", "gather", "take_along_dim", "select_copy")
def select(call: Call) -> Result:
    """Indices are chosen by their number, so they stay."""
    given: Shape = call.shapes[0]
    if call.name in ("gather", "take_along_dim"):
        call.freeze_all(f"the operator {call.name} looks it up by number")
        return fixed_like(call.node.meta["val"], f"the operator {call.name} makes it")
    place = call["dim"] % len(given)
    call.freeze(given[place], f"the operator {call.name} looks it up by number")
    if call.name == "index_select":
        return replaced(given, place, fixed(call.sizes[place], "it was looked up by number"))
    return replaced(given, place)


@rule("slice", "narrow", "slice_copy")
def slice_(call: Call) -> Result:
    """A part of a dimension: every n-th index, or a piece."""
    given: Shape = call.shapes[0]
    place = (call["dim"] or 0) % len(given)
    dim, size = given[place], given[place].size
    start, stop, step = slice(*bounds(call)).indices(size)
    if (start, stop, step) == (0, size, 1):
        return given
    if dim.labels is None:
        return replaced(given, place, fixed(len(range(start, stop, step)), dim.reason))
    if step > 1:
        return replaced(given, place, every(call, dim, start, stop, step))
    return replaced(given, place, piece(call, dim, start, stop))


def bounds(call: Call) -> tuple[int | None, int | None, int]:
    """Start, stop and step as they stand in the model's code."""
    start = call["start"]
    if call.name == "narrow":
        return start, start + call["length"], 1
    return start, call["end"], call["step"] or 1


def every(call: Call, dim: Dim, start: int, stop: int, step: int) -> Dim:
    """Every n-th index: `step` neighbours go together, so that the n-th of what is left are the same ones."""
    labels = call.labels.explicit(dim)
    if start >= step or stop != dim.size or dim.size % step:
        call.freeze(dim, "a part of it is taken with steps")
        return fixed(len(range(start, stop, step)), "a part of it is taken with steps")
    neighbours = labels.reshape(-1, step)
    call.labels.couple(neighbours, neighbours[:, :1])
    return free(labels[start:stop:step])


def piece(call: Call, dim: Dim, start: int, stop: int) -> Dim:
    """A piece of a dimension: if it is one of equal pieces all of them lose the same places (first choice), else its
    bounds change.
    """
    labels = call.labels.explicit(dim)
    size = stop - start
    even = size > 1 and dim.size % size == 0 and start % size == 0
    if even and call.choose(2, labels) == 0:
        pieces = labels.reshape(-1, size)
        call.labels.couple(pieces, pieces[0])
    for value, part in ((start, labels[:start]), (stop, labels[:stop]), (size, labels[start:stop])):
        if 0 < value < dim.size:
            call.size(value, part)
    return free(labels[start:stop])


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Result:
    """Padding with a constant goes before and after; a dimension that is cropped or mirrored stays as a whole."""
    result, amounts = list(call.shapes[0]), call["pad"]
    constant = (call["mode"] or "constant") == "constant"
    for count in range(len(amounts) // 2):
        place, before, after = len(result) - 1 - count, amounts[2 * count], amounts[2 * count + 1]
        if (before, after) == (0, 0):
            continue
        if result[place].labels is not None and constant and min(before, after) >= 0:
            result[place] = padded(call, result[place], before, after)
        else:
            call.freeze(result[place], "it is cropped or mirrored")
            result[place] = fixed(result[place].size + before + after, "it is padded")
    return Shape(result)


def padded(call: Call, dim: Dim, before: int, after: int) -> Dim:
    """Padded positions can go if the code's own number of them follows (first choice), else they stay."""
    edges = [call.labels.some(before), call.labels.some(after)]
    if call.choose(2, np.concatenate(edges)) == 0:
        if before == after:
            call.labels.couple(*edges)
        for labels in edges:
            call.size(len(labels), labels)
    else:
        for labels in edges:
            call.freeze(free(labels), "it is padding")
    return free(np.concatenate([edges[0], call.labels.explicit(dim), edges[1]]))


@rule("repeat", "tile")
def repeat(call: Call) -> Result:
    """The whole dimension several times over; new ones come first."""
    given, times = call.shapes[0], call["repeats"] or call["dims"]
    times = [1] * (len(given) - len(times)) + list(times)
    new = len(times) - len(given)
    dims = [fixed(count, "it counts repetitions") for count in times[:new]]
    for dim, count in zip(given, times[new:], strict=True):
        dims.append(fixed(dim.size * count, dim.reason) if dim.labels is None else free(np.tile(dim.labels, count)))
    return Shape(dims)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Every index several times in a row."""
    given, times, place = call.shapes[0], call["repeats"], call["dim"]
    if not isinstance(times, int) or place is None:
        raise NoRule("repeat_interleave with counts that are data or without a dimension")
    dim = given[place]
    grown = fixed(dim.size * times, dim.reason) if dim.labels is None else free(np.repeat(dim.labels, times))
    return replaced(given, place % len(given), grown)


@rule("flip")
def flip(call: Call) -> Result:
    """Indices in reverse order."""
    given: Shape = call.shapes[0]
    turned = {place % len(given) for place in call["dims"]}
    return Shape(
        free(dim.labels[::-1].copy()) if place in turned and dim.labels is not None else dim
        for place, dim in enumerate(given)
    )


@rule("index", "index_put", "_unsafe_index")
def index(call: Call) -> Result:
    """Dimensions that tensors look up by number stay; the others keep their labels, in the order that indexing gives
    them.
    """
    given: Shape = call.shapes[0]
    asked = call["indices"]
    if call.name.startswith("index_put"):
        call.freeze_all("parts of it are set by number")
        return fixed_like(call.node.meta["val"], "parts of it are set by number")
    used = [place for place, shape in enumerate(asked) if shape is not None]
    for place in used:
        call.freeze(given[place], "it is looked up by number")
    kept = [dim for place, dim in enumerate(given) if place not in used]
    sizes = call.sizes
    new = [fixed(0, "it was looked up by number")] * (len(sizes) - len(kept))
    contiguous = used == list(range(used[0], used[-1] + 1))
    front = used[0] if contiguous else 0
    result = kept[:front] + new + kept[front:]
    return Shape(dim if dim.free else fixed(size, dim.reason) for dim, size in zip(result, sizes, strict=True))
