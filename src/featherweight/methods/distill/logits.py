"""distill.logits: the original model, or an ensemble, teaches the compressed one its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import TaskError
from ...core.files import file_digest
from ...core.fit import Schedule, Term, task_loss, towards, weighted
from ...core.outputs import first
from ...core.step import Between, Place, Step, Trait
from ...core.task import find_task
from ...model import skeleton


class DistillLogits(Step, Schedule, kind="distill.logits"):
    """Train the model towards the outputs of the original model, or of an ensemble of it and other teachers.

    `weight` is the share of the teachers in the loss; the task's own loss gets the rest, so with `weight` 1 no labels
    are needed. `loss` "kl" compares class probabilities softened by `temperature` (an ensemble's are averaged), "mse"
    the outputs themselves, as the share of the teachers' variance that is missed; "auto" takes "kl" where the task's
    metric agrees by class and there are several classes, else "mse". `teachers` are tasks (`file.py:function`,
    `zoo:NAME`) or folders written by `save` from this task's model; they get the same inputs and join the original.
    Raises `TaskError` if the outputs do not match.
    """

    needs: ClassVar[Trait] = Trait.TRAINABLE
    paper: ClassVar[str] = "arXiv:1503.02531"
    place: ClassVar[Place | None] = Place.HEAL
    trains: ClassVar[bool] = True

    weight: Annotated[float, Field(gt=0, le=1), Between(0.3, 1)] = 0.9
    temperature: Annotated[float, Field(gt=0), Between(1, 8)] = 4.0
    loss: Literal["auto", "kl", "mse"] = "auto"
    teachers: tuple[str, ...] = ()

    def full(self) -> dict[str, Any]:
        """Kind and settings, and what the teachers' folders hold, so that another teacher is another recipe."""
        pages = {spec: Path(spec) / skeleton.PAGE for spec in self.teachers}
        folders = {spec: file_digest(page) for spec, page in pages.items() if page.is_file()}
        return super().full() | ({"folders": folders} if folders else {})

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        teachers = [ctx.teacher, *(_teacher(spec, ctx) for spec in self.teachers)]
        _check_outputs(model, teachers, ctx)
        loss = ctx.fit(model, self, self.soft_term(teachers), text="distilling")
        ctx.change("*", f"trained for {self.epochs:g} epochs towards {len(teachers)} teacher(s), last loss {loss:.4g}")
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                ctx.leave(name, "frozen (requires_grad is False)")
        return model

    def soft_term(self, teachers: list[nn.Module]) -> Term:
        """The loss that is minimised: the teachers' part and the task's, by their weights."""
        return weighted([(self.weight, towards(self.temperature, teachers, self.loss)), (1 - self.weight, task_loss)])


def _teacher(spec: str, ctx: Context) -> nn.Module:
    folder = Path(spec).is_dir()
    teacher = skeleton.load(spec, like=ctx.task.original) if folder else find_task(spec).original
    return teacher.to(ctx.device).eval()


@torch.no_grad()
def _check_outputs(model: nn.Module, teachers: list[nn.Module], ctx: Context) -> None:
    """Refuse, before any training, a teacher that cannot run on this task's data or answers in another shape."""
    batch = next(ctx.batches("train"), None)
    wanted = first(ctx.task.call(model.eval(), batch)).shape
    for place, teacher in enumerate(teachers):
        try:
            found = first(ctx.task.call(teacher, batch)).shape
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise TaskError(f"distill.logits: teacher {place} fails on the task's inputs: {text}") from error
        if found != wanted:
            raise TaskError(
                f"distill.logits: teacher {place} gives outputs of shape {tuple(found)}, the model {tuple(wanted)}; "
                "take teachers with the same outputs"
            )
