"""Rules of operators that normalise or add up: what they run over must stay, what they run along may go."""

from __future__ import annotations

from collections.abc import Iterable

from .call import Call, Result, fixed_like, rule
from .labels import Shape, fixed
from .pointwise import broadcast


def run_over(call: Call, given: Shape, places: Iterable[int]) -> Shape:
    """`given` with the dimensions at `places` fixed, since what the operator gives depends on all of their indices."""
    chosen = {place % max(1, len(given)) for place in places}
    return Shape(call.freeze(dim) if place in chosen else dim for place, dim in enumerate(given))


def places_of(call: Call, given: Shape) -> list[int]:
    """The dimensions that a reduction is asked for; all of them by default."""
    dim = call["dim"]
    if dim is None or dim == []:
        return list(range(len(given)))
    return [dim] if isinstance(dim, int) else list(dim)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm", "cudnn_batch_norm")
def per_channel(call: Call) -> Result:
    """Scale, shift and statistics belong to their channel (dimension 1)."""
    given: Shape = call.shapes[0]
    names = ("weight", "bias", "running_mean", "running_var")
    channel = call.unite(given[1], *(call[name][0] for name in names if call[name]))
    space = (call.freeze(dim) for dim in given[2:]) if call.name == "instance_norm" else given[2:]
    return Shape((given[0], channel, *space))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Result:
    """All that is normalised over stays."""
    given: Shape = call.shapes[0]
    for name in ("weight", "bias"):
        for dim in call[name] or ():
            call.freeze(dim)
    return run_over(call, given, range(len(given) - len(call["normalized_shape"]), len(given)))


@rule("group_norm")
def group_norm(call: Call) -> Result:
    """Channels of one group are normalised together, so they stay."""
    for name in ("weight", "bias"):
        for dim in call[name] or ():
            call.freeze(dim)
    return run_over(call, call.shapes[0], range(1, len(call.shapes[0])))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "renorm")
def along(call: Call) -> Result:
    """The output has the input's dimensions; the one that it runs over stays."""
    given: Shape = call.shapes[0]
    result = run_over(call, given, places_of(call, given))
    return [result, result] if isinstance(call.node.meta["val"], list | tuple) else result


@rule(
    """
    mean sum amax amin max min prod std var logsumexp norm linalg_vector_norm any all argmax argmin median nansum
    count_nonzero std_mean var_mean aminmax
    """
)
def reduce(call: Call) -> Result:
    """The dimensions that are run over stay and vanish from the output, or have size one there."""
    shapes = call.shapes
    if len(shapes) == 2:  # max and min of two tensors
        return broadcast(call, shapes, call.sizes)
    given = shapes[0]
    gone = {place % max(1, len(given)) for place in places_of(call, given)}
    after = run_over(call, given, gone)
    outputs = call.node.meta["val"]
    first = outputs[0] if isinstance(outputs, list | tuple) else outputs
    keep = first.dim() == len(given)
    result = Shape(
        fixed(1, "it was run over") if place in gone else dim
        for place, dim in enumerate(after)
        if keep or place not in gone
    )
    return [result for _ in outputs] if isinstance(outputs, list | tuple) else result


@rule("roll")
def roll(call: Call) -> Result:
    """A dimension that is rolled keeps its places."""
    given: Shape = call.shapes[0]
    return run_over(call, given, call["dims"] or range(len(given)))


@rule("topk", "kthvalue", "mode")
def chosen(call: Call) -> Result:
    """What is chosen depends on all indices of the dimension; the output may have fewer of them, or none."""
    given: Shape = call.shapes[0]
    place = call["dim"] % len(given)
    after = run_over(call, given, [place])
    outputs = fixed_like(call.node.meta["val"], f"the operator {call.name} makes it")
    kept = (*after[:place], *outputs[0][place : place + 1], *after[place + 1 :])
    return [Shape(kept if len(output) == len(given) else (*after[:place], *after[place + 1 :])) for output in outputs]


@rule("unfold")
def unfold(call: Call) -> Result:
    """Windows along a dimension: it stays, and the windows' own dimension comes last."""
    given: Shape = call.shapes[0]
    place, sizes = call["dimension"] % len(given), call.sizes
    after = list(run_over(call, given, [place]))
    after[place] = fixed(sizes[place], "it counts windows")
    return Shape((*after, fixed(sizes[-1], "it is a window")))
