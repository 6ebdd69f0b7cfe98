"""Which module makes the inputs of layers, so that scales can move from the one to the others: found by trying."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.blocks import Block
from featherweight.core.outputs import first
from featherweight.model.moments import Stage, trace


@torch.no_grad()
def producer(block: Block, stage: Stage) -> str | None:
    """The name of the module whose outputs can be divided by scales if the stage's inputs are multiplied by them.

    A norm or a linear layer that runs before, with as many outputs as the stage has inputs. What is tried is the thing
    itself: its weight and bias times powers of two, the stage's inputs divided by them, and the block's output must
    stay. None if no module passes.
    """
    seen, wanted = trace(block)
    layers = [block.module.get_submodule(name) for name in stage.layers]
    columns = int(layers[0].weight.shape[1])  # type: ignore[index]
    first_of = min(place for place, each in enumerate(seen) if each.name in stage.layers)
    before = [each.name for each in seen[:first_of]]
    for name in dict.fromkeys(reversed(before)):
        module = block.module.get_submodule(name)
        fits = _outputs(module) == columns and all(type(layer) is nn.Linear for layer in layers)
        if fits and _passes(block, module, layers, columns, wanted):
            return name
    return None


def _outputs(module: nn.Module) -> int | None:
    """The number of outputs of a linear layer, or of a module with one weight per output; None for any other."""
    if parametrize.is_parametrized(module):
        return None
    if type(module) is nn.Linear:
        return module.out_features
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def _passes(block: Block, module: nn.Module, layers: list[nn.Module], columns: int, wanted: Tensor) -> bool:
    factors = 2.0 ** (torch.arange(columns, device=wanted.device) % 3)
    handles = [layer.register_forward_pre_hook(lambda _m, given: (given[0] / factors, *given[1:])) for layer in layers]
    try:
        scale_outputs(module, factors)
        found = first(block.observe({}, 0))
    except RuntimeError:  # the inputs have another width: it makes something else
        return False
    finally:
        scale_outputs(module, 1 / factors)
        for handle in handles:
            handle.remove()
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


@torch.no_grad()
def scale_outputs(module: nn.Module, factors: Tensor) -> None:
    """Multiply the outputs of a linear layer or norm by `factors`, in its weight and bias."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if isinstance(parameter, Tensor):
            parameter.mul_(factors.to(parameter.dtype).reshape(-1, *[1] * (parameter.dim() - 1)))


@torch.no_grad()
def rescale(source: nn.Module, readers: list[nn.Module], scales: Tensor) -> None:
    """Divide the outputs of `source` by `scales` and multiply what reads them: the function stays the same."""
    scale_outputs(source, 1 / scales)
    for reader in readers:
        weight = reader.weight
        assert isinstance(weight, Tensor)
        weight.mul_(scales.to(weight.dtype))
