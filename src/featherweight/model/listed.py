"""Experts that a layer holds in a list and calls in a loop, as hand-written ones do: known by what the layer gives."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.outputs import relative_difference
from .experts import WAYS, MixtureOfExperts, Router, chosen, experts_of, mixture
from .feedforwards import CLOSE, as_feed_forward

ROWS = 32  # tokens on which ways to read a layer are compared


def as_mixture(layer: nn.Module, given: tuple[Any, ...], output: Any) -> tuple[MixtureOfExperts | None, str]:
    """What computes the same as a `layer` with one list of experts, a linear score for each, and perhaps a feed-forward
    that computes every token; or None, and why. The reason is empty where the layer has no such list and score.

    Experts that are feed-forwards by what they compute become those; others stay the modules that they are.
    """
    members = _members(layer)
    x = given[0] if given and isinstance(given[0], Tensor) else None
    scores = [] if x is None else _scores(layer, members, x.shape[-1])
    if x is None or not scores:
        return None, ""
    if not isinstance(output, Tensor) or len(given) != 1 or output.shape[:-1] != x.shape[:-1]:
        return None, "it takes or gives more than the tokens; let it give their outputs alone"
    kind = scores[0].weight.dtype
    if kind.itemsize < 4:  # the order of additions alone is more there than what tells readings apart
        layer, x = copy.deepcopy(layer).float(), x.float()
    with torch.no_grad():
        wanted, tokens = layer(x), x.reshape(-1, x.shape[-1])[:ROWS]
        try:
            made = next(_readings(layer, tokens, wanted.reshape(-1, wanted.shape[-1])), None)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
        ):  # its parts do not take rows of tokens
            made = None
        if made is None or relative_difference(wanted, made(x)) >= CLOSE:
            return None, "no way to read it as a linear score and a list of experts gives its outputs"
    return made.to(kind), ""


def _lists(layer: nn.Module) -> list[nn.Module]:
    return [each for each in layer.children() if isinstance(each, nn.ModuleList | nn.ModuleDict)]


def _members(layer: nn.Module) -> list[nn.Module]:
    """The experts in the one list of a layer: modules with parameters of the same shapes; empty if there is none."""
    lists = _lists(layer)
    members = list(lists[0].children()) if len(lists) == 1 else []
    shapes = [[(name, each.shape) for name, each in member.named_parameters()] for member in members]
    alike = len(members) > 1 and bool(shapes[0]) and all(each == shapes[0] for each in shapes)
    return members if alike else []


def _scores(layer: nn.Module, members: list[nn.Module], inputs: int) -> list[nn.Linear]:
    """The linear layers beside a list of experts that have an output for each of them."""
    inside = {id(each) for member in members for each in member.modules()}
    beside = [each for each in layer.modules() if isinstance(each, nn.Linear) and id(each) not in inside]
    return [each for each in beside if members and (each.out_features, each.in_features) == (len(members), inputs)]


def _readings(layer: nn.Module, tokens: Tensor, wanted: Tensor) -> Iterator[MixtureOfExperts]:
    """The ways to read a layer that give, for these tokens, what its outputs begin with."""
    members, wanted = _members(layer), wanted[: len(tokens)]
    outputs = torch.stack([member(tokens) for member in members])
    numbers = torch.arange(len(tokens), device=tokens.device)
    for score in _scores(layer, members, tokens.shape[1]):
        logits = score(tokens)
        for shared, top_k in itertools.product(_shared(layer, score), range(1, len(members) + 1)):
            rest = wanted if shared is None else wanted - shared(tokens)
            for scores, normalise in WAYS:
                weights, indices = chosen(logits, top_k, scores, normalise)
                total = (weights.t()[..., None] * outputs[indices.t(), numbers]).sum(0)
                if total.shape == rest.shape and relative_difference(wanted, wanted - rest + total) < CLOSE:
                    router = _router(score, top_k, scores, normalise)
                    parts = [_part(*each, tokens) for each in zip(members, outputs)]
                    common = None if shared is None else _part(shared, shared(tokens), tokens)
                    yield mixture(router, experts_of(parts), common)


def _shared(layer: nn.Module, score: nn.Linear) -> list[nn.Module | None]:
    """What may compute every token: the one child with parameters beside the list and the score, or nothing."""
    beside = [each for each in layer.children() if each not in _lists(layer) and score not in list(each.modules())]
    rest = [each for each in beside if any(True for _ in each.parameters())]
    return [None] if not rest else [rest[0]] if len(rest) == 1 else []


def _part(module: nn.Module, made: Tensor, tokens: Tensor) -> nn.Module:
    """A module as the feed-forward that it is, or itself."""
    return as_feed_forward(module, tokens, made) or module


def _router(score: nn.Linear, top_k: int, scores: Any, normalise: bool) -> Router:
    made = Router(score.in_features, score.out_features, top_k, scores, normalise).to(score.weight)
    made.weight.copy_(score.weight)
    if score.bias is not None:
        made.bias.copy_(score.bias)
    return made
