"""Rules of operators that multiply and add up: linear, convolutions, matrix products, attention, embedding."""

from __future__ import annotations

import numpy as np

from .call import Call, NoRule, Result, rule
from .labels import Dim, Shape, fixed, free
from .pointwise import broadcast


def product(call: Call, letters: list[str], output: str, shapes: list[Shape]) -> Shape:
    """Dimensions with one letter become one, whether they are kept or summed over (as in `einsum`)."""
    found: dict[str, Dim] = {}
    for word, shape in zip(letters, shapes, strict=True):
        for letter, dim in zip(word, shape, strict=True):
            known = found.get(letter)
            if known is not None and known.size != dim.size:
                call.freeze(dim if dim.size == 1 else known, f"the operator {call.name} spreads it")
                found[letter] = known if dim.size == 1 else dim
            else:
                found[letter] = dim if known is None else call.unite(known, dim)
    if len(shapes) > 1:
        call.work(*found.values())
    return Shape(found[letter] for letter in output)


@rule("linear")
def linear(call: Call) -> Result:
    """Inputs meet the columns of the weight; outputs are its rows."""
    given, weight, bias = call["input"], call["weight"], call["bias"]
    call.unite(given[-1], weight[1])
    outputs = call.unite(weight[0], bias[0]) if bias else weight[0]
    call.work(*given[:-1], *weight)
    return Shape((*given[:-1], outputs))


@rule("embedding")
def embedding(call: Call) -> Result:
    """Rows are looked up by the values of the indices, so they stay; the columns are the output's last dimension."""
    weight, indices = call["weight"], call["indices"]
    call.freeze(weight[0], "its rows are looked up by the model's inputs")
    return Shape((*(fixed(dim.size, "it is a place in the input") for dim in indices), weight[1]))


def multiply(call: Call, one: Shape, other: Shape) -> Shape:
    """Matrix product with broadcast leading dimensions, as in `torch.matmul`."""
    if len(one) == 1 or len(other) == 1:
        left, right = "k" if len(one) == 1 else "nk", "k" if len(other) == 1 else "km"
        lead = "abcdefg"[: max(len(one), len(other)) - 2]
        words = [lead + left if len(one) > 2 else left, lead + right if len(other) > 2 else right]
        return product(call, words, lead + left.replace("k", "") + right.replace("k", ""), [one, other])
    sizes = tuple(np.broadcast_shapes(*(tuple(dim.size for dim in shape[:-2]) for shape in (one, other))))
    lead_dims = broadcast(call, [Shape(one[:-2]), Shape(other[:-2])], sizes)
    contracted = call.unite(one[-1], other[-2])
    call.work(*lead_dims, one[-2], contracted, other[-1])
    return Shape((*lead_dims, one[-2], other[-1]))


@rule("matmul", "mm", "bmm", "mv", "dot", "inner")
def matmul(call: Call) -> Result:
    """The last dimension of the one meets the last but one of the other."""
    one, other = call.shapes
    return multiply(call, one, other)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(call: Call) -> Result:
    """A matrix product to which something is added."""
    if call.name.rstrip("_") == "addbmm":
        raise NoRule("addbmm adds matrices up")
    added, one, other = call.shapes
    result = multiply(call, one, other)
    return broadcast(call, [added, result], call.sizes)


@rule("einsum")
def einsum(call: Call) -> Result:
    """Dimensions with one letter become one."""
    equation = call["equation"].replace(" ", "")
    if "." in equation:
        raise NoRule("einsum with an ellipsis")
    given, arrow, output = equation.partition("->")
    if not arrow:
        output = "".join(sorted(letter for letter in set(given) - {","} if given.count(letter) == 1))
    words = given.split(",")
    shapes = []
    for word, shape in zip(words, call["tensors"], strict=True):
        # Summed over without a partner: a sum of what is left is not the sum of what was there.
        alone = [given.count(letter) == 1 and letter not in output for letter in word]
        shapes.append(Shape(call.freeze(dim) if lonely else dim for dim, lonely in zip(shape, alone, strict=True)))
    return product(call, words, output, shapes)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """Heads (leading dimensions) belong together in query, key and value; with grouped queries each key head to its
    queries.
    """
    query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    lead = [query[:-2], key[:-2], value[:-2]]
    if call["enable_gqa"] and query[-3].size != key[-3].size:
        lead = [query[:-2], *(_repeated(call, shape[:-2], query[-3].size) for shape in (key, value))]
    if mask:
        lead.append(mask[:-2])
    sizes = call.sizes
    dims = broadcast(call, [Shape(part) for part in lead], sizes[:-2])
    inner = call.unite(query[-1], key[-1])
    if call["scale"] is None:
        call.freeze(inner, "attention is scaled by its size")
    call.unite(key[-2], value[-2])
    call.freeze(key[-2])
    call.work(*dims, query[-2], key[-2], inner)
    call.work(*dims, query[-2], key[-2], value[-1])
    return Shape((*dims, query[-2], value[-1]))


