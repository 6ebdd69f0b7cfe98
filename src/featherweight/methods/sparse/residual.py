"""Where the residual branches of a block end: which of its layers are added to what passes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.outputs import relative_difference

SAME, SCALED = 1e-5, 1e-3  # relative differences; what is added is small beside what it is read off from
Owners = dict[str, list[nn.Parameter]]


def owners(block: nn.Module) -> Owners:
    """The parameters of every module of `block` that has some of its own; soft ones under the module's own name."""
    found: Owners = {}
    for name, parameter in block.named_parameters():
        owner = name.split("parametrizations.")[0] if "parametrizations." in name else name.rpartition(".")[0]
        found.setdefault(owner.rstrip("."), []).append(parameter)
    return found


@contextmanager
def changed(parameters: Sequence[nn.Parameter], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this block the parameters are what `change` makes of them."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(change(parameter))
        try:
            yield
        finally:
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)


def scaled(parameters: Sequence[nn.Parameter], factor: float) -> AbstractContextManager[None]:
    """Within this block the parameters are `factor` times what they are."""
    return changed(parameters, lambda value: value * factor)


def filled(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Within this block those of the parameters that are zero throughout hold something: branches may start silent."""
    generator = torch.Generator().manual_seed(0)
    zero = [parameter for parameter in parameters if not bool(parameter.any())]
    return changed(zero, lambda value: torch.randn(value.shape, generator=generator).to(value))


@torch.no_grad()
def branch_ends(block: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> list[str]:
    """The modules of `block` without which it hands its input on: the last one of each residual branch.

    `run` gives the input and the output of the block. Empty if the block is not the identity even when all of its
    parameters are zero (then nothing in it is added to what passes by), or if scaling the last module of a branch does
    not scale what the branch adds.
    """
    own = owners(block)
    ends = in_order(block, list(own), run)

    def identity(names: list[str]) -> bool:
        with scaled([parameter for name in names for parameter in own[name]], 0):
            before, after = run()
        return before.shape == after.shape and relative_difference(before, after) <= SAME

    with filled(list(block.parameters())):
        if not ends or not identity(ends):
            return []
        for name in list(ends):
            fewer = [other for other in ends if other != name]
            if identity(fewer):
                ends = fewer
        return ends if all(_scales(own, ends, name, run) for name in ends) else []


def _scales(own: Owners, ends: Sequence[str], name: str, run: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether the branch that ends with `name`, without the others, adds half as much when that end is halved.

    An activation may follow the addition; only entries that it does not cut off are compared.
    """
    others = [parameter for other in ends if other != name for parameter in own[other]]
    with scaled(others, 0):
        before, whole = run()
        with scaled(own[name], 0.5):
            half = run()[1]
    seen = whole != 0
    return relative_difference((whole - before)[seen] / 2, (half - before)[seen]) <= SCALED


def in_order(block: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> list[str]:
    """The named modules of `block` in the order in which they are done when it runs; those not called come last."""
    done: list[str] = []
    handles = [
        block.get_submodule(name).register_forward_hook(lambda *_given, name=name: done.append(name)) for name in names
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    last = {name: place for place, name in enumerate(done)}
    return sorted(names, key=lambda name: last.get(name, len(done)))


@torch.no_grad()
def first_call(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> dict[str, tuple[Any, Any]]:
    """The arguments that each named module is called with when `run` runs the model."""
    found: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: Any, named: Any) -> None:
            kept = tuple(value.clone() if isinstance(value, Tensor) else value for value in given)
            found[name] = kept, {key: v.clone() if isinstance(v, Tensor) else v for key, v in named.items()}

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
