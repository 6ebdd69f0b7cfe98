"""finetune: training as it was, so that a changed model recovers."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..core.context import Context
from ..core.fit import Training
from ..core.step import Place, Step, Trait


class Finetune(Step, Training, kind="finetune"):
    """Train the model on the task's own loss, with all its masks and integer grids held.

    Soft weights stay soft: gradients pass through them, so a masked or quantized model recovers as what it is
    (quantization-aware training). `teacher` above 0 mixes in the original model's outputs: as soft targets where they
    are classes, else as they are. Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite
    numbers.
    """

    needs: ClassVar[Trait] = Trait.TRAINABLE
    paper: ClassVar[str] = "arXiv:1506.02626"
    place: ClassVar[Place | None] = Place.HEAL
    trains: ClassVar[bool] = True

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        loss = ctx.fit(model, self, text="fine-tuning")
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ctx.change("*", f"{trained} parameters trained for {self.epochs:g} epochs, last loss {loss:.4g}")
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                ctx.leave(name, "frozen (requires_grad is False)")
        return model
