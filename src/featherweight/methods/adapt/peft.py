"""The layers of peft, put around those of a model while they are trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from featherweight.core.registry import need
from featherweight.model.replacing import exchanged, holders

ADAPTER = "default"  # the name that peft gives to a first adapter


def library() -> Any:
    """The package peft; raises `MissingExtra` where it is not installed."""
    return need("peft", "adapters")


def pattern(names: Iterable[str]) -> str:
    """The regular expression by which peft finds exactly these modules."""
    return "|".join(re.escape(name) for name in names)


def put_around(model: nn.Module, config: Any, names: Iterable[str]) -> nn.Module:
    """`model`, in place, with peft's layers around these, as `config` says; what was trained before still is."""
    before = [(each, each.requires_grad) for each in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights, which only matter where adapters are merged
        model = library().inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for each, was in before:  # peft freezes the base for good
        each.requires_grad_(was)
    for name in names:  # peft finds a layer under the first of its names only
        layer: Any = model.get_submodule(name)
        for holder, attribute in holders(model, layer.base_layer):
            if holder is not layer:
                setattr(holder, attribute, layer)
    return model


def taken_off(model: nn.Module, names: Iterable[str], turned: Callable[[Any], nn.Module]) -> dict[str, nn.Module]:
    """Put what `turned` makes of each layer of peft in its place; gives these by name."""
    made = {}
    for name in names:
        made[name] = turned(model.get_submodule(name))
        exchanged(model, name, made[name])
    return made
