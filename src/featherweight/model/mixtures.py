"""The mixtures of experts in a model, by structure: opened into lists of feed-forwards, pruned, counted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.blocks import observed
from ..core.context import Context
from ..core.outputs import difference, first, relative_difference
from .experts import WAYS, Experts, FeedForward, Router, experts_of, feed_forward
from .feedforwards import ACTIVATIONS, CLOSE, FARTHER, known_activation, linear
from .listed import ROWS, as_mixture
from .replacing import replaced


@dataclass(frozen=True)
class Mixture:
    """Experts in a model by their full name, and what chooses among them: a module with a row of `weight` for each.

    `router` is None where what chooses is not a module with such a weight; `why` says so.
    """

    name: str
    experts: Experts
    router: nn.Module | None
    why: str = ""


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    given: tuple[Tensor, Tensor, Tensor]
    made: Tensor


@dataclass(frozen=True)
class _Ran:
    name: str
    module: nn.Module
    given: tuple[Any, ...]
    output: Any


def mixtures(
    model: nn.Module, ctx: Context, excluded: Callable[[str], str | None] = lambda _name: None
) -> tuple[list[Mixture], dict[str, str]]:
    """The mixtures of `model`; those of stacked weights [experts, ...] are opened in place into feed-forwards.

    A stack is known by how it is called (tokens, indices, weights), and by its outputs being those of the
    feed-forwards that it is read as; a layer that calls a list of experts in a loop is known by what it gives. Those
    that `excluded` gives a reason for, by name, are not touched. Gives also why others are none, by name.
    """
    calls, ran, output = _observe(model, ctx)
    found: list[Mixture] = []
    refused: dict[str, str] = {}
    for call in {call.name: call for call in calls}.values():  # what runs more than once is opened once
        if why := excluded(call.name):
            refused[call.name] = why
            continue
        experts, reason = (call.module, "") if isinstance(call.module, Experts) else opened(call.module, call.given)
        if experts is None:
            refused[call.name] = reason
            continue
        assert isinstance(experts, Experts)
        if experts is not call.module:
            replaced(model, call.name, experts.to(call.given[0].device))
        router = _router(model, ran, call)
        count = len(experts.members) if experts.table is None else len(experts.table)
        weight = getattr(router, "weight", None)
        if router is None or not isinstance(weight, Tensor) or len(weight) != count:
            why = "what chooses its experts is no module with a row of weights for each"
            found.append(Mixture(call.name, experts, None, why))
        else:
            found.append(Mixture(call.name, experts, router))
    if found and not _as_before(
        model, ctx, output
    ):  # it asks its own routers for more, such as their logits by their type
        found = [_with_own_router(model, each, ran) for each in found]
    return [*found, *_listed(model, ran, excluded, refused)], refused


@torch.no_grad()
def _as_before(model: nn.Module, ctx: Context, output: Any) -> bool:
    """Whether the model still gives on the example what it gave."""
    try:
        now = model(**ctx.example)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return False
    layouts = [list(each) if isinstance(each, Mapping) else type(each) for each in (output, now)]
    return layouts[0] == layouts[1] and not difference(first(output), first(now))


def _with_own_router(model: nn.Module, mixture: Mixture, ran: list[_Ran]) -> Mixture:
    """The mixture with the router that the model came with, put back in its place."""
    name = next((name for name, module in model.named_modules() if module is mixture.router), None)
    if name is None:
        return mixture
    router = next(each.module for each in ran if each.name == name)
    replaced(model, name, router)
    return replace(mixture, router=router)


def _listed(
    model: nn.Module, ran: list[_Ran], excluded: Callable[[str], str | None], refused: dict[str, str]
) -> list[Mixture]:
    """The layers that call a list of experts in a loop, put in place as mixtures; why others are none: in `refused`."""
    found: list[Mixture] = []
    for each in {each.name: each for each in ran}.values():
        made, why = as_mixture(each.module, each.given, each.output)
        if made is None and not why:
            continue
        name = f"{each.name}.experts"
        if reason := excluded(name) or why:
            refused[each.name] = reason
        elif made is not None:
            replaced(model, each.name, made)
            found.append(Mixture(name, made.experts, made.router))
    return found


def looped(model: nn.Module, ctx: Context) -> list[str]:
    """The names of the layers that call a list of experts in a loop, which `mixtures` would put others in place of."""
    _, ran, _ = _observe(model, ctx)
    return [each.name for each in ran if as_mixture(each.module, each.given, each.output)[0] is not None]


def opened(stack: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Experts | None, str]:
    """The experts that compute what `stack` does on tokens, indices and weights; or None, and why."""
    weights = {name: each for name, each in stack.named_parameters() if each.dim() == 3}
    if len(weights) != sum(1 for _ in stack.parameters()):
        return None, "it has other parameters than stacked weights, such as biases"
    if len(weights) not in (2, 3) or len({len(each) for each in weights.values()}) != 1:
        return None, f"it has {len(weights)} stacks of weights; two or three of as many experts are known"
    few = [each[:ROWS] for each in given]
    kind = next(iter(weights.values())).dtype
    if kind.itemsize < 4:  # in half precision the order of additions alone is more than what tells readings apart
        stack = copy.deepcopy(stack).float()
        few = [each.float() if each.is_floating_point() else each for each in few]
    with torch.no_grad():
        calls = [tuple(few), (FARTHER * few[0], *few[1:])]
        wanted = [stack(*call) for call in calls]
        stacks: list[Tensor] = [stack.get_parameter(name) for name in weights]
        best, least = None, CLOSE
        for members in _readings(stack, stacks, few[0].shape[-1], wanted[0].shape[-1]):
            made = experts_of(members)
            missed = max(relative_difference(one, made(*call)) for one, call in zip(wanted, calls))
            if missed < least:
                best, least = members, missed
    if best is None:
        return None, "no way to read its stacks gives its outputs"
    return experts_of([_own(member) for member in best]).to(kind), ""


def keep_experts(mixture: Mixture, kept: list[int]) -> None:
    """Drop all experts but those numbered `kept`: feed-forwards, and the rows of the router that choose them.

    Raises `ValueError` where the router chooses within groups, or more experts than would be left to choose from.
    """
    router, experts, members = mixture.router, mixture.experts, mixture.experts.members
    assert router is not None
    table = experts.table or tuple(range(len(members)))
    rows = [row for row, member in enumerate(table) if member in kept]
    if any(isinstance(value, int) and value > 1 for name, value in vars(router).items() if "group" in name):
        raise ValueError("its router chooses within groups of experts, which must stay as large as they are")
    if top_k(router) > len(rows):
        raise ValueError(f"a token computes {top_k(router)} experts, and {len(rows)} would stay")
    _cut(router, len(table), rows)
    refilled(experts, [members[place] for place in kept])
    experts.table = None if experts.table is None else tuple(kept.index(table[row]) for row in rows)


def refilled(experts: Experts, members: Sequence[nn.Module]) -> None:
    """Put other feed-forwards into a layer of experts, in place."""
    for name in [name for name, _ in experts.named_children()]:
        delattr(experts, name)
    for place, member in enumerate(members):
        experts.add_module(str(place), member)


def _cut(router: nn.Module, count: int, rows: list[int]) -> None:
    """Keep these rows of all that a router has `count` of."""
    for name, tensor in [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]:
        if not tensor.dim() or len(tensor) != count:
            continue
        values = tensor.detach()[rows].clone()
        if isinstance(tensor, nn.Parameter):
            setattr(router, name, nn.Parameter(values, requires_grad=tensor.requires_grad))
        else:
            router.register_buffer(name, values, persistent=name not in router._non_persistent_buffers_set)
    for name, value in list(vars(router).items()):
        if type(value) is int and value == count and "expert" in name:
            setattr(router, name, len(rows))


def top_k(router: nn.Module) -> int:
    """How many experts a router chooses for each token."""
    value = getattr(router, "top_k", None)
    if not isinstance(value, int):
        raise ValueError("its router does not say as top_k how many experts it chooses")
    return value


def _observe(model: nn.Module, ctx: Context) -> tuple[list[_Call], list[_Ran], Any]:
    """What is called as experts are, all that modules gave, and the model's output, on the example."""
    calls: list[_Call] = []
    ran: list[_Ran] = []

    def note(name: str, module: nn.Module) -> Any:
        def hook(given: tuple[Any, ...], output: Any) -> None:
            ran.append(_Ran(name, module, given, output))
            if _as_experts(given) and isinstance(output, Tensor) and _is_stack(module):
                calls.append(_Call(name, module, given, output))

        return hook

    modules = {name: module for name, module in model.named_modules() if name}
    hooks = {name: note(name, module) for name, module in modules.items() if "parametrizations" not in name.split(".")}
    output = observed(model.eval(), (), ctx.example, hooks)
    return calls, ran, output


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, Experts) or any(each.dim() == 3 for each in module.parameters(recurse=False))


