"""Rules of operators that rearrange dimensions: permute, view, expand, pixel and channel shuffle."""

from __future__ import annotations

from math import prod

import numpy as np

from .call import Call, NoRule, Result, rule
from .labels import Dim, Indices, Shape, fixed, free

LARGEST = 4_000_000  # flat indices of one merged dimension that are worth following


@rule("permute", "permute_copy")
def permute(call: Call) -> Result:
    given: Shape = call.shapes[0]
    return Shape(given[place] for place in call["dims"])


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "matrix_H", "adjoint", "mH")
def transpose(call: Call) -> Result:
    given = list(call.shapes[0])
    if call.name == "numpy_T":
        return Shape(reversed(given))
    if len(given) < 2:
        return Shape(given)
    one, other = {"t": (0, 1)}.get(call.name, (call["dim0"], call["dim1"]))
    if one is None:
        one, other = (-2, -1) if call["axis0"] is None else (call["axis0"], call["axis1"])
    given[one], given[other] = given[other], given[one]
    return Shape(given)


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Result:
    given: Shape = call.shapes[0]
    source, target = ([place % len(given) for place in _list(call[name])] for name in ("source", "destination"))
    order = np.moveaxis(np.empty((0,) * len(given)), source, target)
    assert order.ndim == len(given)
    places = [place for place in range(len(given)) if place not in source]
    for there, here in sorted(zip(target, source, strict=True)):
        places.insert(there, here)
    return Shape(given[place] for place in places)


def _list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Result:
    given: Shape = call.shapes[0]
    place = call["dim"] % (len(given) + 1)
    return Shape((*given[:place], fixed(1, "it has a single index"), *given[place:]))


@rule("squeeze")
def squeeze(call: Call) -> Result:
    given: Shape = call.shapes[0]
    asked = range(len(given)) if call["dim"] is None else [place % len(given) for place in _list(call["dim"])]
    for place in asked:
        if given[place].size > 1:
            call.freeze(given[place], "it must not come down to a single index")
    return Shape(dim for place, dim in enumerate(given) if place not in asked or dim.size != 1)


@rule("expand", "broadcast_to")
def expand(call: Call) -> Result:
    """Dimensions of size one become longer, new ones come first; sizes that are written out must follow."""
    given, sizes = call.shapes[0], call.sizes
    new = len(sizes) - len(given)
    result = [fixed(size, "it was expanded") for size in sizes[:new]]
    for dim, size, written in zip(given, sizes[new:], (call["size"])[new:], strict=True):
        result.append(dim if dim.size == size else fixed(size, "it was expanded"))
        if dim.labels is not None and written != -1:
            call.size(size, dim.labels)
    return Shape(result)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "ravel", "_reshape_alias", "view_copy")
def view(call: Call) -> Result:
    """Runs of dimensions are merged and cut anew; a run with channels in it is followed index by index."""
    given, sizes = call.shapes[0], call.sizes
    if call["dtype"] is not None:
        raise NoRule("a view as another type")
    written = _written(call, given, sizes)
    result = [fixed(size, "it has a single index" if size == 1 else "it is made by a reshape") for size in sizes]
    for ins, outs in runs([dim.size for dim in given], sizes):
        dims = regroup(
            call, [given[place] for place in ins], [sizes[place] for place in outs], [written[place] for place in outs]
        )
        for place, dim in zip(outs, dims, strict=True):
            result[place] = dim
            if dim.labels is not None and written[place] != -1:
                call.size(dim.size, dim.labels)
    return Shape(result)


def _written(call: Call, given: Shape, sizes: tuple[int, ...]) -> list[int]:
    """The sizes as the model's code wrote them: -1 where it leaves them open."""
    if call.name == "unflatten":
        place = call["dim"] % len(given)
        return [-1] * place + list(call["sizes"]) + [-1] * (len(given) - place - 1)
    asked = call["size"] if call["size"] is not None else call["shape"]
    return list(asked) if isinstance(asked, list | tuple) and len(asked) == len(sizes) else [-1] * len(sizes)


def runs(before: list[int], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of one reshape that hold the same number of elements; sizes of one are left
    out.
    """
    left = [place for place, size in enumerate(before) if size != 1]
    right = [place for place, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while (one := prod(before[place] for place in ins)) != (other := prod(after[place] for place in outs)):
            (ins if one < other else outs).append((left if one < other else right).pop(0))
        found.append((ins, outs))
    return found


def regroup(call: Call, ins: list[Dim], outs: list[int], written: list[int]) -> list[Dim]:
    """The dimensions of sizes `outs` that one run of dimensions `ins` is cut into."""
    channels = [place for place, dim in enumerate(ins) if dim.free]
    if not channels:
        return [fixed(size, ins[0].reason) for size in outs]
    if len(ins) == len(outs) == 1:
        return list(ins)
    total = prod(outs)
    if len(channels) > 1 or total > LARGEST:
        for dim in ins:
            call.freeze(dim, "it is merged with others by a reshape")
        return [fixed(size, "it is merged with others by a reshape") for size in outs]
    place = channels[0]
    labels = ins[place].labels
    assert labels is not None
    flat = np.tile(np.repeat(labels, prod(dim.size for dim in ins[place + 1 :])), prod(dim.size for dim in ins[:place]))
    return [free(flat)] if len(outs) == 1 else cut(call, flat, outs, written)


def cut(call: Call, flat: Indices, outs: list[int], written: list[int]) -> list[Dim]:
    """Cut merged labels into several dimensions: one of them carries the labels, the others stay as they are.

    Where the labels depend on the indices of one new dimension alone, that is the one. Else there is a choice: first
    the dimension whose size the code leaves open (-1), then each in turn from the outermost; what goes together there
    is coupled.
    """
    thirds = [flat.reshape(prod(outs[:place]), size, -1) for place, size in enumerate(outs)]
    exact = [place for place, third in enumerate(thirds) if (third == third[:1, :, :1]).all()]
    order = sorted(range(len(outs)), key=lambda place: (written[place] != -1, place))
    carrier = exact[0] if exact else order[call.choose(len(outs), flat)]
    third = thirds[carrier]
    labels = third[0, :, 0]
    if not exact:
        call.labels.couple(third, third[:1, :, :1])
    return [
        free(labels) if place == carrier else fixed(size, "it is the inside of a block that a reshape makes")
        for place, size in enumerate(outs)
    ]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(call: Call) -> Result:
    """`factor ** 2` neighbouring channels become space, or come from it; groups of channels are woven into each
    other.
    """
    given: Shape = call.shapes[0]
    place = 1 if call.name == "channel_shuffle" else len(given) - 3
    sizes = call.sizes
    labels = given[place].labels
    if labels is None:
        channel = fixed(sizes[place], given[place].reason)
    elif call.name == "channel_shuffle":
        woven = labels.reshape(call["groups"], -1)
        call.labels.couple(woven, woven[:1])
        channel = free(woven.T.reshape(-1))
    elif call.name == "pixel_shuffle":
        neighbours = labels.reshape(sizes[place], -1)
        call.labels.couple(neighbours, neighbours[:, :1])
        channel = free(neighbours[:, 0])
    else:
        channel = free(np.repeat(labels, sizes[place] // len(labels)))
    space = (fixed(size, "it is space") for size in sizes[place + 1 :])
    return Shape((*given[:place], channel, *(given[place + 1 :] if call.name == "channel_shuffle" else space)))
