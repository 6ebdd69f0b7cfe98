"""Rules of operators that leave every index where it is: pointwise ones, copies, dropout, resizing of space,
creation.
"""

from __future__ import annotations

from .call import Call, Result, fixed_like, rule
from .labels import Dim, Shape, fixed


def broadcast(call: Call, shapes: list[Shape], sizes: tuple[int, ...]) -> Shape:
    """The dimensions of tensors that are broadcast against each other: those that meet become one."""
    result = []
    for place, size in enumerate(sizes):
        back = len(sizes) - place
        meeting = [shape[-back] for shape in shapes if len(shape) >= back]
        whole = [dim for dim in meeting if dim.size == size]
        for dim in meeting:
            if dim.size != size:
                call.freeze(dim, f"the operator {call.name} spreads it")
        result.append(call.unite(*whole) if whole else fixed(size, f"the operator {call.name} makes it"))
    return Shape(result)


@rule(
    """
    pointwise hardswish hardsigmoid hardtanh relu6 __and__ __or__ __xor__ copy fill zero where masked_fill square
    expand_as type_as logical_and logical_not selu celu rrelu
    """
)
def pointwise(call: Call) -> Result:
    """Broadcast all tensors; indices that meet belong together."""
    return broadcast(call, call.shapes, call.sizes)


@rule(
    """
    dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout contiguous clone detach alias to
    _to_copy lift_fresh_copy lift_fresh lift zeros_like ones_like empty_like full_like rand_like randn_like view_as
    float half double cpu cuda positive
    """
)
def same(call: Call) -> Result:
    """The output has the dimensions of the first tensor; `view_as` is only this where both have one shape."""
    first = call.shapes[0]
    if tuple(dim.size for dim in first) != call.sizes:
        call.freeze_all(f"the operator {call.name} reshapes it")
        return fixed_like(call.node.meta["val"], f"the operator {call.name} reshapes it")
    return first


@rule("prelu")
def prelu(call: Call) -> Result:
    """A slope per channel (dimension 1) belongs to that channel."""
    given, slope = call["self"], call["weight"]
    if slope[0].size == 1 or len(given) < 2:
        return given
    channel = call.unite(given[1], slope[0])
    return Shape((given[0], channel, *given[2:]))


@rule(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
    upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa adaptive_max_pool2d adaptive_max_pool1d
    max_pool2d_with_indices
    """
)
def spatial(call: Call) -> Result:
    """Pooling and resizing run over space alone: the dimensions before it stay."""
    given: Shape = call.shapes[0]
    rank = int(next(letter for letter in call.name if letter.isdigit()))
    for dim in given[len(given) - rank :]:
        call.freeze(dim)
    outputs = fixed_like(call.node.meta["val"], "it is space")
    kept: tuple[Dim, ...] = given[: len(given) - rank]
    if isinstance(outputs, list):
        return [Shape((*kept, *output[-rank:])) for output in outputs]
    return Shape((*kept, *outputs[-rank:]))
