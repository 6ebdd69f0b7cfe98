"""Soft changes: a weight that is still there but stands for something stored otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .encoding import Encoding


class Link(nn.Module):
    """One link of the chain `weight -> decode(encode(weight))` on a parameter; gradients pass through `forward`.

    A subclass registers itself with `kind=`, keeps its tensors as buffers or parameters, and gives the plain
    constructor values that rebuild it as `settings()` (JSON), so that any chain can be saved and rebuilt (on the meta
    device: its tensors are put in afterwards).
    `encode(weight)` names the Encoding of the value that `forward(weight)` returns, or None if the link is no form of
    storage. `decode(encode(w))` equals `forward(w)`.
    """

    kinds: ClassVar[dict[str, type[Link]]] = {}
    kind: ClassVar[str] = ""

    def __init_subclass__(cls, kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind:
            cls.kind = kind
            Link.kinds[kind] = cls

    def settings(self) -> dict[str, Any]:
        return {}

    def encode(self, weight: Tensor) -> Encoding | None:
        return None


class Mask(Link, kind="mask"):
    """Hold the positions where `keep` is False at zero. `keep` has the weight's shape.

    `pattern` says what the positions have in common: see `Sparse`.
    """

    keep: Tensor

    def __init__(self, keep: Tensor | None = None, shape: list[int] | None = None, pattern: str = ""):
        super().__init__()
        self.pattern = pattern
        self.register_buffer("keep", torch.ones(shape or [], dtype=torch.bool) if keep is None else keep.bool())

    def settings(self) -> dict[str, Any]:
        return {"shape": list(self.keep.shape), "pattern": self.pattern}

    def extra_repr(self) -> str:
        return self.pattern

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep

    def encode(self, weight: Tensor) -> Encoding | None:
        from .encoding import Sparse

        return Sparse(values=(weight * self.keep).detach(), keep=self.keep, pattern=self.pattern)


def chains(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, list[Link]]]:
    """Every soft weight: its full name, its module, its attribute, and its links from first to last.

    A weight on which there are parametrizations of the user's own (such as a norm of weights) is a plain one.
    """
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, links in module.parametrizations.items():
                if not all(isinstance(link, Link) for link in links):
                    continue
                yield f"{prefix}.{attribute}".lstrip("."), module, attribute, list(links)


@torch.no_grad()
def encodings(model: nn.Module) -> dict[str, Encoding]:
    """The Encoding of every soft weight, by the weight's full name: that of the last link of its chain which names one.

    Where a link behind it changes the value, that Encoding no longer holds it: the weight is stored plain, and is not
    named here.
    """
    found: dict[str, Encoding] = {}
    for name, module, attribute, links in chains(model):
        value = module.parametrizations[attribute].original  # type: ignore[index,union-attr]
        last: Encoding | None = None
        for link in links:
            named, made = link.encode(value), link(value)
            if named is not None or not torch.equal(made, value):
                last = named
            value = made
        if last is not None:
            found[name] = last
    return found


def own_class(module: nn.Module, base: type[nn.Module] | None = None) -> None:
    """Give a parametrized module a generated class of its own, on `base` (by default the one it stands on now).

    `copy.deepcopy` shares the generated class, so a chain put on a second weight of a copy would break the original.
    """
    shared = type(module)
    base = shared.__bases__[0] if base is None else base
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(f"Parametrized{base.__name__}", (base,), content)


def copied(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares nothing with it, generated classes of parametrized modules included."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if parametrize.is_parametrized(module):
            own_class(module)
    return made


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every parametrized weight has become a plain parameter with the value it stands for.

    `copy.deepcopy` shares the generated class of a parametrized module, so the plain class is restored by hand.
    """
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
            trainable = {name: _trained(module, name) for name in values}
            kind = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            module.__class__ = kind
            for name, value in values.items():
                # assigned, not registered: that keeps the list of weights of a recurrent layer up to date
                setattr(module, name, nn.Parameter(value, requires_grad=trainable[name]))
    return plain


def _trained(module: nn.Module, attribute: str) -> bool:
    """Whether the tensor behind a parametrized weight is trained; a user's parametrization may have several."""
    links = module.parametrizations[attribute]  # type: ignore[index]
    assert isinstance(links, parametrize.ParametrizationList)
    held = (each for name, each in links.named_parameters(recurse=False) if name.startswith("original"))
    return any(each.requires_grad for each in held)
