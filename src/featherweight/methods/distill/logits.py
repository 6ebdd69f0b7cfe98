"""distill.logits: the original model, or an ensemble, teaches the compressed one its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import TaskError
from ...core.fit import Schedule, Term, answers, check_several, ensemble_logits, task_loss, towards, weighted
from ...core.outputs import first
from ...core.step import Between, Place, Step, Trait
from ...core.task import labels
from .inputs import Numbered, numbered
from .losses import by_correlation, decoupled
from .record import LIMIT, CannotKeepError, recorded
from .teachers import Recorded, check_outputs, find_teacher, teacher_digests

OutputLoss = Literal["auto", "kl", "mse", "dkd", "dist"]


class DistillLogits(Step, Schedule, kind="distill.logits"):
    """Train the model towards the outputs of the original model, or of an ensemble of it and other teachers.

    `weight` is the share of the teachers in the loss; the task's own loss gets the rest, so with `weight` 1 no labels
    are needed (but by "dkd"). `loss` "kl" compares class probabilities softened by `temperature` (an ensemble's are
    averaged), "dkd" weighs what is said of the true class by `alpha` and of the others by `beta` (arXiv:2203.08679),
    "dist" correlates probabilities over classes and over inputs (arXiv:2205.10536), "mse" compares the outputs
    themselves, as the share of the teachers' variance that is missed; "auto" takes "kl" where the task's metric agrees
    by class and there are several classes, else "mse".

    `teachers` join the original: tasks (`file.py:function`, `zoo:NAME`), folders written by `save` from this task's
    model, artifacts of any target, which run in their runtime, or `.npy` files of outputs, a row for each training
    input in order. `teacher_weights` weighs the original and then each of them; who has none is not run. With
    `outputs` "once" each teacher runs once over the training data, and what it said is kept in `folder` (or a
    temporary one) for all epochs; "each" runs it on every batch; "auto" keeps where there are several epochs, the
    inputs are the same in each, and it takes 4 GiB at most. Raises `TaskError` if the outputs do not match, or cannot
    be kept and must.
    """

    needs: ClassVar[Trait] = Trait.TRAINABLE
    paper: ClassVar[str] = "arXiv:1503.02531"
    place: ClassVar[Place | None] = Place.HEAL
    trains: ClassVar[bool] = True

    weight: Annotated[float, Field(gt=0, le=1), Between(0.3, 1)] = 0.9
    temperature: Annotated[float, Field(gt=0), Between(1, 8)] = 4.0
    loss: OutputLoss = "auto"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 8.0
    teachers: tuple[str, ...] = ()
    teacher_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    outputs: Literal["auto", "once", "each"] = "auto"
    folder: str = ""

    @field_validator("teacher_weights")
    @classmethod
    def _one_for_each(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        count = 1 + len(info.data.get("teachers", ()))
        if weights and (len(weights) != count or sum(weights) == 0):
            raise ValueError(f"give {count} weights, the original's first, that are not all nought")
        return weights

    def full(self) -> dict[str, Any]:
        """Kind and settings, and what the teachers' files hold, so that another teacher is another recipe."""
        digests = teacher_digests(self.teachers)
        return super().full() | ({"folders": digests} if digests else {})

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        data, reason = numbered(ctx.task) if ctx.task.has("train") else (None, "")
        own = ctx if data is None else replace(ctx, task=replace(ctx.task, model=ctx.task.original, train=data))
        teachers, weights = self._weighted_teachers(ctx, data)
        if ctx.task.has("train"):
            check_outputs(self.kind, model, teachers, own)
        with ExitStack() as stack:
            teachers, how = self._kept(stack, teachers, own, data, reason)
            loss = own.fit(model, self, self.soft_term(teachers, weights), text="distilling")
        text = f"trained for {self.epochs:g} epochs towards {len(teachers)} teacher(s){how}, last loss {loss:.4g}"
        ctx.change("*", text)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                ctx.leave(name, "frozen (requires_grad is False)")
        return model

    def soft_term(self, teachers: Sequence[nn.Module], weights: Sequence[float] = ()) -> Term:
        """The loss that is minimised: the teachers' part and the task's, by their weights."""
        soft = output_term(self.loss, self.temperature, teachers, weights, self.alpha, self.beta)
        return weighted([(self.weight, soft), (1 - self.weight, task_loss)])

    def _weighted_teachers(self, ctx: Context, data: Numbered | None) -> tuple[list[nn.Module], list[float]]:
        """Those who have a weight, and it (none where all have the same)."""
        weights = self.teacher_weights or (1.0,) * (1 + len(self.teachers))
        wanted = [(spec, weight) for spec, weight in zip(("", *self.teachers), weights) if weight]
        found = [find_teacher(spec, ctx, data) if spec else ctx.teacher for spec, _ in wanted]
        return found, [weight for _, weight in wanted] if self.teacher_weights else []

    def _kept(
        self, stack: ExitStack, teachers: list[nn.Module], ctx: Context, data: Numbered | None, reason: str
    ) -> tuple[list[nn.Module], str]:
        """The teachers as they are asked in training, and how that is, in words."""
        live = [each for each in teachers if not isinstance(each, Recorded)]
        if not live or self.outputs == "each" or (self.outputs == "auto" and self.epochs <= 1 and not self.folder):
            return teachers, ""
        if data is not None:
            try:
                limit = None if self.outputs == "once" or self.folder else LIMIT
                kept = stack.enter_context(recorded(teachers, ctx, data, self.folder, limit))
                return kept, ", whose outputs were computed once"
            except CannotKeepError as error:
                reason = str(error)
        if self.outputs == "once" or self.folder:
            raise TaskError(
                f"{self.kind}: the teachers' outputs cannot be computed once and kept: {reason}; "
                "take outputs=each without a folder, or data whose inputs and outputs are the same in each epoch"
            )
        return teachers, f", asked again on each batch ({reason})"


def output_term(
    loss: OutputLoss,
    temperature: float,
    teachers: Sequence[nn.Module] = (),
    weights: Sequence[float] = (),
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Term:
    """The term that pulls the student's first output to its teachers' by `loss`."""
    if loss in ("auto", "kl", "mse"):
        return towards(temperature, teachers, loss, weights)

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        check_several(output, ctx)
        teacher = ensemble_logits(answers(teachers, batch, ctx), temperature, weights).flatten(0, -2)
        student = first(output)
        if loss == "dist":
            return by_correlation(student.flatten(0, -2), teacher, temperature)
        target = true_classes(student, batch, ctx)
        known = target >= 0  # below nought stand what has no label, such as padding
        return decoupled(student.flatten(0, -2)[known], teacher[known], target[known], temperature, alpha, beta)

    return term


def true_classes(scores: Tensor, batch: Any, ctx: Context) -> Tensor:
    """The labels of a batch as one row of integers, one for each row of `scores`; `TaskError` where they are none."""
    target = labels(batch)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != scores.shape[:-1]:
        raise TaskError(
            f"task {ctx.task.name}: loss 'dkd' needs the true class of each row of scores, integers of shape "
            f"{tuple(scores.shape[:-1])}; take loss 'kl' or 'dist'"
        )
    return target.flatten()
