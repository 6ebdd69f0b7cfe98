"""Blocks of a network that give their input's form back: found, silenced, and taken out of the row that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cut import TOLERANCE, shell, unlike

Example = Mapping[str, Tensor]


@dataclass(eq=False)
class Rows:
    """The blocks of a network that can be taken out, and for every other block of a row why it cannot.

    A row is an `nn.Sequential` or `nn.ModuleList`, a block one of its children that holds modules of its own.
    """

    blocks: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Seen:
    """What one run of the example showed of one block."""

    calls: int = 0
    reason: str = ""


def find_blocks(model: nn.Module, example: Example) -> Rows:
    """The blocks of `model` whose removal is the same as handing their first input on, checked on `example`.

    What lies inside a block that can be taken out is no candidate; the blocks of a row within a row are, and those of a
    row within what cannot be taken out (a stage that changes the width). The model is not changed.
    """
    found, seen = Rows(), _watch(model, _children(model), example)
    for name, what in seen.items():
        inner = any(other.startswith(f"{name}.") and not seen[other].reason for other in seen)
        if any(name.startswith(f"{other}.") for other in found.blocks):
            continue
        if _is_row(model.get_submodule(name)) and inner:
            continue
        if reason := what.reason or disagreement(model, [name], example):
            found.left[name] = reason
        else:
            found.blocks.append(name)
    return found


def _is_row(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _children(model: nn.Module) -> list[str]:
    """Every child, with modules of its own, of every row of more than one, by full name; outer ones first."""
    found = []
    for prefix, row in model.named_modules():
        if _is_row(row) and len(row._modules) > 1:
            found += [
                f"{prefix}.{name}" if prefix else name
                for name, child in row.named_children()
                if any(True for _ in child.children())
            ]
    return found


@torch.no_grad()
def _watch(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, _Seen]:
    """Run the example and say of each block why it cannot be taken out, as far as its input and output show it."""
    seen = {name: _Seen() for name in names}

    def look(what: _Seen, given: Any, named: Any, out: Any) -> None:
        what.calls += 1
        before, after = _first(given, named), out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            what.reason = "it does not turn a tensor into a tensor"
        elif before.shape != after.shape or before.dtype != after.dtype:
            what.reason = f"it turns {tuple(before.shape)[1:]} into {tuple(after.shape)[1:]}"

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, given, named, out, what=what: look(what, given, named, out), with_kwargs=True
        )
        for name, what in seen.items()
    ]
    try:
        _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for what in seen.values():
        if what.calls != 1:
            what.reason = what.reason or f"it runs {what.calls} times in one pass"
    return seen


def _first(given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return given[0] if given else next(iter(named.values()), None)


def _run(model: nn.Module, example: Example) -> Any:
    return model(**{name: tensor.clone() for name, tensor in example.items()})


@contextmanager
def silenced(model: nn.Module, names: Iterable[str], known: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within this block each of the named modules gives its first input back (with what else it gives, if it does).

    `known` holds outputs of blocks by name (see `outputs_of`): those blocks are not computed, but give them again.
    """
    silent, known = set(names), known or {}
    for name in silent | set(known):
        module = model.get_submodule(name)
        # in place of the method of the class, so that what is not needed is not computed either
        module.forward = _stand_in(module, name in silent, known.get(name))
    try:
        yield
    finally:
        for name in silent | set(known):
            del model.get_submodule(name).forward


def _stand_in(module: nn.Module, silent: bool, known: Any) -> Callable[..., Any]:
    whole = type(module).forward

    def forward(*given: Any, **named: Any) -> Any:
        if known is not None:
            out = _copied(known)
        elif silent:  # on copies: a block that works in place must not change what is handed on
            out = whole(module, *map(_copied, given), **{name: _copied(value) for name, value in named.items()})
        else:
            out = whole(module, *given, **named)
        if not silent:
            return out
        before = _first(given, named)
        return type(out)([before, *out[1:]]) if isinstance(out, tuple | list) else before

    return forward


def _copied(value: Any) -> Any:
    """Copies of a tensor, or of those in a tuple or list; what comes later may change them in place."""
    if isinstance(value, tuple | list):
        copies = map(_copied, value)
        return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Copies of what the named blocks give while this block runs, in the order in which they compute."""
    found: dict[str, Any] = {}

    def note(name: str, out: Any) -> None:
        found[name] = _copied(out)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _given, out, name=name: note(name, out))
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def input_shapes(model: nn.Module, names: Iterable[str], example: Example) -> dict[str, tuple[int, ...]]:
    """The shape of the first input of each of the named blocks, which get a tensor, on `example`."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, given: Any, named: Any) -> None:
        found[name] = tuple(_first(given, named).shape)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, given, named, name=name: note(name, given, named), with_kwargs=True
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def remove_blocks(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Take the named blocks out of the rows that hold them, in place; those behind them move up, and where the blocks
    of a row have numbers for names, or say their numbers as those of `transformers` do, they are renumbered.

    The model stays the user's own module and can be trained and saved.
    """
    gone = set(names)
    for prefix, row in list(model.named_modules()):
        if not _is_row(row):
            continue
        children = list(row._modules)
        stay = [place for place, name in enumerate(children) if (f"{prefix}.{name}" if prefix else name) not in gone]
        if len(stay) == len(children):
            continue
        _renumber(model.get_submodule(prefix.rpartition(".")[0]), row, stay)
        for place in reversed([place for place in range(len(children)) if place not in stay]):
            if children[place] == str(place):
                del row[place]
            else:  # a name of its own: those behind keep theirs
                delattr(row, children[place])
    return model


def _renumber(owner: nn.Module, row: nn.Module, stay: list[int]) -> None:
    """The numbers of layers that modules of `transformers` hold, as they are when only the layers in `stay` are left:
    `layer_idx` (which entry of the cache of keys and values is a layer's own), and in the configuration of the module
    that owns the row how many there are and which mask each gets.
    """
    counted = [[each for each in layer.modules() if hasattr(each, "layer_idx")] for layer in row.children()]
    if not all(found and all(each.layer_idx == place for each in found) for place, found in enumerate(counted)):
        return
    for new, old in enumerate(stay):
        for each in counted[old]:
            each.layer_idx = new  # type: ignore[assignment]
    config: Any = getattr(owner, "config", None)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == len(counted):
        config.layer_types = [types[place] for place in stay]
    if getattr(config, "num_hidden_layers", None) == len(counted):
        config.num_hidden_layers = len(stay)


def without(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model` without the named blocks, which shares the tensors of all others."""
    return remove_blocks(shell(model), names)


@torch.no_grad()
def disagreement(model: nn.Module, names: list[str], example: Example, tolerance: float = TOLERANCE) -> str:
    """Why taking the named blocks out is not the same as silencing them, on `example`; empty if it is."""
    with silenced(model, names):
        want = _run(model, example)
    return unlike(want, lambda: _run(without(model, names).eval(), example), tolerance)
