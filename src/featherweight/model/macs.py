"""Multiply-accumulates of a captured graph, counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode


def multiply_accumulates(module: fx.GraphModule, example: dict[str, np.ndarray], batched: Container[str]) -> int:
    """Multiply-accumulates of one run of the first input: products as torch's own counter counts them, and recurrent
    layers. What is computed from weights alone does not count: it could be computed once. The first dimension of the
    inputs in `batched` is the batch.
    """
    asked = _after_inputs(module.graph)
    total = 0

    class Counting(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            nonlocal total
            if node not in asked:
                return super().run_node(node)
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                result = super().run_node(node)
            total += counter.get_total_flops()
            return result

    given = {name: torch.from_numpy(array[:1] if name in batched else array) for name, array in example.items()}
    inputs = {node: given[str(node.target)] for node in module.graph.nodes if node.op == "placeholder"}
    with torch.no_grad():
        Counting(module).run(initial_env=inputs, enable_io_processing=False)
    return total // 2


def _after_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that need an input of the graph."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _recurrent_flops(
    input_shape: Any, weight_shape: Any, hidden_shape: Any, *rest: Any, out_shape: Any = None, **named: Any
) -> int:
    """Twice the multiply-accumulates of one recurrent layer and direction: steps x batch x entries of its weights."""
    return 2 * input_shape[0] * input_shape[1] * (math.prod(weight_shape) + math.prod(hidden_shape))


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *rest: Any, **named: Any) -> int:
    """Twice the multiply-accumulates of attention: queries times keys, and weights times values."""
    return 2 * math.prod(query_shape[:-1]) * key_shape[-2] * (query_shape[-1] + value_shape[-1])


# what torch's own counter does not know
FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
