"""A quantized graph made ready for training with learned step sizes, and brought back to fixed grids afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.core.context import Context
from featherweight.core.encoding import spread
from featherweight.core.fit import Groups
from featherweight.model.learned import LEAST, LearnedPort, LearnedRounding, Moments, ternary_scale
from featherweight.model.norms import TRANSPOSED, attribute, folded
from featherweight.model.port import Port
from featherweight.model.rounding import Rounding

from .correct import round_bias
from .placement import moved_from, weight_name

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass
class Plan:
    """What is trained in a quantized graph: the operation of each layer by the full name of its weight, and the names
    of the ports; `same` are ports on the grid of another one.
    """

    layers: dict[str, fx.Node] = field(default_factory=dict)
    ports: list[str] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)


def plan(module: fx.GraphModule) -> Plan:
    """Read off a graph with `Rounding`s and `Port`s what is to be trained."""
    found = Plan()
    ports = {node: str(node.target) for node in module.graph.nodes if _is_port(module, node)}
    for node in module.graph.nodes:
        name = weight_name(node)
        if name is not None and _rounded(module, name):
            found.layers[name] = node
    for node, name in ports.items():
        before = moved_from(node.args[0])
        if before in ports:
            found.same[name] = found.same.get(ports[before], ports[before])
        else:
            found.ports.append(name)
    return found


def _is_port(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Port)


def _rounded(module: nn.Module, name: str) -> bool:
    """Whether the last link on this weight is a fixed grid around 0."""
    prefix, _, last = name.rpartition(".")
    links: Any = getattr(module.get_submodule(prefix), "parametrizations", {})
    link = links[last][-1] if last in links else None
    return isinstance(link, Rounding) and not bool(link.zero.any())


class Learning:
    """A graph of `quantize.static` with learned grids in place of the fixed ones, until `settle` puts fixed ones back.

    Step sizes start at those of the graph. Grids of fewer than 8 bits get the lowest integer that symmetry left out
    (-2 to 1 with 2 bits), unless they are `ternary`. `normed` names the layers that have a batch norm behind them while
    they are trained: one that, at first, gives back what it gets.
    """

    def __init__(self, module: fx.GraphModule, ctx: Context, normed: set[str], ternary: bool = False):
        self.module, self.plan, self.ternary = module, plan(module), ternary
        layers = self.plan.layers.items()
        wanted = {name: node for name, node in layers if name.rpartition(".")[0] in normed}
        self.norms = {name: _insert_norm(module, name, node) for name, node in wanted.items()}
        moments = self._observe(ctx)
        for name in self.plan.ports:
            port = module.get_submodule(name)
            assert isinstance(port, Port)
            _swap(module, name, LearnedPort(port.scale, port.zero, port.bits).to(ctx.device))
        for name in self.plan.same:
            _swap(module, name, nn.Identity())
        for name in self.plan.layers:
            self._learn_weight(name, moments.get(name))

    def _observe(self, ctx: Context) -> dict[str, Moments]:
        """What stands before every norm: one pass over the calibration split, after which nothing is observed."""
        moments = {name: Moments() for name in self.norms}
        hooks = {_norm_name(self.plan.layers[name]): _into(each) for name, each in moments.items()}
        if hooks:
            ctx.observe(self.module, hooks)
        return moments

    @torch.no_grad()
    def _learn_weight(self, name: str, moments: Moments | None) -> None:
        """Put the weight on a learned grid; with a norm behind it, all its channels start from one step size."""
        links, original, bias = self._parts(name)
        fixed = links[-1]
        scale, low = fixed.scale, fixed.low
        if fixed.bits == 2 and self.ternary:
            scale = ternary_scale(_before_last(links, original), fixed.axis)
        elif fixed.bits < 8:
            low = -(2 ** (fixed.bits - 1))
        if moments is not None:
            factor = scale.mean() / scale
            _start_norm(self.norms[name], moments, factor)
            original.mul_(spread(factor, original, fixed.axis))
            assert bias is not None
            bias.mul_(factor)
            scale = scale * factor
        links[-1] = LearnedRounding(scale, fixed.axis, fixed.bits, low, fixed.high).to(original.device)

    def _parts(self, name: str) -> tuple[Any, nn.Parameter, nn.Parameter | None]:
        """The links on a weight, the parameter under them, and the bias of its layer."""
        prefix, _, last = name.rpartition(".")
        links: Any = self.module.get_submodule(prefix).parametrizations[last]  # type: ignore[index]
        node = self.plan.layers[name]
        given = node.args[2] if len(node.args) > 2 else None
        bias = attribute(self.module, given.target) if isinstance(given, fx.Node) else None
        return links, links.original, bias  # type: ignore[return-value]

    # -- while it is trained -------------------------------------------------------------------------------------------
    def steps(self) -> list[nn.Parameter]:
        """All step sizes: of weights and of ports."""
        learned = (LearnedPort, LearnedRounding)
        return [module.scale for module in self.module.modules() if isinstance(module, learned)]

    def groups(self, lr: float, rate: float) -> Groups:
        """Step sizes learn at `rate` times `lr`; they, biases and norms are not decayed."""
        steps = self.steps()
        known = {id(each) for each in steps}
        vectors = [each for each in self.module.parameters() if each.dim() < 2 and id(each) not in known]
        return [
            {"params": steps, "lr": rate * lr, "weight_decay": 0.0},
            {"params": vectors, "weight_decay": 0.0},
        ]

    @contextmanager
    def only_steps(self, only: bool = True) -> Iterator[None]:
        """Within this block, if `only`, weights are not trained: just step sizes, biases and norms."""
        held = [each for each in self.module.parameters() if each.dim() > 1 and each.requires_grad] if only else []
        for each in held:
            each.requires_grad_(False)
        yield
        for each in held:
            each.requires_grad_(True)

    @torch.no_grad()
    def during(self, frozen: bool) -> None:
        """To be called before every step of training: with `frozen`, the statistics of norms and the step sizes of
        ports stay as they are from now on.

        A norm's factor stays above zero, so that it can be folded into a step size.
        """
        for norm in self.norms.values():
            norm.weight.clamp_(min=LEAST)
            norm.train(not frozen)
        if frozen:
            for name in self.plan.ports:
                self.module.get_submodule(name).requires_grad_(False)

    # -- afterwards ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def settle(self) -> None:
        """Fold the norms, and put `Rounding` and `Port` back with the step sizes that were learned."""
        for name in self.plan.layers:
            links, original, _ = self._parts(name)
            integers = links[-1].encode(_before_last(links, original)).values
            if name in self.norms:
                self._fold(name)
            links[-1] = links[-1].settled()
            _keep_integers(links, original, integers)
        for name in self.plan.ports:
            port = self.module.get_submodule(name)
            assert isinstance(port, LearnedPort)
            _swap(self.module, name, port.settled())
        for name, other in self.plan.same.items():
            origin = self.module.get_submodule(other)
            assert isinstance(origin, Port)
            _swap(self.module, name, Port(origin.scale, origin.zero, origin.bits))
        for name, node in self.plan.layers.items():
            round_bias(self.module, name, node)
        if self.norms:
            del self.module.norms
        self.module.graph.lint()
        self.module.recompile()

    def _fold(self, name: str) -> None:
        """Take the norm behind a layer into its weight, its bias and its step sizes; the integers stay."""
        links, original, bias = self._parts(name)
        node, norm = self.plan.layers[name], self.norms[name]
        mean, variance, gamma = norm.running_mean, norm.running_var, norm.weight.clamp_min(LEAST)
        assert mean is not None and variance is not None and bias is not None
        parts = (gamma, norm.bias, mean, variance, norm.eps)
        original.data, bias.data = folded(original.data, bias.data, parts, links[-1].axis)
        factor = gamma.double() * torch.rsqrt(variance.double() + norm.eps)
        links[-1].scale.data = (links[-1].scale.double() * factor).float()
        put = next(user for user in node.users if user.target == _norm_name(node))
        put.replace_all_uses_with(node)
        self.module.graph.erase_node(put)


def _into(moments: Moments) -> Callable[[tuple[Any, ...], Any], None]:
    return lambda given, _out: moments.add(given[0])


def _norm_name(node: fx.Node) -> str:
    return f"norms.{node.name}"


def _insert_norm(module: fx.GraphModule, name: str, node: fx.Node) -> _BatchNorm:
    """Put a batch norm behind a layer, in evaluation mode and with nothing learned yet."""
    weight = attribute(module, name)
    norm = NORMS[node.meta["val"].dim()](weight.shape[1 if node.target in TRANSPOSED else 0])
    module.add_submodule(_norm_name(node), norm.to(weight.device).eval())
    with module.graph.inserting_after(node):
        put = module.graph.call_module(_norm_name(node), (node,))
    node.replace_all_uses_with(put, lambda user: user is not put)
    module.recompile()
    return norm


@torch.no_grad()
def _start_norm(norm: _BatchNorm, moments: Moments, factor: Tensor) -> None:
    """Let a norm give back, divided by `factor` per channel, values that were of these moments before they were
    multiplied by it.
    """
    mean, variance = moments.result()
    factor = factor.double()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean * factor)
    norm.running_var.copy_(variance * factor**2)
    norm.weight.copy_((variance * factor**2 + norm.eps).sqrt() / factor)
    norm.bias.copy_(mean)


def _before_last(links: Any, original: Tensor) -> Tensor:
    """The value that the last link of a chain gets."""
    value = original.detach()
    for link in list(links)[:-1]:
        value = link(value)
    return value


def _keep_integers(links: Any, original: nn.Parameter, integers: Tensor) -> None:
    """Move weights onto the grid where rounding them again would not give `integers`: those at an edge."""
    stored = links[-1].encode(_before_last(links, original))
    wanted = integers.float() * spread(stored.scale, integers, stored.axis)
    original.copy_(torch.where(stored.values == integers, original, wanted.to(original.dtype)))


def _swap(module: nn.Module, name: str, new: nn.Module) -> None:
    prefix, _, last = name.rpartition(".")
    setattr(module.get_submodule(prefix), last, new)