def _as_experts(given: tuple[Any, ...]) -> bool:
    """Whether these are tokens, indices and weights."""
    if len(given) != 3 or not all(isinstance(each, Tensor) and each.dim() == 2 for each in given):
        return False
    tokens, indices, weights = given
    return (
        not indices.is_floating_point() and indices.shape == weights.shape and len(tokens) == len(indices)
    )  # fmt: skip


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [each for each in values if isinstance(each, Tensor)]


def _router(model: nn.Module, ran: list[_Ran], call: _Call) -> nn.Module | None:
    """The first module that gave the indices of this call; a `Router` is put in its place where one gives the same."""
    for each in ran:
        if not any(tensor is call.given[1] for tensor in _tensors(each.output)):
            continue
        made = None if isinstance(each.module, Router) else _as_router(each)
        if made is not None:
            replaced(model, each.name, made)
        return made or each.module
    return None


@torch.no_grad()
def _as_router(ran: _Ran) -> Router | None:
    """A `Router` that gives what this module gave; None if there is none."""
    weight, bias = getattr(ran.module, "weight", None), getattr(ran.module, "bias", None)
    wanted = ran.output
    if not (isinstance(weight, Tensor) and weight.dim() == 2 and isinstance(wanted, tuple) and len(wanted) == 3):
        return None
    if not all(isinstance(each, Tensor) and each.dim() == 2 for each in wanted) or wanted[2].is_floating_point():
        return None
    if not wanted[1].is_floating_point() or wanted[2].shape[1] > len(weight):
        return None
    if sum(1 for _ in ran.module.parameters()) + sum(1 for _ in ran.module.buffers()) != 1 + (bias is not None):
        return None
    choices = int(wanted[2].shape[-1])
    for scores, normalise in WAYS:
        made = Router(weight.shape[1], len(weight), choices, scores, normalise).to(weight)
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
        got = made(ran.given[0])
        alike = all(one.shape == other.shape for one, other in zip(got, wanted)) and torch.equal(got[2], wanted[2])
        bound = max(CLOSE, torch.finfo(wanted[1].dtype).eps)
        if alike and relative_difference(wanted[1], got[1]) < bound:
            return made
    return None


