"""quantize.coded: weights as integers that an entropy coder makes smallest at a given error."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from featherweight.core.context import Context
from featherweight.core.data import to_device
from featherweight.core.encoding import Sparse
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import records, torch_run
from featherweight.core.outputs import first
from featherweight.core.scaled import Scaled, powers
from featherweight.core.soft import encodings, fold
from featherweight.core.step import Between, Place, Trait
from featherweight.core.task import Split
from featherweight.model.encoded import hold
from featherweight.model.graph import captured, plain_graph
from featherweight.model.masks import plain_weight
from featherweight.model.matrices import sharers
from featherweight.model.norms import attribute, without_norms
from featherweight.model.select import LayerStep

from .correct import correct_biases
from .fisher import loss_hessians
from .floats import leave_floats, round_floats
from .gptq import damped, factors, sorted_order
from .placement import weight_name
from .ratedistortion import exponents, rounded, shared

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)
LOWEST, HIGHEST = 12.0, 48.0  # decibels between which the search looks,
COARSE, FINE = 4.0, 1.0  # going up by the one, then halving it down to the other


@dataclass
class Sensitivity:
    """What an error in one weight does to the outputs: `hessian` [groups, columns, columns] of its inputs, weighted by
    what the outputs react with (None where only single columns are known), its diagonal `columns`, `rows` [rows] the
    share of each row.
    """

    hessian: Tensor | None
    columns: Tensor
    rows: Tensor


class CodedQuantization(LayerStep, kind="quantize.coded"):
    """Store weights as integers with steps for each row and column that give least bits behind an entropy coder.

    Made for the target `coded`: the integers have no fixed number of bits. Batch norm is folded first. The steps make
    every weight add the same error to the model's first output, by gradients and second moments of inputs on the
    calibration split; rounding goes column by column, later ones make up for earlier ones (GPTQ). `snr` is the ratio of
    the output's power to that of the error so predicted, in decibels. With `max_drop` (the metric's unit) it is what
    a search ends at: it goes up until the drop on the validation split is within it, and halves its last step. `rate`
    rounds towards 0 where that lowers `squared error + rate * bits` (error in steps). Embeddings get a step for each
    column. `bias_correction` takes what the means of outputs have moved off the biases; all other floats of modules
    that `only` and `skip` do not leave out are then rounded to about `digits` binary digits. The model becomes a
    captured graph. Raises `RecipeError` if even the highest ratio loses more than `max_drop`.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"scaled8"})
    place: ClassVar[Place | None] = None  # it pays behind an entropy coder alone, which most targets have not
    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:1907.11900"

    snr: Annotated[float, Field(ge=0, le=80), Between(10.0, 40.0)] = 24.0
    max_drop: Annotated[float | None, Field(ge=0)] = None
    rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    embeddings: bool = True
    bias_correction: bool = True
    digits: Annotated[int, Field(ge=4, le=24)] = 7

    def forms(self) -> frozenset[str]:
        return frozenset({"scaled8", "scaled16"})

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        stored = encodings(model)
        twins = self._choose(model, stored, ctx)
        if not twins:
            return model
        plain, free = fold(model), {name: ctx.task.free(name) for name in ctx.example}
        found = self._sensitivities(plain, [name for names in twins for name in names], ctx)
        module = captured(plain, ctx.example, free)
        module, folded, unequal = without_norms(module, ctx.example)
        if unequal:
            ctx.warn(f"{self.kind}: batch norms are not folded, which would change the outputs: {unequal}")
        for layer in folded:
            ctx.change(layer, "batch norm folded in")
        work = _Work(self, module, plain, self._read(module, twins, found, ctx), stored, ctx)
        made, sizes = work.search(self.max_drop) if self.max_drop is not None else work.build(self.snr)
        for name, how in sizes.items():
            ctx.change(name, f"{how}; batch norm folded in" if name in folded else how)
        return made

    def _choose(self, model: nn.Module, stored: dict[str, Any], ctx: Context) -> list[list[str]]:
        """The layers to quantize, those of one weight together; every other layer with parameters is left alone."""
        types = (*MATRICES, nn.Embedding) if self.embeddings else MATRICES
        layers, found = dict(self.layers(model, ctx, types)), dict[int, list[str]]()
        for name, layer in layers.items():
            encoding = stored.get(f"{name}.weight")
            others = [other for other, _ in sharers(model, layer) if other not in layers]
            if encoding is not None and not isinstance(encoding, Sparse):
                ctx.leave(name, "is already stored as an encoding")
            elif others:
                ctx.leave(name, f"shares its weight with {others[0]}, which is not quantized")
            else:
                found.setdefault(id(plain_weight(layer)), []).append(name)
        leave_floats(self, model, types, ctx)
        return list(found.values())

    def _read(
        self, module: fx.GraphModule, twins: list[list[str]], found: dict[str, Sensitivity], ctx: Context
    ) -> dict[str, Sensitivity]:
        """What is known of each weight, by the name under which the captured model reads it."""
        read = {str(node.target).rpartition(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
        known: dict[str, Sensitivity] = {}
        for names in twins:
            name = next((each for each in names if each in read), None)
            if name is not None:
                known[name] = together([found[each] for each in names])
            for other in names:
                if name is None:
                    ctx.leave(other, "the model does not read its weight")
                elif other != name:
                    ctx.change(other, f"shares the weight of {name}")
        return known

    # -- sensitivities -----------------------------------------------------------------------------------------------
    def _sensitivities(self, plain: nn.Module, names: list[str], ctx: Context) -> dict[str, Sensitivity]:
        """What errors in each weight do to the first output, as a share of its power for one input."""
        generator, power = ctx.generator("probe"), 0.0

        def probe(output: Any, batch: Any) -> Tensor:
            """A random projection of the output: the mean of its squared gradients is that of all outputs together."""
            nonlocal power
            values = first(output)
            power += float(values.detach().double().square().sum())
            signs = torch.randint(0, 2, values.shape, generator=generator, dtype=values.dtype) * 2 - 1
            return (values * signs.to(values.device)).sum()

        probed = replace(ctx, task=replace(ctx.task, loss=probe))
        modules = dict(plain.named_modules())
        matrices = [name for name in names if isinstance(modules[name], MATRICES)]
        found = {}
        for name, (hessian, rows) in loss_hessians(plain, matrices, probed).items() if matrices else ():
            hessian, rows = hessian / max(power, 1e-30), rows.clamp_min(1e-4 * float(rows.mean()))
            shares = rows.reshape(len(hessian), -1)
            shares = (shares / shares.sum(1, keepdim=True)).flatten()
            found[name] = Sensitivity(hessian, torch.diagonal(hessian, dim1=1, dim2=2), shares)
        for name in (name for name in names if name not in found):
            power, layer = 0.0, modules[name]
            assert isinstance(layer, nn.Embedding)
            columns = _lookup_sensitivity(plain, layer, probed) / max(power, 1e-30)
            found[name] = Sensitivity(None, columns, torch.full((len(layer.weight),), 1 / len(layer.weight)))
        return found


def together(parts: list[Sensitivity]) -> Sensitivity:
    """What an error does in a weight that several layers read: what it does in each, added up as far as rows and
    columns can stand for it.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = torch.stack([each.columns.sum() for each in parts])
    rows = torch.stack([each.rows * size for each, size in zip(parts, sizes)]).sum(0) / sizes.sum().clamp_min(1e-30)
    columns = torch.stack([each.columns.reshape(-1, parts[0].columns.shape[-1]) for each in parts]).sum(0)
    if all(each.hessian is None for each in parts):
        return Sensitivity(None, columns[0], rows)
    hessians = [torch.diag_embed(each.columns)[None] if each.hessian is None else each.hessian for each in parts]
    return Sensitivity(torch.stack(hessians).sum(0), columns, rows)


def _lookup_sensitivity(plain: nn.Module, layer: nn.Embedding, ctx: Context) -> Tensor:
    """The squared gradient in what a table gives, summed over all places that look something up: [columns]."""
    total: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_(True))
        return outputs[-1]

    handle = layer.register_forward_hook(note)
    try:
        for batch in ctx.batches("calibrate"):
            outputs.clear()
            with torch.enable_grad():
                loss = ctx.task.loss(ctx.task.call(plain.eval(), batch), batch)
                gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
            total += [each.square().flatten(0, -2).sum(0) for each in gradients if each is not None]
    finally:
        handle.remove()
    return torch.stack(total).sum(0) if total else torch.ones(layer.embedding_dim)


class _Work:
    """The captured model, what is known of its weights, and models made from them at one signal-to-noise ratio."""

    def __init__(
        self,
        step: CodedQuantization,
        module: fx.GraphModule,
        plain: nn.Module,
        found: dict[str, Sensitivity],
        stored: dict[str, Any],
        ctx: Context,
    ):
        self.step, self.module, self.ctx = step, module, ctx
        self.keep = {name: each.keep for name, each in stored.items() if isinstance(each, Sparse)}
        self.weights = {name: attribute(module, f"{name}.weight").detach().float() for name in found}
        self.found = {
            name: _folded(each, attribute(plain, f"{name}.weight"), self.weights[name]) for name, each in found.items()
        }
        self.count = sum(weight.numel() for weight in self.weights.values())
        self.known: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def search(self, limit: float) -> tuple[fx.GraphModule, dict[str, str]]:
        """The model of the first ratio from below whose drop on the validation split is within `limit`."""
        task = self.ctx.task
        split: Split = "validate" if task.has("validate") else "calibrate"

        def figure(model: nn.Module) -> float:
            run = torch_run(task, model, self.ctx.device)
            return task.metric.reduce(records(task, run, split, self.ctx.progress))

        original, snr, step, best = figure(self.module), LOWEST, COARSE, None
        while snr <= HIGHEST and step >= FINE:
            made = self.build(snr)
            if task.metric.drop(original, figure(made[0])) <= limit:
                best, snr, step = made, snr - step / 2, step / 2
            elif best is None:
                snr += step
            else:
                snr, step = snr + step / 2, step / 2
        if best is None:
            raise RecipeError(f"{self.step.kind}: even {HIGHEST:g} dB lose more than {limit:g}; raise max_drop")
        return best

    @torch.no_grad()
    def build(self, snr: float) -> tuple[fx.GraphModule, dict[str, str]]:
        """The model at this ratio, and what became of each layer."""
        made = plain_graph(copy.deepcopy(self.module))
        spread = (12 * 10 ** (-snr / 10) / self.count) ** 0.5
        encoded = {name: self._quantize(name, spread) for name in self.weights}
        plain = {str(node.target): _held(made, node) for node in made.graph.nodes if node.op == "get_attr"}
        for name, encoding in encoded.items():
            hold(made.get_submodule(name), "weight", encoding)
        if self.step.bias_correction:
            nodes = {weight_name(node): node for node in made.graph.nodes}
            layers = {f"{name}.weight": nodes[f"{name}.weight"] for name in encoded if f"{name}.weight" in nodes}
            batches = [tuple(self.ctx.task.named_inputs(batch).values()) for batch in self.ctx.batches("calibrate")]
            correct_biases(made, layers, lambda: to_device(batches, self.ctx.device), plain)
        round_floats(self.step, made, self.step.digits)
        return made, {name: f"{each.form} near its entropy, {snr:.3g} dB" for name, each in encoded.items()}

    def _quantize(self, name: str, spread: float) -> Scaled:
        weight, found = self.weights[name], self.found[name]
        channels, matrix = weight.shape[1], weight.flatten(1)
        groups = 1 if found.hessian is None else len(found.hessian)
        known = self._factors(name, groups)
        costs = torch.stack([shared(cost, channels) for _, cost, _ in known]).log().mean(0).exp()
        row_places, row_base = exponents(found.rows.rsqrt())
        column_places, column_base = exponents(costs.rsqrt())
        scale = torch.tensor(spread * row_base * column_base, dtype=torch.float32)
        rows, columns = powers(row_places) * scale, powers(column_places).repeat_interleave(matrix.shape[1] // channels)
        keep = self.keep.get(f"{name}.weight")
        size, parts = len(matrix) // groups, []
        for place, (unit, _, order) in enumerate(known):
            cut = slice(place * size, (place + 1) * size)
            kept = None if keep is None else keep.flatten(1)[cut]
            parts.append(rounded(matrix[cut], rows[cut], columns, unit, order, self.step.rate, kept))
        integers = torch.cat(parts).reshape(weight.shape)
        bits = 8 if int(integers.abs().max()) <= 127 else 16
        values = integers.to(torch.int8 if bits == 8 else torch.int16)
        return Scaled(values, row_places, column_places, scale, bits)

    def _factors(self, name: str, groups: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each group of a weight: U and d of its Hessian (d in the order of columns) and the order of rounding."""
        if name not in self.known:
            found = self.found[name]
            if found.hessian is None:
                diagonal = found.columns + self.step.damping * found.columns.mean().clamp_min(1e-30)
                self.known[name] = [(torch.eye(len(diagonal)), diagonal, torch.arange(len(diagonal)))]
            else:
                self.known[name] = [_decomposed(each, self.step.damping) for each in found.hessian]
        return self.known[name]


def _decomposed(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """U and d of the Hessian, more damped where it is not positive definite; see `_Work._factors`."""
    order = sorted_order(hessian)
    for share in (damping, 10 * damping, 1.0):
        found = factors(damped(hessian, share)[order][:, order])
        if found is not None:
            cost = torch.empty_like(found[1])
            cost[order] = found[1]
            return found[0], cost, order
    count = len(hessian)  # inputs that are 0 on all the data
    return torch.eye(count), torch.full((count,), 1e-12), order


def _folded(found: Sensitivity, before: Tensor, after: Tensor) -> Sensitivity:
    """Sensitivities of a weight after its rows were scaled by folding: those of rows fall by the square of it."""
    ratio = after.flatten(1).norm(dim=1) / before.detach().float().flatten(1).norm(dim=1).clamp_min(1e-30)
    return replace(found, rows=found.rows / ratio.clamp_min(1e-6).square())


def _held(module: nn.Module, node: fx.Node) -> Tensor:
    return attribute(module, node.target).detach().clone()
