"""The feed-forwards of a dense model, found by what flows where when it runs, not by their names."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.blocks import observed
from ..core.context import Context
from ..core.outputs import first, relative_difference
from ..core.whole import Selective
from .experts import FeedForward, feed_forward
from .replacing import replaced

CLOSE = 1e-4  # of a network's outputs, relative, where the same is computed in another order
FARTHER = 16.0  # times an example: where activations differ that are alike near zero
GRID = torch.linspace(-8, 8, 641)
ACTIVATIONS: tuple[nn.Module, ...] = (
    nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ReLU6(), nn.Hardswish(), nn.Mish(),
    nn.LeakyReLU(), nn.ELU(), nn.Softplus(),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A dense feed-forward: `place` is the module that gives its output; what is in `emptied` passes its input on."""

    place: str
    parts: FeedForward
    layers: tuple[str, ...]
    emptied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ran:
    """A module that ran on the example: its first input and its output."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor


def known_activation(module: nn.Module) -> nn.Module | None:
    """The activation of torch.nn that computes what `module` does; None if there is none, or it has parameters."""
    if any(True for _ in module.parameters()):
        return None
    with torch.no_grad():
        try:
            made = module(GRID.clone())
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no single row of values
            return None
        if not isinstance(made, Tensor) or made.shape != GRID.shape:
            return None
        for each in ACTIVATIONS:
            if torch.allclose(each(GRID.clone()), made, atol=1e-6, rtol=1e-5):
                return type(each)("tanh") if getattr(each, "approximate", "") == "tanh" else type(each)()
    return None


def own_activation(module: nn.Module) -> nn.Module:
    """An activation of its own that computes what `module`, which is known, does."""
    made = known_activation(module)
    assert made is not None
    return made


def feed_forwards(model: nn.Module, ctx: Context) -> tuple[list[Found], dict[str, str]]:
    """The feed-forwards of `model`, each proved by putting it in place alone; why others are none, by layer.

    Either two linear layers with a module of activation between them, wherever they stand, or a module that holds two
    or three linear layers and computes nothing else. Those within each other are given once, the inner.
    """
    ran = _run(model, ctx)
    found: dict[str, Found] = {}
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    for each in itertools.chain(_containers(model, ran), _chains(ran)):
        if taken & set(each.layers):
            continue
        if reason := _unequal(model, each, ctx):
            reasons |= dict.fromkeys(each.layers, reason)
            continue
        taken |= set(each.layers)
        found[each.place] = each
    return list(found.values()), {name: why for name, why in reasons.items() if name not in taken}


def put_in(model: nn.Module, found: Found, module: nn.Module) -> nn.Module:
    """`model`, in place, with `module` where this feed-forward was."""
    for name in found.emptied:
        model = replaced(model, name, nn.Identity())
    return replaced(model, found.place, module)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, or the one with a transposed weight that transformers has for GPT-2."""
    if parametrize.is_parametrized(module):
        return False
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer itself, or for a transposed weight a linear layer that computes the same."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return linear(weight.t(), bias)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these values, copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _run(model: nn.Module, ctx: Context) -> list[Ran]:
    """All modules in the order in which they end, on the example; those that run more than once are left out."""
    seen: list[Ran] = []
    counts: dict[str, int] = {}

    def note(name: str, module: nn.Module) -> Any:
        def hook(given: tuple[Any, ...], output: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            made = first(output) if isinstance(output, Tensor | tuple | list | Mapping) else None
            if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
                seen.append(Ran(name, module, given[0], made))

        return hook

    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Selective))
    modules = {name: each for name, each in model.named_modules() if name and not name.startswith(inside or "\n")}
    hooks = {name: note(name, module) for name, module in modules.items() if "parametrizations" not in name.split(".")}
    observed(model.eval(), (), ctx.example, hooks)
    return [each for each in seen if counts[each.name] == 1]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are one tensor, or views of all of it."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _chains(ran: list[Ran]) -> Iterator[Found]:
    """Linear layer, activation, linear layer, each on the output of the one before; dropout between them passes on."""
    leaves = [each for each in ran if not any(True for _ in each.module.children())]
    for down in (each for each in leaves if is_linear(each.module)):
        passed, act = _before(leaves, down)
        through, up = ((), None) if act is None else _before(leaves, act)
        known = None if act is None else known_activation(act.module)
        if act is None or up is None or known is None or not is_linear(up.module):
            continue
        parts = feed_forward(as_linear(up.module), known, as_linear(down.module))
        emptied = (up.name, *through, act.name, *passed)
        yield Found(down.name, parts, (up.name, down.name), emptied)


