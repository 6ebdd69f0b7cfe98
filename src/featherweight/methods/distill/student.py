"""distill.student: a network of the user's own takes the place of the model, to be taught by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.context import Context, count_parameters
from ...core.errors import TaskError
from ...core.outputs import named_outputs
from ...core.soft import copied
from ...core.step import Step, Trait
from ...core.task import Task, find
from ...model import skeleton
from .teachers import teacher_digests


class DistillStudent(Step, kind="distill.student"):
    """Put a network of your own in the place of the model, which is then its teacher in the steps that follow.

    `student` is a function that gives it or its class (`file.py:function`, `package.module:Class`), a task whose model
    it is (`zoo:NAME`), or a folder written by `save`. It stands first in a recipe, before distill.logits or
    distill.features, which train it: a student that comes with no weights knows nothing yet. A student made of this
    task's model needs no such step: prune.structured makes it narrower, prune.blocks shallower. Raises `TaskError` if
    it does not take the model's inputs by their names, or gives other outputs than the model by name or shape.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE | Trait.TRAINABLE
    paper: ClassVar[str] = "arXiv:1503.02531"
    begins: ClassVar[bool] = True

    student: str

    def full(self) -> dict[str, Any]:
        """Kind and settings, and what the student's files hold, so that another student is another recipe."""
        digests = teacher_digests([self.student])
        return super().full() | ({"folders": digests} if digests else {})

    def architecture(self, task: Task) -> nn.Module:
        """A copy of the student, in evaluation mode."""
        if Path(self.student).is_dir():
            return skeleton.load(self.student, like=task.original)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            found = find(self.student, "student")
        made = found.original if isinstance(found, Task) else found
        if not isinstance(made, nn.Module):
            raise TaskError(f"{self.kind}: {self.student} gives {type(made).__name__}, not a torch.nn.Module")
        return copied(made).eval()

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        student = self.architecture(ctx.task).to(ctx.device)
        self._check(student, model.eval(), ctx)
        ctx.change(
            "*",
            f"{self.student} with {count_parameters(student)} parameters, in place of the model with "
            f"{count_parameters(model)}",
        )
        return student

    @torch.no_grad()
    def _check(self, student: nn.Module, model: nn.Module, ctx: Context) -> None:
        layout, wanted = named_outputs(model(**ctx.example))
        try:
            found_layout, found = named_outputs(student(**ctx.example))
        except Exception as error:  # the user's own code runs here, and may raise anything
            text = " ".join(str(error).split())[:200]
            names = ", ".join(ctx.example)
            raise TaskError(
                f"{self.kind}: {self.student} fails on the task's inputs: {text}; its forward must take them by the "
                f"names that the model's has ({names})"
            ) from error
        mine, theirs = ({name: tuple(tensor.shape) for name, tensor in outputs.items()} for outputs in (found, wanted))
        if (found_layout, mine) != (layout, theirs):
            raise TaskError(
                f"{self.kind}: {self.student} gives {_told(mine)}, the model {_told(theirs)}; give it the same outputs"
            )


def _told(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
