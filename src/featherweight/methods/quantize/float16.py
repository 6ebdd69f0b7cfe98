"""quantize.float16: 16-bit floats for what stays."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.encoding import Encoding, Sparse
from ...core.half import Halved
from ...core.soft import encodings
from ...core.step import Trait
from ...model.select import LayerStep, excluded, unused

LARGEST = torch.finfo(torch.float16).max
SMALL = "has only vectors (biases, norms), which weigh next to nothing and which integer kernels need as they are"


class Float16(LayerStep, kind="quantize.float16"):
    """Store the weights that no other step has stored as floats of 16 bits, and compute with them as before.

    It comes after the other steps of quantization: linear layers, convolutions, embeddings and other matrices that are
    still plain lie in half the bytes, and become floats of 32 bits when the file is loaded. Vectors stay as they are.
    Afterwards the model can be trained, not reshaped. A weight that is shared, or beyond the range of 16 bits, is left
    alone and named.
    """

    needs: ClassVar[Trait] = Trait(0)
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"float16"})
    paper: ClassVar[str] = "arXiv:1710.03740"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        stored = {name: each for name, each in encodings(model).items() if not isinstance(each, Sparse)}
        places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        shared = {place for place, count in places.items() if count > 1}
        for prefix, module in list(model.named_modules()):
            if ".parametrizations" not in f".{prefix}" and _held(module):
                self._halve(module, prefix, stored, shared, ctx)
        for glob in unused(model, (nn.Module,), self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        return model

    def _halve(
        self, module: nn.Module, prefix: str, stored: dict[str, Encoding], shared: set[int], ctx: Context
    ) -> None:
        """Put the matrices of one module on the grid of 16 bits, or say why not."""
        reason = excluded(prefix, self.only, self.skip) or _cannot(module)
        encoded = {name: stored.get(f"{prefix}.{name}".lstrip(".")) for name in _held(module)}
        held = {name: each for name, each in _held(module).items() if each.dim() > 1 or encoded[name]}
        reasons, done = [], []
        for attribute, weight in {} if reason else held.items():
            obstacle = _obstacle(weight, encoded[attribute], id(weight) in shared)
            if obstacle:
                reasons.append(f"its {attribute} {obstacle}")
            else:
                parametrize.register_parametrization(module, attribute, Halved())
                done.append(attribute)
        if done:
            ctx.change(prefix, f"float16 {', '.join(done)}, computed with as float32")
        if reason or reasons or not held:
            ctx.leave(prefix, reason or "; ".join(reasons) or SMALL)


def _held(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module itself by the name of its attribute; of a soft one, what lies under its links."""
    found: dict[str, Any] = dict(module.named_parameters(recurse=False))
    chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    found |= {attribute: links.original for attribute, links in chains.items()}
    return {name: each for name, each in found.items() if each.is_floating_point()}


def _cannot(module: nn.Module) -> str:
    """Why a module's weights cannot be made soft; empty if they can."""
    if isinstance(module, fx.GraphModule):
        return "is held by the captured model itself; stays in 32 bits"
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        kind = type(module).__name__
        return f"is a {kind}, whose weights torch reads past their chains; quantize.static stores them in integers"
    return ""


def _obstacle(weight: Tensor, encoding: Encoding | None, shared: bool) -> str:
    """Why one matrix stays as it is; empty if it need not."""
    if encoding is not None:
        return f"is already stored as {encoding.form}"
    if weight.dtype != torch.float32:
        return f"is of the type {weight.dtype}"
    if shared:
        return "is shared with another layer, and would be stored twice"
    if float(weight.detach().abs().max()) > LARGEST:
        return f"holds values beyond {LARGEST:g}, the largest of 16 bits"
    return ""