def _repeated(call: Call, lead: tuple[Dim, ...], heads: int) -> tuple[Dim, ...]:
    last = lead[-1]
    if last.labels is None:
        return (*lead[:-1], fixed(heads, last.reason))
    return (*lead[:-1], free(np.repeat(last.labels, heads // last.size)))


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Result:
    """Input channels meet the weight's second dimension, output channels are its first; groups move as wholes."""
    weight, bias, groups = call["weight"], call["bias"], call["groups"]
    given: Shape = call.shapes[0]
    rank = len(weight) - 2
    channel, space = given[-rank - 1], given[-rank:]
    for dim in (*space, *weight[2:]):
        call.freeze(dim, "it is space")
    outputs = call.unite(weight[0], bias[0]) if bias else weight[0]
    if groups == 1:
        call.unite(channel, weight[1])
    else:
        outputs = grouped(call, channel, outputs, weight[1], groups)
    sizes = call.sizes
    result = Shape((*given[: -rank - 1], outputs, *(fixed(size, "it is space") for size in sizes[-rank:])))
    call.work(*given[: -rank - 1], *result[-rank:], weight[0], weight[1], *(fixed(dim.size, "") for dim in weight[2:]))
    return result


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(call: Call) -> Result:
    """Input channels meet the weight's first dimension; output channels are its second, once per group."""
    weight, bias, groups = call["weight"], call["bias"], call["groups"]
    given: Shape = call.shapes[0]
    rank = len(weight) - 2
    inputs, outputs = call.unite(given[-rank - 1], weight[0]), weight[1]
    for dim in (*given[-rank:], *weight[2:]):
        call.freeze(dim, "it is space")
    if groups > 1:
        call.freeze(weight[1], "it is shared by all groups of a transposed convolution")
        outputs = blocks(call, inputs, groups, weight[1].size)
    if bias:
        outputs = call.unite(outputs, bias[0])
    space = [fixed(dim.size, "") for dim in (*given[-rank:], *weight[2:])]
    call.work(*given[: -rank - 1], *space, weight[0], weight[1])
    return Shape((*given[: -rank - 1], outputs, *(fixed(size, "it is space") for size in call.sizes[-rank:])))


def owner(call: Call, argument: str) -> str:
    """The full name of the module whose parameter is `argument`, if the graph hands it over directly; else that of
    the caller.
    """
    for given, schema in zip(call.node.args, call.node.target._schema.arguments):  # type: ignore[union-attr]
        if schema.name == argument and getattr(given, "op", "") == "placeholder":
            return str(given.meta.get("owner", call.module))  # type: ignore[union-attr]
    return call.module


def blocks(call: Call, inputs: Dim, groups: int, size: int) -> Dim:
    """Whole groups move: the `size` outputs of each group belong to all inputs of that group."""
    if inputs.labels is None:
        return fixed(groups * size, inputs.reason)
    heads = inputs.labels.reshape(groups, -1)
    call.labels.couple(heads, heads[:, :1])
    call.size(groups, heads[:, 0], module=owner(call, "weight"), attribute="groups")
    return free(np.repeat(heads[:, 0], size))


def grouped(call: Call, channel: Dim, outputs: Dim, inner: Dim, groups: int) -> Dim:
    """Either whole groups move (the only way for depthwise), or the same place in every group; first what is finer."""
    concerned = [dim.labels for dim in (channel, outputs) if dim.labels is not None]
    if not concerned:
        return outputs
    whole_first = groups >= inner.size
    if inner.size == 1 or (call.choose(2, np.concatenate(concerned)) == 0) == whole_first:
        call.freeze(inner, "it is shared by all groups")
        return call.unite(blocks(call, channel, groups, outputs.size // groups), outputs)
    if channel.labels is None:
        call.freeze(inner, channel.reason)
    elif inner.labels is None:
        call.freeze(channel, inner.reason)
    else:
        call.labels.couple(channel.labels.reshape(groups, -1), inner.labels)
    if outputs.labels is not None:
        places = outputs.labels.reshape(groups, -1)
        call.labels.couple(places, places[:1])
    return outputs
