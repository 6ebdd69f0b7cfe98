"""SmoothQuant: large activation channels made smaller, and the weights that read them larger by as much.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ...model.flow import Runner
from ...model.norms import LINEAR, attribute
from .equalize import scaled_inputs

aten = torch.ops.aten
SMALLEST = 1e-5


def smoothing_scales(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """What each input channel is divided by, and its weights multiplied with: `a**strength / w**(1 - strength)`, where
    `a` and `w` are the largest magnitudes in the channel and in its weights (equation 4).

    `strength` (alpha) 0 leaves all spread in the activations, 1 moves all of it to the weights. Channels that are zero
    in either keep theirs: 1.
    """
    scales = activation.double() ** strength / weight.double() ** (1 - strength)
    usable = (activation > 0) & (weight > 0)
    return torch.where(usable, scales.clamp_min(SMALLEST), torch.ones_like(scales))


@torch.no_grad()
def smooth(
    module: fx.GraphModule,
    layers: Mapping[str, fx.Node],
    batches: Callable[[], Iterable[Sequence[Tensor]]],
    strength: float,
) -> list[str]:
    """Migrate, in place, the spread of the inputs of these linear layers into their weights; gives their names.

    The division goes into the layer norm that makes the input where nothing else reads it; elsewhere it becomes a
    multiplication in front of the layers. The outputs of the network stay as they are, up to rounding.
    """
    readers: dict[fx.Node, list[str]] = {}
    for name, node in layers.items():
        given = node.args[0]
        if node.target == LINEAR and isinstance(given, fx.Node) and len(node.args[1].users) == 1:  # type: ignore[union-attr]
            readers.setdefault(given, []).append(name)
    reach = channel_reach(module, list(readers), batches)
    for place, (given, names) in enumerate(readers.items()):
        weights = torch.stack([attribute(module, name).abs().amax(0) for name in names]).amax(0)
        scales = smoothing_scales(reach[given], weights, strength)
        for name in names:
            held = attribute(module, name)
            held.data = scaled_inputs(held, scales)
        if not _into_norm(module, given, [layers[name] for name in names], scales):
            _multiply(module, given, [layers[name] for name in names], 1 / scales, place)
    module.graph.lint()
    module.recompile()
    return sorted({name.rpartition(".")[0] for names in readers.values() for name in names})


@torch.no_grad()
def channel_reach(
    module: fx.GraphModule, nodes: Sequence[fx.Node], batches: Callable[[], Iterable[Sequence[Tensor]]]
) -> dict[fx.Node, Tensor]:
    """The largest magnitude in each channel (the last dimension) of these values over all batches."""
    found: dict[fx.Node, Tensor] = {}
    runner = Runner(module)
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    rest = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for batch in batches():
        values = runner.part(rest, dict(zip(given, batch)))
        for node in nodes:
            reach = values[node].detach().flatten(0, -2).abs().amax(0)
            found[node] = torch.maximum(found[node], reach) if node in found else reach
    return found


def _into_norm(module: fx.GraphModule, given: fx.Node, readers: list[fx.Node], scales: Tensor) -> bool:
    """Divide the weight and bias of the layer norm that makes `given`, if only `readers` read it."""
    if given.target != aten.layer_norm.default or set(given.users) != set(readers):
        return False
    parts = list(given.args[2:4])
    if not parts or any(not isinstance(part, fx.Node) or part.op != "get_attr" for part in parts):
        return False
    if any(len(part.users) != 1 for part in parts):  # type: ignore[union-attr]
        return False
    for part in parts:
        held = attribute(module, part.target)  # type: ignore[union-attr]
        held.data = (held.double() / scales).to(held.dtype)
    return True


def _multiply(module: fx.GraphModule, given: fx.Node, readers: list[fx.Node], factors: Tensor, place: int) -> None:
    name = f"smooth_{place}"
    value = given.meta.get("val")
    kind = value.dtype if isinstance(value, Tensor) else torch.float32
    module.register_buffer(name, factors.to(kind))
    with module.graph.inserting_after(given):
        held = module.graph.get_attr(name)
    with module.graph.inserting_after(held):
        made = module.graph.call_function(aten.mul.Tensor, (given, held))
    made.meta = dict(given.meta)
    for node in readers:
        node.replace_input_with(given, made)
