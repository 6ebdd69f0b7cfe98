"""What all adapters share: the layers they stand beside, and a training in which the base stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from featherweight.core.adapted import BASE, adapted
from featherweight.core.context import Context
from featherweight.core.errors import RecipeError, TaskError
from featherweight.core.files import tensor_digest
from featherweight.core.fit import Training
from featherweight.core.step import Step, Trait
from featherweight.model.linears import linears, opened
from featherweight.model.select import LayerStep, excluded, patterns


class LearningStep(Step, Training):
    """A step that trains parameters of its own while every tensor of the base stays as it is."""

    needs: ClassVar[Trait] = Trait.TRAINABLE
    trains: ClassVar[bool] = True

    def learn(self, model: nn.Module, trained: Sequence[nn.Parameter], ctx: Context) -> float:
        """Train these parameters alone, and give the last loss.

        Raises `TaskError` if another tensor of the model has changed then: an adapter would not fit its base.
        """
        before = _others(model, trained)
        with _only(model, trained):
            loss = ctx.fit(model, self, during=_hold_statistics, text=self.kind)
        if _others(model, trained) != before:
            raise TaskError(
                f"{self.kind}: the model changes buffers of its own in training mode, so its base would move"
            )
        return loss


class AdapterStep(LayerStep, LearningStep):
    """A step that trains adapters beside linear layers: the base, in floats or stored as integers, is frozen.

    Layers are chosen by `only` and `skip`; it trains as `Training` says. Raises `RecipeError` for the name of a layer
    that is not there, `TaskError` without training data.
    """

    def chosen(self, model: nn.Module, ctx: Context) -> dict[str, nn.Linear]:
        """The linear layers to adapt, each a module that can be replaced; all others are reported as left alone."""
        found, reasons = linears(model, ctx)
        self.check_names(model, {*found, *reasons}, ctx)
        chosen = []
        for name in {**found, **reasons}:
            reason = excluded(name, self.only, self.skip) or reasons.get(name) or _within_adapter(name, model)
            if reason is None:
                chosen.append(name)
            else:
                ctx.leave(name, reason)
        for name, module in model.named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            if own and name not in found and name not in reasons and "parametrizations" not in name.split("."):
                kind = type(module).__name__
                ctx.leave(name or kind, f"is a {kind}; adapters stand beside linear layers")
        opened(model, chosen)
        layers = {name: model.get_submodule(name) for name in chosen}
        return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}

    def check_names(self, model: nn.Module, layers: set[str], ctx: Context) -> None:
        """Raise `RecipeError` for a name that nothing has; warn of a glob of the user's that matches nothing."""
        modules = {name for name, _ in model.named_modules()}
        usual = type(self).model_fields["only"].default
        asked = () if self.only == usual else patterns(self.only)
        for text, names in [*((each, layers) for each in asked), *((each, modules) for each in self.skip)]:
            self.check_name(text, names, layers, ctx)

    def check_name(self, text: str, names: Collection[str], known: Collection[str], ctx: Context) -> None:
        """Raise `RecipeError` for a name that is none of `names`, and show some `known` ones; warn of such a glob."""
        if any(sign in text for sign in "*?["):
            if not any(excluded(name, text) is None for name in names):
                ctx.warn(f"{self.kind}: no layer matches {text!r}")
        elif text not in names:
            some = ", ".join(sorted(known)[:5])
            raise RecipeError(f"{self.kind}: there is no linear layer {text!r}; the first of the model are: {some}")


def _within_adapter(name: str, model: nn.Module) -> str | None:
    """Why a layer of an adapter that was kept gets none of its own; None for one of the base."""
    for place, _ in adapted(model):
        start = f"{place}." if place else ""
        if name.startswith(start) and not name.startswith(f"{start}{BASE}.") and name != f"{start}{BASE}":
            return f"is part of the adapter on {place!r}"
    return None


@contextmanager
def _only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let nothing but these parameters be trained inside the block."""
    wanted = {id(each) for each in trained}
    before = [(each, each.requires_grad) for each in model.parameters()]
    for each, _ in before:
        each.requires_grad_(id(each) in wanted)
    try:
        yield
    finally:
        for each, was in before:
            each.requires_grad_(was)


def _others(model: nn.Module, trained: Sequence[nn.Parameter]) -> str:
    """A digest of all tensors but these."""
    known = {each.data_ptr() for each in trained}
    tensors = model.state_dict()
    return tensor_digest({name: each.cpu() for name, each in tensors.items() if each.data_ptr() not in known})


def _hold_statistics(model: nn.Module, _done: float) -> None:
    """Let batch norms use what they know: their statistics belong to the base."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
