"""Silence units of a network, remove them, and check that both give the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..core.outputs import named_outputs, relative_difference
from .groups import Coupling, Cut, Indices, Slot, tensors

TOLERANCE = 1e-4


def doomed(coupling: Coupling, cut: Cut) -> dict[Slot, Indices]:
    """The indices that `cut` takes from each dimension of each parameter and buffer."""
    gone = coupling.gone(cut)
    found = {place: np.flatnonzero(gone[labels]) for place, labels in coupling.dims.items()}
    return {place: indices for place, indices in found.items() if len(indices)}


@torch.no_grad()
def silence(model: nn.Module, coupling: Coupling, cut: Cut) -> nn.Module:
    """Set to zero, in place, every slice of every parameter that belongs to a unit of `cut`."""
    held = tensors(model)
    zeroed: dict[str, Tensor] = {}
    for (name, dim), indices in doomed(coupling, cut).items():
        if name in coupling.parameters:
            tensor = zeroed.get(name, held[name])
            zeroed[name] = tensor.index_fill(dim, torch.as_tensor(indices, device=tensor.device), 0)
    for name, tensor in zeroed.items():
        _exchange(model, held[name], tensor)
    return model


def shell(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its tensors: those of the copy may be exchanged, not changed."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors(model).values()})


@torch.no_grad()
def remove(model: nn.Module, coupling: Coupling, cut: Cut) -> nn.Module:
    """Take the units of `cut` out of `model`, in place: parameters and buffers get smaller, and sizes held by modules
    follow.

    The model stays the user's own module and can be trained and saved. It is not checked here; see `disagreement`.
    """
    kept: dict[str, Tensor] = {}
    held = tensors(model)
    for (name, dim), indices in doomed(coupling, cut).items():
        tensor = kept.get(name, held[name])
        rest = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
        kept[name] = tensor.index_select(dim, torch.as_tensor(rest, device=tensor.device))
    touched = {module for name, tensor in kept.items() for module in _exchange(model, held[name], tensor)}
    _follow_sizes(model, coupling, cut)
    for module in touched:
        describe_sizes(module)
    return model


def _exchange(model: nn.Module, old: Tensor, new: Tensor) -> list[nn.Module]:
    """Put `new` wherever `old` is held (tied tensors in several places); return the modules that held it."""
    value = (
        nn.Parameter(new.detach().clone(), requires_grad=old.requires_grad)
        if isinstance(old, nn.Parameter)
        else new.detach().clone()
    )
    found = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is old:
                    setattr(module, name, value)  # recurrent layers keep a list of their weights in step with this
                    found.append(module)
    return found


def describe_sizes(module: nn.Module) -> None:
    """Bring the sizes that a known layer states in step with its parameters."""
    weight: Any = getattr(module, "weight", None)
    stated: dict[str, int] = {}
    if isinstance(module, nn.Linear):
        stated = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    elif isinstance(module, _ConvTransposeNd):
        stated = {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    elif isinstance(module, _ConvNd):
        stated = {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    elif isinstance(module, _NormBase):
        held = [tensor for tensor in (weight, module.running_mean) if tensor is not None]
        stated = {"num_features": held[0].shape[0]}
    elif isinstance(module, nn.Embedding):
        stated = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    elif isinstance(module, nn.RNNBase):
        inner, outer = module.get_parameter("weight_ih_l0"), module.get_parameter("weight_hh_l0")
        stated = {"input_size": inner.shape[1], "hidden_size": outer.shape[1]}
    elif isinstance(module, nn.PReLU):
        stated = {"num_parameters": weight.shape[0]}
    elif type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    ):  # transformers: a linear layer with its weight transposed
        stated = {"nx": weight.shape[0], "nf": weight.shape[1]}
    for name, size in stated.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _follow_sizes(model: nn.Module, coupling: Coupling, cut: Cut) -> None:
    """Numbers that modules hold and hand to operators: those known by name, and, for groups that need it, those equal
    to an old size.
    """
    gone = coupling.gone(cut)
    modules = dict(model.named_modules())
    wanted: dict[str, dict[int, set[int]]] = {}
    done: set[tuple[str, str]] = set()
    for size in coupling.sizes:
        count = int((~gone[size.labels]).sum())
        if count == len(size.labels):
            continue
        if size.attribute:
            if (size.module, size.attribute) not in done and hasattr(modules.get(size.module), size.attribute):
                setattr(modules[size.module], size.attribute, count)
                done.add((size.module, size.attribute))
        elif coupling.touches(size.labels, coupling.repair):
            wanted.setdefault(size.module, {}).setdefault(size.value, set()).add(count)
    for name, changes in wanted.items():
        if name in modules:
            _rewrite(modules[name], {old: new.pop() for old, new in changes.items() if len(new) == 1})


def _rewrite(module: nn.Module, changes: Mapping[int, int]) -> None:
    """Replace old sizes by new ones in the integers, and lists of integers, that a module of the user's holds."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) and value in changes:
            setattr(module, name, changes[value])
        elif (
            isinstance(value, list | tuple)
            and value
            and all(isinstance(item, int) and item in changes for item in value)
        ):
            setattr(module, name, type(value)(changes[item] for item in value))


