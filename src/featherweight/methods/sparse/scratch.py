"""Start a network anew: every layer with fresh weights, as its own type draws them."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.soft import Mask
from featherweight.model.masks import links_of


def start_anew(model: nn.Module) -> list[str]:
    """Give every layer of `model` new weights by its `reset_parameters`, masks taken off; statistics start anew too.

    Returns the full names of parameters that no layer knows how to draw: they stay as they are.
    """
    kept: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{name}.":
            continue
        if links_of(module) and all(isinstance(link, Mask) for link in links_of(module)):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        own = [attribute for attribute, _ in module.named_parameters(recurse=False)]
        if callable(reset) and not parametrize.is_parametrized(module):
            reset()
        else:
            kept += [f"{name}.{attribute}".lstrip(".") for attribute in own]
    return kept
