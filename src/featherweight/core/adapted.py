"""Modules that hold an adapter beside a base which they leave as it is, and the digest of that base."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from .adapter import AdapterFile
from .files import tensor_digest

BASE = "base"


class Adapted(nn.Module):
    """A module that computes what `base` does and what its adapter adds: every other tensor in it is the adapter's.

    `free` says which dimension of an adapter's tensor (by its name in this module) an adapter chooses for itself, such
    as the rank. In an artifact of a target that can switch adapters these tensors are inputs. A tensor called "gain" of
    ones, and any other of zeros or of size 0, stands for no adapter. A subclass keeps the arguments of its constructor
    as attributes of the same names; `base` is put in afterwards. Those that are integers or booleans show in the shapes
    of its tensors or in which there are; an artifact computes with all others as it was exported.
    """

    kinds: ClassVar[dict[str, type[Adapted]]] = {}
    free: ClassVar[dict[str, int]] = {}
    base: nn.Module

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        Adapted.kinds[cls.__name__] = cls

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor that builds this adapter again."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    @property
    def weight(self) -> Tensor:
        """The weight of the base: what surrounds a layer asks for its type and device, never for its values."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight.detach()  # the parameter itself would seem to be shared by two layers

    def own(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by their names in this module."""
        return {name: tensor for name, tensor in self.named_parameters() if not name.startswith(f"{BASE}.")}


def adapted(model: nn.Module, aliases: bool = False) -> Iterator[tuple[str, Adapted]]:
    """Every module of `model` that holds an adapter, by full name; with `aliases` under each name that it has."""
    for name, module in model.named_modules(remove_duplicate=not aliases):
        if isinstance(module, Adapted):
            yield name, module


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters in `model`, by full name."""
    return {_join(prefix, name): each for prefix, module in adapted(model) for name, each in module.own().items()}


def slots_of(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each adapter tensor by full name, with -1 where an adapter chooses the size."""
    found = {}
    for prefix, module in adapted(model):
        for name, tensor in module.own().items():
            free = module.free.get(name)
            found[_join(prefix, name)] = [-1 if place == free else size for place, size in enumerate(tensor.shape)]
    return found


def adapter_of(model: nn.Module) -> AdapterFile | None:
    """The adapters of `model` as a file holds them; None if it has none."""
    places = {name: (type(module).__name__, module.settings()) for name, module in adapted(model)}
    tensors = {name: each.detach().cpu().float().numpy() for name, each in adapter_tensors(model).items()}
    return AdapterFile(base_digest(model), places, tensors) if tensors else None


def base_digest(model: nn.Module) -> str:
    """SHA-256 over all tensors of `model` but those of adapters, by the names that they have without adapters.

    Equal for a model and for the same model with any adapters on it: an adapter belongs to the base with this digest.
    """
    places = dict(adapted(model, aliases=True))
    prefixes = sorted(places, key=len, reverse=True)
    own = {_join(prefix, name) for prefix, module in places.items() for name in module.own()}
    tensors = {name: each.detach().cpu() for name, each in model.state_dict().items() if name not in own}
    return tensor_digest({_without(name, prefixes): each for name, each in tensors.items()})


def _without(name: str, prefixes: list[str]) -> str:
    """The name of a tensor where no adapters are, which stand in the model under `prefixes`, the longest first."""
    for prefix in prefixes:
        start = _join(prefix, f"{BASE}.")
        if name.startswith(start):
            name = _join(prefix, name.removeprefix(start))
    return name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
