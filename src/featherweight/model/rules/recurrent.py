"""Rules of recurrent layers: a hidden unit takes with it its rows in every gate and its columns in what follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .call import Call, NoRule, Result, rule, sizes_of
from .labels import Dim, Indices, Shape, fixed, free


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(call: Call) -> Result:
    """All layers and directions of one module have one hidden size, so the same units go everywhere.

    A silent unit stays at zero: its gates are at their middle, its candidate is tanh(0), and it starts at zero.
    """
    given, weights = call["input"], call["params"]
    directions, each = 2 if call["bidirectional"] else 1, 4 if call["has_biases"] else 2
    if given is None or len(weights) != each * directions * call["num_layers"]:
        raise NoRule(f"{call.name} of packed sequences or with projections")
    hidden = call.labels.some(weights[1][1].size)
    for start in range(0, len(weights), each):
        source = given[-1] if start < each * directions else free(np.tile(hidden, directions))
        layer(call, Shape(given[:-1]), source, hidden, weights[start : start + each])
    _states(call, hidden)
    call.size(len(hidden), hidden, attribute="hidden_size")
    outputs = call.node.meta["val"]
    states = [
        Shape((*(fixed(size, "it counts layers or inputs") for size in sizes_of(state)[:-1]), free(hidden)))
        for state in outputs[1:]
    ]
    return [Shape((*given[:-1], free(np.tile(hidden, directions)))), *states]


def layer(call: Call, lead: Shape, source: Dim, hidden: Indices, weights: list[Shape]) -> None:
    """One direction of one layer: weights of input and state, and their biases, all gates one below the other."""
    of_input, of_state, *biases = weights
    call.unite(source, of_input[1])
    call.unite(free(hidden), of_state[1])
    for dim in (of_input[0], of_state[0], *(bias[0] for bias in biases)):
        if dim.labels is None:
            call.freeze(free(hidden), dim.reason)
        else:
            call.labels.couple(dim.labels.reshape(-1, len(hidden)), hidden)
    call.work(*lead, of_input[0], of_input[1])
    call.work(*lead, of_state[0], of_state[1])


def _states(call: Call, hidden: Indices) -> None:
    """First states that the layer makes of zeros follow its size; those from elsewhere have a size of their own."""
    nodes: Any = call.node.args[1]
    for node, shape in zip(nodes if isinstance(nodes, list | tuple) else [nodes], call_states(call), strict=True):
        if not str(node.target).startswith("aten.zeros"):
            call.unite(free(hidden), shape[-1])


def call_states(call: Call) -> list[Shape]:
    """The first states among the arguments: two for an LSTM, else one."""
    return [call["hx"]] if isinstance(call["hx"], Shape) else list(call["hx"])