def _before(leaves: list[Ran], each: Ran) -> tuple[tuple[str, ...], Ran | None]:
    """The leaf whose output is the input of `each`, and the names of the dropouts between them."""
    passed: list[str] = []
    place, wanted = leaves.index(each), each.given
    for other in reversed(leaves[:place]):
        if _same(other.made, wanted):
            if not isinstance(other.module, nn.Dropout | nn.Identity):
                return tuple(passed), other
            passed.append(other.name)
            wanted = other.given
    return tuple(passed), None


def _containers(model: nn.Module, ran: list[Ran]) -> Iterator[Found]:
    """Modules that hold two or three linear layers, and no other parameters, and give what a feed-forward gives."""
    for each in ran:
        parts = as_feed_forward(each.module, each.given, each.made)
        if parts is not None:
            names = [name for name, inner in each.module.named_modules() if is_linear(inner)]
            yield Found(each.name, parts, tuple(f"{each.name}.{name}" for name in names))


@torch.no_grad()
def as_feed_forward(module: nn.Module, given: Tensor, made: Tensor) -> FeedForward | None:
    """The feed-forward that gives what `module` made of `given`; None if there is none, or it has other parameters than
    two or three linear layers. Of several that are close the closest, also on inputs further from zero.
    """
    held = [inner for inner in module.modules() if is_linear(inner)]
    own = {id(parameter) for inner in held for parameter in inner.parameters()}
    if len(held) not in (2, 3) or {id(parameter) for parameter in module.parameters()} != own:
        return None
    if given.shape[:-1] != made.shape[:-1]:
        return None
    seen = [(given, made)]
    with contextlib.suppress(TypeError):  # it takes more than one input: what it made of the example is all there is
        seen.append((FARTHER * given, first(module(FARTHER * given))))
    best, least = None, CLOSE
    for parts in _arrangements(module, [as_linear(inner) for inner in held]):
        if (parts.up.in_features, parts.down.out_features) != (given.shape[-1], made.shape[-1]):
            continue
        missed = max(relative_difference(wanted, parts(x)) for x, wanted in seen)
        if missed < least:
            best, least = parts, missed
    return best


def _arrangements(module: nn.Module, layers: list[nn.Linear]) -> Iterator[FeedForward]:
    """The feed-forwards that these layers can form: the activation is a module beside them, or any that is known."""
    inner = [known for each in module.modules() if (known := known_activation(each)) is not None and each is not module]
    for order in itertools.permutations(layers):
        down, up, *gate = reversed(order)
        if up.out_features != down.in_features or any(g.weight.shape != up.weight.shape for g in gate):
            continue
        for act in inner or ACTIVATIONS:
            yield feed_forward(up, known_activation(act) or act, down, *gate)


@torch.no_grad()
def _unequal(model: nn.Module, found: Found, ctx: Context) -> str:
    """Why this is no feed-forward by itself: what changes when it is put in place as one; empty if nothing does."""
    example, wanted = ctx.example, None
    wanted = first(model(**example))
    kept = {name: model.get_submodule(name) for name in (*found.emptied, found.place)}
    if any(name == "" for name in kept):
        return "it is the whole model; put it into an nn.Sequential"
    put_in(model, found, found.parts)
    try:
        now = first(model(**example))
    except (RuntimeError, AttributeError, TypeError) as error:  # what surrounds the layers asks for what they were
        return f"what surrounds it cannot do without it ({' '.join(str(error).split())[:100]})"
    finally:
        for name, module in kept.items():
            replaced(model, name, module)
    if now.shape == wanted.shape and relative_difference(wanted, now) < CLOSE:
        return ""
    return "what is between its layers is used elsewhere, or more than an activation"
