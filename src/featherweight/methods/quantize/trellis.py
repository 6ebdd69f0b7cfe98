"""quantize.trellis: weights as paths through a trellis, near the rate-distortion bound, at 1 to 6 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.encoding import Sparse
from ...core.soft import encodings
from ...core.step import Between, OneOf, Trait
from ...core.trellis import Trellis, restored
from ...model.held import Held
from ...model.select import LayerStep
from .allocation import DISTORTION, allocate, cost
from .dynamic import called_layers, sharers
from .fisher import loss_hessians
from .hessian import OBSERVED, hessians
from .incoherent import Rotated, encode, layout, rotated

HELD_BYTES = 2**28  # of Hessians at once
SIDE_BY_SIDE = 2**20  # weights of layers that are searched at once


class HeldTrellis(Held, kind="trellis"):
    """Hold a weight as paths through a trellis (see `Trellis`) with fixed symbols; the scale can be trained."""

    symbols: Tensor
    scale: Tensor
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        code: Trellis | None = None,
        size: list[int] | None = None,
        bits: int = 2,
        window: int = 12,
        turned: list[bool] | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        self.float16, self.dtype = True, dtype
        if code is None:  # rebuilt: the tensors are put in afterwards
            blank = torch.zeros(1, 1, dtype=torch.uint8)
            turns = [torch.ones(1, dtype=torch.uint8) if each else None for each in turned or [False, False]]
            code = Trellis(blank, torch.ones(1), tuple(size or [1]), bits, window, *turns)
        self.size, self.bits, self.window = code.size, code.bits, code.window
        self.register_buffer("symbols", code.symbols)
        self.register_buffer("left", code.left)
        self.register_buffer("right", code.right)
        self.scale = nn.Parameter(code.scale.detach().float().clone())

    def settings(self) -> dict[str, Any]:
        return {
            "size": list(self.size),
            "bits": self.bits,
            "window": self.window,
            "turned": [self.left is not None, self.right is not None],
            "dtype": self.dtype,
        }

    def extra_repr(self) -> str:
        return f"bits={self.bits}, window={self.window}"

    def forward(self, weight: Tensor) -> Tensor:
        scale, size = self._rounded(self.scale), self.size
        floats = restored(self.symbols, scale, self.left, self.right, size, self.bits, self.window)
        return floats.to(getattr(torch, self.dtype))

    def encode(self, weight: Tensor) -> Trellis:
        scale = self._stored(self.scale)
        return Trellis(self.symbols, scale, self.size, self.bits, self.window, self.left, self.right)


@dataclass(frozen=True)
class Hessian:
    """What the inputs of a layer are worth [groups, inputs, inputs], and each of its outputs (None: all alike)."""

    inputs: Tensor
    outputs: Tensor | None = None


class TrellisQuantization(LayerStep, kind="quantize.trellis"):
    """Store the weights of linear layers and convolutions as paths through a trellis, at 1 to 6 bits per weight.

    `bits` is the mean over all weights: with `allocation` "even" all layers get as many; with "loss", and always where
    `bits` is no whole number, each gets 1 to 6 so that the loss suffers least.

    Every weight reads a window of `window` bits out of a circular stream to which it adds `bits`; the value of a window
    is arithmetic, so there is no table to store. The paths are searched by the Viterbi algorithm, column by column with
    feedback from the second moments of the layer's inputs over the calibration split (damped by `damping`), which are
    weighted by how much the loss depends on each (`weighting`: "loss", the default, needs one backward pass; "inputs"
    weights all alike). Random Hadamard rotations (`rotate`) on both sides make the weights Gaussian, for which the code
    is made, after rows and columns were balanced by how much they matter; sign and magnitude cost 5 bits per row and
    column, and the weight is turned back when it is restored. With `passes` above 1, layers see the inputs that those
    coded before them give. The symbols are fixed afterwards; scales, biases, norms and what is left alone can still be
    trained.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset(f"trellis{bits}" for bits in DISTORTION)
    paper: ClassVar[str] = "arXiv:2406.11235"

    bits: Annotated[float, Field(ge=1, le=6), OneOf(2.0, 2.5, 3.0, 3.5, 4.0)] = 3.0
    allocation: Annotated[Literal["even", "loss"], OneOf("even", "loss")] = "even"
    window: Annotated[int, Field(ge=6, le=16)] = 12
    damping: Annotated[float, Field(gt=0, le=1), Between(1e-3, 0.1, log=True)] = 0.01
    weighting: Literal["loss", "inputs"] = "loss"
    rotate: bool = True
    rounds: Annotated[int, Field(ge=0, le=10)] = 1
    passes: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def sample(cls) -> dict[str, Any]:
        """Settings for small tasks: a short window is searched fast."""
        return {"bits": 4.0, "window": 8, "passes": 1, "rounds": 0}

    def forms(self) -> frozenset[str]:
        return self.makes if self._allocated else frozenset({f"trellis{int(self.bits)}"})

    @property
    def _allocated(self) -> bool:
        """Whether layers may get different numbers of bits."""
        return self.allocation == "loss" or not self.bits.is_integer()

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        names = self._possible(model, ctx)
        modules, generator = dict(model.named_modules()), ctx.generator(self.kind)
        bits = self._bits(model, names, ctx)
        for some in _in_passes(names, modules, self.passes):
            found = self._hessians(model, some, ctx)
            self._code(modules, {name: bits[name] for name in some}, found, generator, ctx)
        return model

    def _bits(self, model: nn.Module, names: list[str], ctx: Context) -> dict[str, int]:
        """The bits of each layer: all alike, or by what each layer's distortion costs the loss."""
        if not self._allocated:
            return dict.fromkeys(names, int(self.bits))
        modules, generator = dict(model.named_modules()), ctx.generator(f"{self.kind}: bits")
        counts = {name: _weight(modules[name]).numel() for name in names}
        costs: dict[str, float] = {}
        for some in _in_passes(names, modules, 1):
            for name, given in self._hessians(model, some, ctx, "loss").items():
                found = self._rotated(modules[name], given, generator)
                costs[name] = 0.0 if found is None else cost(found)
        return allocate(costs, counts, self.bits)

    def _hessians(self, model: nn.Module, names: list[str], ctx: Context, weighting: str = "") -> dict[str, Hessian]:
        """What each layer's inputs, and each of its outputs, are worth."""
        if (weighting or self.weighting) == "loss":
            return {name: Hessian(*found) for name, found in loss_hessians(model, names, ctx).items()}
        return {name: Hessian(found) for name, found in hessians(model, names, ctx).items()}

    def _possible(self, model: nn.Module, ctx: Context) -> list[str]:
        """The layers that can be coded; for every other, the reason is recorded."""
        called, found = called_layers(model, ctx), []
        for name, layer in self.layers(model, ctx, OBSERVED):
            reason = obstacle(layer, int(self.bits), self.window)
            if name not in called:
                reason = "its forward is never called: the module around it reads its weight"
            elif others := sharers(model, _weight(layer), name):
                reason = f"shares its weight with {others[0]}, which keeps floats: coded, it would be stored twice"
            if reason:
                ctx.leave(name, reason)
            else:
                found.append(name)
        for name in coded_with_zeros(model, found):
            ctx.warn(f"{self.kind}: {name} was pruned; its zeros become small numbers")
        return found

    def _code(
        self,
        modules: dict[str, nn.Module],
        bits: dict[str, int],
        hessian: dict[str, Hessian],
        generator: torch.Generator,
        ctx: Context,
    ) -> None:
        """Put the codes of their weights on the layers named in `bits`; those alike are searched side by side."""
        alike: dict[Any, list[tuple[str, Rotated]]] = {}
        for name, given in bits.items():
            found = self._rotated(modules[name], hessian.pop(name), generator)
            if found is None:
                ctx.leave(name, f"its Hessian is not positive definite at damping={self.damping}; raise it")
            else:
                alike.setdefault((given, found.alike), []).append((name, found))
        for (given, _), some in ctx.progress.track(alike.items(), "searching paths", len(alike)):
            count = max(1, SIDE_BY_SIDE // some[0][1].matrix.numel())
            for start in range(0, len(some), count):
                part = some[start : start + count]
                codes = encode([each for _, each in part], given, self.window, self.rounds)
                for (name, _), (code, lost) in zip(part, codes):
                    _hold(modules[name], code)
                    how = f"{code.bits_per_weight():.2f} bits per weight, {100 * lost:.2g}% weighted error"
                    ctx.change(name, how)

    def _rotated(self, layer: nn.Module, given: Hessian, generator: torch.Generator) -> Rotated | None:
        weight, outputs = _weight(layer).detach().cpu(), None if given.outputs is None else given.outputs.cpu()
        return rotated(weight, given.inputs.cpu(), self.damping, generator if self.rotate else None, outputs)


def _hold(layer: nn.Module, code: Trellis) -> None:
    weight = _weight(layer)
    link = HeldTrellis(code, dtype=str(weight.dtype).removeprefix("torch.")).to(weight.device)
    parametrize.register_parametrization(layer, "weight", link, unsafe=True)


def obstacle(layer: nn.Module, bits: int, window: int) -> str:
    """Why the weight of a layer cannot be coded; empty if it can."""
    weight = _weight(layer).detach()
    kind = parametrize.type_before_parametrizations(layer)
    if kind not in OBSERVED:
        return f"is a {kind.__name__}, which may compute otherwise than the layers of torch.nn"
    if layout(weight.shape[0], weight[0].numel(), bits, window) is None:
        return f"has fewer bits than a window of {window}"
    if not weight.any():
        return "all of its weights are zero"
    return ""


def coded_with_zeros(model: nn.Module, names: list[str]) -> list[str]:
    """Those of these layers whose weights are held at zero in places."""
    stored = encodings(model)
    return [name for name in names if isinstance(stored.get(f"{name}.weight"), Sparse)]


def _in_passes(names: list[str], modules: dict[str, nn.Module], passes: int) -> list[list[str]]:
    """The names in order, in at least `passes` parts (fewer names, fewer parts) whose Hessians fit in `HELD_BYTES`."""
    parts: list[list[str]] = [[]]
    share, size = -(-len(names) // passes), 0
    for name in names:
        need = _hessian_bytes(modules[name])
        if parts[-1] and (len(parts[-1]) == share or size + need > HELD_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += need
    return parts if names else []


def _hessian_bytes(layer: nn.Module) -> int:
    return 4 * int(getattr(layer, "groups", 1)) * _weight(layer)[0].numel() ** 2


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, OBSERVED)
    return layer.weight
