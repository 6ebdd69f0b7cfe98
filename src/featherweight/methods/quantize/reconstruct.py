"""Rounding learned by reconstruction: each layer, or block, is to give what it gave in floats, from quantized inputs.

By layer: Nagel et al., arXiv:2004.10568 (AdaRound). By block: Li et al., "BRECQ", arXiv:2102.05426.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from ...core.encoding import spread
from ...core.errors import NotFinite
from ...core.progress import Progress
from ...model.flow import Flow, Runner, Values
from ...model.norms import attribute
from ...model.rounding import Rounding
from .adaround import WARM, exponent, rounded, share_up, undecided, variable_of
from .segments import Segment

ROWS = 32  # of a batch, in one step
LR = 3e-2
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


def reconstruct(
    module: fx.GraphModule,
    segments: Sequence[Segment],
    links: Mapping[str, Rounding],
    batches: Callable[[], Iterable[Sequence[Tensor]]],
    plain: Mapping[str, Tensor],
    iterations: int,
    generator: torch.Generator,
    progress: Progress,
) -> dict[str, float]:
    """Learn the rounding of the weights in `segments`, one after the other, in place.

    `links` holds the grid of each weight, by full name, `plain` what the tensors were in floats. `batches()` gives the
    calibration inputs; each is run through every node once in floats and once quantized (see `Flow` for the memory).
    Gives, for each weight, by what factor the error of its segment became smaller than that of rounding to nearest.
    Raises `NotFinite` if an error is.
    """
    floats, quantized = Flow(module, batches(), plain, ports=False), Flow(module, batches())
    gains: dict[str, float] = {}
    for segment in progress.track(segments, "learning to round"):
        floats.advance(segment.stop)
        quantized.advance(segment.start)
        learned = {name: Learned(plain[name], links[name]) for name in segment.weights}
        gain = _learn(module, segment, learned, floats, quantized, iterations, generator)
        gains.update(dict.fromkeys(segment.weights, gain))
    return gains


def _learn(
    module: fx.GraphModule,
    segment: Segment,
    learned: Mapping[str, Learned],
    floats: Flow,
    quantized: Flow,
    iterations: int,
    generator: torch.Generator,
) -> float:
    """Learn one segment and write the weights; gives the ratio of the errors before and after."""
    pairs = Pairs(segment, floats, quantized)
    before = pairs.error(Runner(module))
    if before == 0.0:
        return 1.0
    held: dict[str, Tensor] = {}
    runner = Runner(module, held)
    variables = [item.variable for item in learned.values()]
    count = sum(variable.numel() for variable in variables)
    optimizer = torch.optim.Adam(variables, lr=LR)
    for done in range(iterations):
        given, wanted = pairs.draw(generator)
        time = done / iterations
        shares = {name: item.share() for name, item in learned.items()}
        held.update({name: item.weight(shares[name]) for name, item in learned.items()})
        loss = squared_error(runner.part(segment.nodes, given)[segment.output], wanted) / before
        if time >= WARM:
            pull = torch.stack([undecided(share, exponent(time)) for share in shares.values()]).sum()
            loss = loss + PULL * pull / count
        if not torch.isfinite(loss):
            raise NotFinite(f"learning to round {', '.join(learned)}: the error became {float(loss.detach())}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return _keep_better(module, learned, pairs, before)


@torch.no_grad()
def _keep_better(module: fx.GraphModule, learned: Mapping[str, Learned], pairs: Pairs, before: float) -> float:
    """Write the decided weights, unless rounding to nearest was better over all data."""
    decided = {name: item.decided() for name, item in learned.items()}
    after = pairs.error(Runner(module, decided))
    if after >= before:
        return 1.0
    for name, value in decided.items():
        original(module, name).data = value
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
