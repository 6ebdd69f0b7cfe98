"""Rounding and ranges learned by reconstruction: each layer, or block, is to give what it gave in floats, from
quantized inputs.

By layer: Nagel et al., arXiv:2004.10568 (AdaRound). By block: Li et al., "BRECQ", arXiv:2102.05426.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...core.encoding import spread
from ...core.errors import NotFinite
from ...core.progress import Progress
from ...model.flow import Flow, Runner, Values
from ...model.norms import attribute
from ...model.port import Port
from ...model.rounding import Rounding
from .adaround import WARM, exponent, rounded, share_up, undecided, variable_of
from .clipping import LearnedRange
from .segments import Segment

ROWS = 32  # of a batch, in one step
LR = 3e-2
RANGE_LR = 1e-2  # of the ranges of ports at the beginning; it falls to nothing
PULL = 3.0  # of the regularizer, a mean over all weights, beside the error as a share of that of rounding to nearest


class Learned:
    """The rounding of one weight as it is learned: its steps (weight over scale) and a variable for each."""

    def __init__(self, weight: Tensor, link: Rounding):
        self.link, self.kind = link, weight.dtype
        self.scale, self.zero = (spread(part, weight, link.axis) for part in (link.scale, link.zero.float()))
        self.steps = weight.detach().float() / self.scale + self.zero
        self.variable = nn.Parameter(variable_of(self.steps - torch.floor(self.steps)))

    def share(self) -> Tensor:
        return share_up(self.variable)

    def weight(self, share: Tensor) -> Tensor:
        """The weight whose steps are rounded up by `share`."""
        return ((rounded(self.steps, share, self.link.low, self.link.high) - self.zero) * self.scale).to(self.kind)

    @torch.no_grad()
    def decided(self) -> Tensor:
        """The weight on its grid, each step rounded to the end that it is nearer to."""
        return self.weight((self.share() >= 0.5).float())


@dataclass(frozen=True)
class Parts:
    """What is learned in one segment: the rounding of weights, by full name, and the ranges of ports, by name.

    A port on the grid of another one has the range of that one, so some names may share one.
    """

    weights: Mapping[str, Learned]
    ranges: Mapping[str, LearnedRange]

    def optimizer(self) -> torch.optim.Optimizer:
        variables = [item.variable for item in self.weights.values()]
        ranges = [each for item in dict.fromkeys(self.ranges.values()) for each in item.parameters()]
        groups = [{"params": variables, "lr": LR}, {"params": ranges, "lr": RANGE_LR}]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def pull(self, shares: Mapping[str, Tensor], time: float) -> Tensor | float:
        """What draws every weight to one of its two integers, once the warm-up is over."""
        if time < WARM or not shares:
            return 0.0
        count = sum(share.numel() for share in shares.values())
        return PULL * torch.stack([undecided(share, exponent(time)) for share in shares.values()]).sum() / count

    def decided(self) -> tuple[dict[str, Tensor], dict[str, Port]]:
        weights = {name: item.decided() for name, item in self.weights.items()}
        return weights, {name: item.settled() for name, item in self.ranges.items()}


def reconstruct(
    module: fx.GraphModule,
    segments: Sequence[Segment],
    links: Mapping[str, Rounding],
    ports: Mapping[str, str],
    batches: Callable[[], Iterable[Sequence[Tensor]]],
    plain: Mapping[str, Tensor],
    iterations: int,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, float]:
    """Learn the rounding of the weights in `segments`, and the ranges of the ports in them, one after the other, in
    place.

    `links` holds the grid of each weight that is to be learned, by full name; `ports` names the ports that are to be
    learned, each with the port whose grid it has (mostly its own). `plain` is what the tensors were in floats.
    `batches()` gives the calibration inputs; each is run through every node once in floats and once quantized (see
    `Flow` for the memory). Gives, for each weight in `segments`, by what factor the error of its segment became smaller
    than that of rounding to nearest in calibrated ranges. Raises `NotFinite` if an error is.
    """
    floats, quantized = Flow(module, batches(), plain, ports=False), Flow(module, batches())
    gains: dict[str, float] = {}
    for segment in progress.track(segments, "learning to round"):
        floats.advance(segment.stop)
        quantized.advance(segment.start)
        weights = {name: Learned(plain[name], links[name]) for name in segment.weights if name in links}
        parts = Parts(weights, _ranges(module, segment, ports))
        gain = _learn(module, segment, parts, ports, floats, quantized, iterations, generator)
        gains.update(dict.fromkeys(segment.weights, gain))
    return gains


def _ranges(module: fx.GraphModule, segment: Segment, ports: Mapping[str, str]) -> dict[str, LearnedRange]:
    """What is to be learned of the ports in a segment: those whose grid begins there."""
    names = [str(node.target) for node in segment.nodes if node.op == "call_module" and str(node.target) in ports]
    own: dict[str, LearnedRange] = {}
    for name in names:
        port = module.get_submodule(name)
        if ports[name] == name and isinstance(port, Port):
            own[name] = LearnedRange(port)
    return {name: own[ports[name]] for name in names if ports[name] in own}


def _learn(
    module: fx.GraphModule,
    segment: Segment,
    parts: Parts,
    ports: Mapping[str, str],
    floats: Flow,
    quantized: Flow,
    iterations: int,
    generator: torch.Generator,
) -> float:
    """Learn one segment and write what was decided; gives the ratio of the errors before and after."""
    pairs = Pairs(segment, floats, quantized)
    before = pairs.error(Runner(module))
    if before == 0.0 or not (parts.weights or parts.ranges):
        return 1.0
    held: dict[str, Tensor] = {}
    runner = Runner(module, held, instead=parts.ranges)
    optimizer = parts.optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    for done in range(iterations):
        time = done / iterations
        if parts.ranges:
            optimizer.param_groups[-1]["lr"] = rates[-1] * (1 - time)
        given, wanted = pairs.draw(generator)
        shares = {name: item.share() for name, item in parts.weights.items()}
        held.update({name: item.weight(shares[name]) for name, item in parts.weights.items()})
        loss = squared_error(runner.part(segment.nodes, given)[segment.output], wanted) / before
        loss = loss + parts.pull(shares, time)
        if not torch.isfinite(loss):
            raise NotFinite(f"learning to round {', '.join(segment.weights)}: the error became {float(loss.detach())}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return _keep_better(module, parts, ports, pairs, before)


@torch.no_grad()
def _keep_better(module: fx.GraphModule, parts: Parts, ports: Mapping[str, str], pairs: Pairs, before: float) -> float:
    """Write the decided weights and ranges, unless they are worse over all data than what was there."""
    weights, ranges = parts.decided()
    after = pairs.error(Runner(module, weights, instead=ranges))
    if after >= before:
        return 1.0
    for name, value in weights.items():
        original(module, name).data = value
    for name, origin in ports.items():  # those in later segments that are on a grid of this one, too
        if origin in ranges:
            port = module.get_submodule(name)
            assert isinstance(port, Port)
            port.scale, port.zero = ranges[origin].scale, ranges[origin].zero
    return before / max(after, 1e-30)


class Pairs:
    """What goes into a segment, from the network as it is quantized so far, and what is to come out of it."""

    def __init__(self, segment: Segment, floats: Flow, quantized: Flow):
        self.segment, self.floats, self.quantized = segment, floats, quantized
        self.given = segment.given()

    def batch(self, place: int) -> tuple[Values, Tensor]:
        values, targets = self.quantized.shelf.get(place), self.floats.shelf.get(place)
        return {node: values[node] for node in self.given}, targets[self.segment.output]

    def draw(self, generator: torch.Generator) -> tuple[Values, Tensor]:
        """Some rows of a random batch; the whole batch where its rows cannot be told from the values."""
        place = int(torch.randint(self.floats.count, (), generator=generator))
        given, wanted = self.batch(place)
        rows = len(wanted)
        if rows <= ROWS or not all(isinstance(value, Tensor) and _rows(value) == rows for value in given.values()):
            return given, wanted
        index = torch.randperm(rows, generator=generator)[:ROWS].to(wanted.device)
        return {node: value[index] for node, value in given.items()}, wanted[index]

    @torch.no_grad()
    def error(self, runner: Runner) -> float:
        """The error over all batches."""
        errors = []
        for place in range(self.floats.count):
            given, wanted = self.batch(place)
            errors.append(float(squared_error(runner.part(self.segment.nodes, given)[self.segment.output], wanted)))
        return sum(errors) / max(1, len(errors))


def squared_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference."""
    return ((got.float() - wanted.float()) ** 2).mean()


def _rows(value: Tensor) -> int:
    return len(value) if value.dim() else 0


def original(module: nn.Module, name: str) -> Tensor:
    """The parameter behind a parametrized weight, or the parameter itself."""
    prefix, _, last = name.rpartition(".")
    owner = module.get_submodule(prefix)
    chains = getattr(owner, "parametrizations", {})
    return chains[last].original if last in chains else attribute(module, name)
