"""The repeated blocks of a model, one after the other: each meets what the changed blocks before it give."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .data import tensors_in
from .outputs import first
from .whole import observed_whole

PLAIN = (int, float, str, bytes, type(None), torch.device, torch.dtype, torch.Size)
Call = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[tuple[Any, ...], Any], None]


class Enough(Exception):
    """Raised by a hook that has seen all it needs: the rest of the block is not computed for this batch."""


@dataclass
class Block:
    """One block of a model, and the calls that it gets from the calibration data.

    `calls` come from the blocks before it as they are now, `original_calls` from them as they were. `real` says for
    each call which positions of the inputs are no padding ([batch, length], boolean), None where all are.
    """

    name: str
    module: nn.Module
    calls: list[Call]
    original_calls: list[Call]
    real: list[Tensor | None] = field(default_factory=list)

    @torch.no_grad()
    def observe(self, hooks: Mapping[str, Hook], place: int, module: nn.Module | None = None) -> Any:
        """Run the block on its call number `place`; each hook gets the inputs and the output of its submodule.

        With `module`, an untouched copy of the block, that copy runs on the original call. Gives the block's output,
        None if a hook raised `Enough`.
        """
        args, kwargs = fresh(self.calls[place] if module is None else self.original_calls[place])
        return observed(module or self.module, args, kwargs, hooks)


@torch.no_grad()
def observed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: Mapping[str, Hook]) -> Any:
    """The output of `module`, with hooks on its submodules; None if one of them raised `Enough`.

    Parts that get only some of the inputs, such as experts, get all of them meanwhile.
    """
    handles = [
        module.get_submodule(name).register_forward_hook(lambda _m, given, out, call=call: call(given, out))
        for name, call in hooks.items()
    ]
    try:
        with observed_whole(module):
            return module(*args, **kwargs)
    except Enough:
        return None
    finally:
        for handle in handles:
            handle.remove()


def repeated(model: nn.Module) -> list[str]:
    """The names of the repeated blocks: the children of the list with most parameters whose children are of one type.

    Empty if no module list (or sequence) has at least two children of one type with parameters.
    """
    best, most = [], 0
    for prefix, container in model.named_modules():
        children = list(container.children()) if isinstance(container, nn.ModuleList | nn.Sequential) else []
        count = sum(parameter.numel() for parameter in container.parameters())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        # a row of plain layers is no row of blocks
        if alike and count > most and any(True for _ in children[0].children()):
            names = [name for name, _ in container.named_children()]
            best, most = [f"{prefix}.{name}" if prefix else name for name in names], count
    return best


def walk(
    model: nn.Module,
    calls: Sequence[Callable[[], Any]],
    real: list[Tensor | None],
    enter: Callable[[str], None] | None = None,
    leave: Callable[[str], None] | None = None,
) -> Iterator[Block]:
    """The repeated blocks of `model` in order. The caller may change each in place before it asks for the next.

    `calls` run the model on one batch each. Only the calls of one block are held at a time. Gives nothing where the
    model has no blocks that follow each other: each must get the output of the one before it as its first argument,
    and the same other arguments. With `enter`, which brings the tensors of the block called so into memory, and
    `leave`, which takes them out again, the model need not be there as a whole; that its blocks follow each other is
    then not checked.
    """
    names = repeated(model)
    if not names or not calls or (enter is None and not _follow(model, names, calls[0])):
        return
    streams = [_first_call(model, names[0], call) for call in calls]
    original = list(streams)
    for name in names:
        if enter is not None:
            enter(name)
        module = model.get_submodule(name)
        yielded = Block(name, module, streams, original, real)
        before = [_output(module, call) for call in original]
        yield yielded
        streams = [_next(call, _output(module, call)) for call in streams]
        original = [_next(call, output) for call, output in zip(original, before)]
        del yielded, module, before
        if leave is not None:
            leave(name)


def fresh(call: Call) -> Call:
    """The call with copies of what a block may change in place: its first input, and what is neither tensor nor plain
    value (a cache of keys and values grows each time that a block runs).
    """
    given = _given(call)

    def own(value: Any) -> Any:
        if value is given:
            return given.clone()
        return value if list(tensors_in(value)) or isinstance(value, PLAIN) else copy.deepcopy(value)

    return tuple(map(own, call[0])), {name: own(value) for name, value in call[1].items()}


@torch.no_grad()
def _output(module: nn.Module, call: Call) -> Tensor:
    args, kwargs = fresh(call)
    return first(module(*args, **kwargs))


def _next(call: Call, output: Tensor) -> Call:
    args, kwargs = call
    if args:
        return (output, *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: output}


def _given(call: Call) -> Tensor:
    return call[0][0] if call[0] else next(value for value in call[1].values() if isinstance(value, Tensor))


@torch.no_grad()
def _first_call(model: nn.Module, name: str, run: Callable[[], Any]) -> Call:
    """What the module called `name` is called with when the model runs; nothing after it is computed."""
    found: list[Call] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(fresh((args, kwargs)))
        raise Enough

    handle = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Enough:
        pass
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def _follow(model: nn.Module, names: list[str], run: Callable[[], Any]) -> bool:
    """Whether each block runs once, on the output of the one before it and with the same other arguments."""
    calls: list[tuple[str, Call, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((name, (args, kwargs), first(output)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, _, _ in calls] != names or not any(isinstance(v, Tensor) for v in _values(calls[0][1])):
        return False
    for (_, call, output), (_, following, _) in itertools.pairwise(calls):
        wanted = _next(call, output)
        if not (_given(following) is output and _same(wanted, following)):
            return False
    return True


def _values(call: Call) -> list[Any]:
    return [*call[0], *call[1].values()]


def _same(one: Call, other: Call) -> bool:
    tensors = [list(tensors_in(_values(call))) for call in (one, other)]
    return (
        len(one[0]) == len(other[0])
        and one[1].keys() == other[1].keys()
        and len(tensors[0]) == len(tensors[1])
        and all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(*tensors))
    )


def real_positions(batch: Any) -> Tensor | None:
    """Which positions of a batch of sequences are no padding, [batch, length]; None where nothing says so.

    An `attention_mask` says it, or labels below 0 that have the shape of the input.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    labels = batch.get("labels")
    shapes = {tuple(value.shape) for name, value in batch.items() if name != "labels" and isinstance(value, Tensor)}
    if isinstance(labels, Tensor) and labels.dim() == 2 and tuple(labels.shape) in shapes:
        return labels >= 0 if bool((labels < 0).any()) else None
    return None
