"""experts.merge: experts that do alike become one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.step import Between, OneOf
from ...model.experts import FeedForward, feed_forward
from ...model.feedforwards import is_linear, linear, own_activation
from ...model.mixtures import Mixture, refilled
from ...model.moments import sampled
from .clusters import groups, matching
from .importance import usage
from .steps import MixtureStep


class ExpertMerge(MixtureStep, kind="experts.merge"):
    """Merge experts that do alike: their neurons are matched, and their weights averaged by how much each is used.

    `keep` is the share of experts that stays. Experts are grouped by average linkage: by their mean outputs over the
    same calibration tokens ("outputs", all experts see all of them), or by their rows of the router ("router"). The
    router stays as it is, and a table sends what it chooses to the merged expert, so that its scores keep their
    meaning. It saves memory and disk, not time.
    """

    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:2410.08589, arXiv:2310.01334"

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.25, 0.9)] = 0.5
    by: Annotated[Literal["outputs", "router"], OneOf("outputs", "router")] = "outputs"
    rows: Annotated[int, Field(ge=16)] = 1024

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        found = self.mixtures(model, ctx, routed=self.by == "router")
        used = usage(model, found, ctx)
        given = sampled(model, [each.name for each in found], ctx, self.rows)
        for each in found:
            members = each.experts.members
            stay = max(1, round(self.keep * len(members)))
            if stay == len(members):
                ctx.leave(each.name, f"keep={self.keep} of its {len(members)} experts is all of them")
            elif each.experts.plain:
                ctx.leave(each.name, "its experts are parts of one layer, of which none can stand for another")
            elif self.by == "router" and each.experts.table is not None:
                ctx.leave(each.name, "its experts were merged, and have no rows of the router of their own")
            elif not _alike(members):
                ctx.leave(each.name, "its experts are no feed-forwards of plain linear layers of the same sizes")
            else:
                found_groups = self._merge(each, given[each.name], used[each.name], stay)
                ctx.change(each.name, f"{len(members)} experts merged into {stay}: {found_groups}")
        return self.finish(model, ctx)

    @torch.no_grad()
    def _merge(self, each: Mixture, tokens: Tensor, used: Tensor, stay: int) -> list[list[int]]:
        members: list[Any] = each.experts.members
        if self.by == "outputs":
            tokens = tokens.to(members[0].up.weight.dtype)
            features = torch.stack([member(tokens).double().mean(0) for member in members])
        else:
            assert each.router is not None and isinstance(each.router.weight, Tensor)
            features = each.router.weight.detach()
        features = features.double().cpu()
        together = groups(torch.cdist(features, features), stay)
        merged = [merged_expert([members[place] for place in group], used[group]) for group in together]
        owner = {place: number for number, group in enumerate(together) for place in group}
        before = each.experts.table or tuple(range(len(members)))
        refilled(each.experts, merged)
        each.experts.table = tuple(owner[place] for place in before)
        return together


def _alike(members: list[nn.Module]) -> bool:
    """Whether experts are feed-forwards of plain linear layers, of the same sizes."""
    sizes = set()
    for member in members:
        layers = (member.gate, member.up, member.down) if isinstance(member, FeedForward) else ()
        if not layers or not all(layer is None or is_linear(layer) for layer in layers):
            return False
        sizes.add(tuple(None if layer is None else tuple(layer.weight.shape) for layer in layers))
    return len(sizes) == 1


def merged_expert(members: list[FeedForward], used: Tensor) -> FeedForward:
    """One expert for several: the neurons of each are put in the order of the most used one's, by linear assignment
    over all of their weights, and the weights averaged by use (M-SMoE, arXiv:2310.01334).
    """
    shares = (used + 1e-3 * used.sum().clamp_min(1.0)).double()
    shares = shares / shares.sum()
    lead = members[int(shares.argmax())]
    totals: dict[str, Tensor] = {}
    for member, share in zip(members, shares.tolist()):
        order = torch.arange(lead.up.out_features) if member is lead else matching(_neurons(lead), _neurons(member))
        for name, value in _ordered(member, order).items():
            totals[name] = totals.get(name, torch.zeros_like(value, dtype=torch.float64)) + share * value.double()
    made = {name: value.to(lead.up.weight.dtype) for name, value in totals.items()}

    def layer(name: str) -> nn.Linear:
        return linear(made[f"{name}.weight"], made.get(f"{name}.bias"))

    gate = None if lead.gate is None else layer("gate")
    return feed_forward(layer("up"), own_activation(lead.act), layer("down"), gate)


def _neurons(member: FeedForward) -> Tensor:
    """All that belongs to each neuron: [neurons, weights]."""
    first = [layer for layer in (member.gate, member.up) if layer is not None]
    rows = [layer.weight for layer in first] + [layer.bias[:, None] for layer in first if layer.bias is not None]
    return torch.cat([*rows, member.down.weight.T], 1).detach().cpu()


def _ordered(member: FeedForward, order: Tensor) -> dict[str, Tensor]:
    """The weights and biases of an expert with its neurons in this order."""
    found = {}
    for name, layer in (("gate", member.gate), ("up", member.up), ("down", member.down)):
        if layer is None:
            continue
        weight = layer.weight.detach()
        found[f"{name}.weight"] = weight[:, order] if name == "down" else weight[order]
        if layer.bias is not None:
            bias = layer.bias.detach()
            found[f"{name}.bias"] = bias if name == "down" else bias[order]
    return found