def _readings(stack: nn.Module, stacks: list[Tensor], inputs: int, outputs: int) -> Iterator[list[FeedForward]]:
    """The ways to read stacks of weights as feed-forwards from `inputs` to `outputs`."""
    inner = [known for each in stack.modules() if each is not stack and (known := known_activation(each)) is not None]
    for order in itertools.permutations(stacks):
        for turned in itertools.product((False, True), repeat=len(order)):
            *first, down = (each.mT if turn else each for each, turn in zip(order, turned))
            if down.shape[1] != outputs or any(each.shape[2] != inputs for each in first):
                continue
            for pair in _gates(first, down.shape[2]):
                for act in inner or ACTIVATIONS:
                    yield [_views(act, down[e], *(each[e] for each in pair)) for e in range(len(down))]


def _gates(first: list[Tensor], neurons: int) -> Iterator[tuple[Tensor, ...]]:
    """The weights in front of the activation: (up,), or (up, gate), which may lie in one stack."""
    if len(first) == 2:
        if all(each.shape[1] == neurons for each in first):
            yield (first[0], first[1])
        return
    (whole,) = first
    if whole.shape[1] == neurons:
        yield (whole,)
    if whole.shape[1] == 2 * neurons:
        for one, other in ((whole[:, :neurons], whole[:, neurons:]), (whole[:, ::2], whole[:, 1::2])):
            yield (other, one)
            yield (one, other)


def _views(act: nn.Module, down: Tensor, up: Tensor, gate: Tensor | None = None) -> FeedForward:
    return feed_forward(_view(up), act, _view(down), None if gate is None else _view(gate))


def _view(weight: Tensor) -> nn.Linear:
    """A linear layer without bias on a view of a weight."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return made


def _own(member: FeedForward) -> FeedForward:
    """The feed-forward with copies of its weights, which are trained."""
    act = known_activation(member.act)
    assert act is not None
    gate = None if member.gate is None else linear(member.gate.weight)
    return feed_forward(linear(member.up.weight), act, linear(member.down.weight), gate)
