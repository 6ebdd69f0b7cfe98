"""Where the residual branches of a block end: which of its layers are added to what passes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.outputs import relative_difference

SAME = 1e-5
Owners = dict[str, list[nn.Parameter]]


def owners(block: nn.Module) -> Owners:
    """The parameters of every module of `block` that has some of its own; soft ones under the module's own name."""
    found: Owners = {}
    for name, parameter in block.named_parameters():
        owner = name.split("parametrizations.")[0] if "parametrizations." in name else name.rpartition(".")[0]
        found.setdefault(owner.rstrip("."), []).append(parameter)
    return found


@contextmanager
def zeroed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this block the parameters are zero."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, value in zip(parameters, before):
                parameter.copy_(value)


@torch.no_grad()
def branch_ends(block: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> list[str]:
    """The modules of `block` without which it hands its input on: the last one of each residual branch.

    `run` gives the input and the output of the block. Empty if the block is not the identity even when all of its
    parameters are zero: then nothing in it is added to what passes by.
    """
    own = owners(block)
    ends = list(own)

    def identity(names: list[str]) -> bool:
        with zeroed([parameter for name in names for parameter in own[name]]):
            before, after = run()
        return before.shape == after.shape and relative_difference(before, after) <= SAME

    if not ends or not identity(ends):
        return []
    for name in list(ends):
        fewer = [other for other in ends if other != name]
        if identity(fewer):
            ends = fewer
    return ends


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
