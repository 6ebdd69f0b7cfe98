"""substitute.activations: cheaper activation functions in place of dear ones."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from ...core.context import Context
from ...core.fit import Training
from ...core.outputs import first
from ...core.soft import chains, copied, fold
from ...core.step import Place, Trait
from ...model.activations import CHEAPER, Site, graph_sites, module_sites
from ...model.graph import captured, keep_links
from ...model.imitation import missed
from ...model.recalibrate import recalibrate
from ...model.select import LayerStep, excluded

PROBES = 4  # batches of the calibration data that changes are measured on


class CheaperActivations(LayerStep, kind="substitute.activations"):
    """Put cheaper activation functions in place of GELU, SiLU, Mish, ELU, softplus, sigmoid and the like.

    ReLU, hard swish (arXiv:1905.02244), GELU by tanh, and for sigmoids hard sigmoid; softmax stays. `to` says which;
    "auto" takes the cheapest with which the outputs change little enough. A site is changed only if, with those changed
    before it (the least change first), the model's first output misses no more than `max_change` of its energy on the
    calibration data, and, with `of` "latency", if all of its kind together save `min_gain` of the model's time on the
    target. Then batch norms are recalibrated, and with `retrain` the network is trained, which lets `max_change` be
    larger.

    Activations that are modules are exchanged as such. With `functions` those that are called as functions are as well:
    the model becomes a captured graph, which can still be trained, not reshaped, and sites are named by the module
    whose code calls them and the operator. Raises `TaskError` if there is no target for "latency".
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    place: ClassVar[Place | None] = None  # on request: which runtime finds which function cheap differs
    paper: ClassVar[str] = "arXiv:1905.02244, arXiv:1606.08415"

    to: Literal["auto", "relu", "hardswish", "gelu_tanh"] = "auto"
    functions: bool = False
    max_change: Annotated[float, Field(gt=0)] = 0.05
    of: Literal["outputs", "latency"] = "outputs"
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.005
    recalibrate: bool = True
    retrain: Training | None = None

    def ended(self) -> Trait:
        return self.takes if self.functions else Trait(0)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        made = self._captured(model, ctx) if self.functions else model
        sites = self._chosen(made, model, ctx)
        options = self._options(sites, made, ctx)
        if not self._put(options, made, ctx):
            return model
        if self.recalibrate:
            recalibrate(made, ctx)
        if self.retrain is not None:
            ctx.fit(made, self.retrain, text=f"retraining after {self.kind}")
        return made

    def _captured(self, model: nn.Module, ctx: Context) -> fx.GraphModule:
        links = {name: chain for name, _, _, chain in chains(model)}
        made = captured(fold(model), ctx.example, {name: ctx.task.free(name) for name in ctx.example})
        keep_links(made, links)
        return made

    def _chosen(self, made: nn.Module, model: nn.Module, ctx: Context) -> list[Site]:
        """The activations that `only` and `skip` choose; all others, and every layer with weights, are reported."""
        found = list(graph_sites(made)) if isinstance(made, fx.GraphModule) else module_sites(made, ctx.example)
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                ctx.leave(name or type(module).__name__, excluded(name, self.only, self.skip) or "is no activation")
        chosen = []
        for site in found:
            if reason := excluded(site.name, self.only, self.skip):
                ctx.leave(site.name, reason)
            else:
                chosen.append(site)
        if not found:
            hint = "" if self.functions else "; those that are called as functions are found with functions: true"
            ctx.leave("activations", f"no module is one that has a cheaper form{hint}")
        return chosen

    def _options(self, sites: list[Site], model: nn.Module, ctx: Context) -> dict[Site, list[str]]:
        """What may stand for each activation, the cheapest first; those without are reported."""
        found = {}
        saved = self._saved(sites, model, ctx) if self.of == "latency" and sites else {}
        for site in sites:
            fit = [each for each in CHEAPER[site.kind] if self.to in ("auto", each) or each == "hardsigmoid"]
            pays = [each for each in fit if saved.get((site.kind, each), 1.0) >= self.min_gain]
            if pays:
                found[site] = pays
            elif fit:
                gains = ", ".join(f"{each} saves {saved[site.kind, each]:.1%}" for each in fit)
                ctx.leave(site.name, f"{site.kind} stays, of the model's time {gains}")
            else:
                ctx.leave(site.name, f"{site.kind} is no dearer than to={self.to!r}")
        return found

    def _saved(self, sites: list[Site], model: nn.Module, ctx: Context) -> dict[tuple[str, str], float]:
        """The share of the model's time that is saved where all activations of a kind become a cheaper one."""
        pairs = list(dict.fromkeys((site.kind, each) for site in sites for each in CHEAPER[site.kind]))
        variants = []
        for kind, cheap in pairs:
            _set(sites, kind, cheap)
            variants.append(copied(model))
            _set(sites, kind, None)
        whole, *rest = ctx.seconds([model, *variants])
        return {pair: 1 - seconds / whole for pair, seconds in zip(pairs, rest)}

    def _put(self, options: dict[Site, list[str]], model: nn.Module, ctx: Context) -> bool:
        """Exchange what changes the outputs little, the least first; whether any was."""
        wanted = _outputs(model, ctx) if options else []
        alone: dict[Site, tuple[float, str]] = {}
        for site, names in ctx.progress.track(options.items(), "trying activations", len(options)):
            tried = []
            for name in names:
                site.put(name)
                tried.append((_change(model, wanted, ctx), name))
                if tried[-1][0] <= self.max_change:
                    break
            site.put(None)
            alone[site] = tried[-1] if tried[-1][0] <= self.max_change else min(tried)
        done = False
        for site, (change, name) in sorted(alone.items(), key=lambda each: each[1][0]):
            site.put(name)
            total = _change(model, wanted, ctx) if change <= self.max_change else change
            if total <= self.max_change:
                done = True
                ctx.change(
                    site.name, f"{site.kind} to {name}: {change:.2%} of the energy of the outputs, {total:.2%} in all"
                )
            else:
                site.put(None)
                reason = f"{name} for {site.kind} would change {total:.2%} of the energy of the outputs"
                ctx.leave(site.name, f"{reason} (max_change={self.max_change:g})")
        return done


def _set(sites: list[Site], kind: str, to: str | None) -> None:
    for site in sites:
        if site.kind == kind:
            site.put(to)


@torch.no_grad()
def _outputs(model: nn.Module, ctx: Context) -> list[Tensor]:
    model.eval()
    return [first(ctx.task.call(model, batch)) for batch, _ in zip(ctx.batches("calibrate"), range(PROBES))]


def _change(model: nn.Module, wanted: list[Tensor], ctx: Context) -> float:
    """The share of the energy of the outputs `wanted` that the model misses now."""
    return float(missed(_flat(_outputs(model, ctx)), _flat(wanted)))


def _flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in outputs])