@torch.no_grad()
def disagreement(
    model: nn.Module, coupling: Coupling, cut: Cut, example: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> str:
    """Why removing `cut` is not the same as silencing it, on `example`; empty if it is. The model is not changed.

    Outputs of copies of `model` are compared, in evaluation mode; see `unlike`.
    """
    silent = silence(shell(model), coupling, cut).eval()
    return unlike(
        silent(**{name: tensor.clone() for name, tensor in example.items()}),
        lambda: remove(shell(model), coupling, cut).eval()(**{name: each.clone() for name, each in example.items()}),
        tolerance,
    )


def unlike(silenced: Any, removed: Callable[[], Any], tolerance: float) -> str:
    """Why what a model gives after a removal is not what it gave silenced, in one phrase; empty if it is.

    Compared is the root mean square of the difference over that of the outputs.
    """
    want = named_outputs(silenced)[1]
    try:
        got = named_outputs(removed())[1]
    except Exception as error:  # the user's own code runs here, and may raise anything on sizes that it does not expect
        brief = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"its removal breaks the model ({brief[:160]})"
    for name, tensor in want.items():
        if name not in got or got[name].shape != tensor.shape:
            return f"its removal changes the shape of the output {name!r}"
        off = relative_difference(tensor, got[name])
        if not off <= tolerance:
            return f"removing it is not the same as silencing it (outputs differ by {off:.1e})"
    return ""


def agreeing(
    coupling: Coupling, model: nn.Module, example: Mapping[str, Tensor], cut: Cut
) -> tuple[Cut, dict[int, str]]:
    """The part of `cut` that agrees with silencing it, and for each group that had to be left out the reason.

    Groups are left out by halving: all that is left agrees together. The model is not changed.
    """
    return _add(coupling, model, example, {}, cut)


def _add(
    coupling: Coupling, model: nn.Module, example: Mapping[str, Tensor], sure: Cut, more: Cut
) -> tuple[Cut, dict[int, str]]:
    if not more:
        return sure, {}
    reason = disagreement(model, coupling, sure | more, example)
    if not reason:
        return sure | more, {}
    groups = list(more)
    if len(groups) == 1:
        return sure, {groups[0]: reason}
    failed: dict[int, str] = {}
    for half in (groups[: len(groups) // 2], groups[len(groups) // 2 :]):
        sure, reasons = _add(coupling, model, example, sure, {group: more[group] for group in half})
        failed |= reasons
    return sure, failed


def probe(coupling: Coupling, model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Check every group of `coupling` by removing one unit of each; note which need sizes repaired, and which fail,
    and why.

    The unit is one from the inside of its group: a shift of what comes after it would show.
    """
    cut = {place: np.array([len(group) // 3]) for place, group in enumerate(coupling.groups)}
    passed, failed = agreeing(coupling, model, example, cut)
    if failed:
        coupling.repair = set(failed)
        passed, failed = _add(coupling, model, example, passed, {place: cut[place] for place in failed})
        coupling.repair -= set(failed)
    coupling.refused = failed
