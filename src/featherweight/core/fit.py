"""The one training loop of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .data import to_device
from .errors import NotFinite, TaskError
from .outputs import first
from .step import Between

if TYPE_CHECKING:
    from .context import Context

Term = Callable[[nn.Module, Any, Any, "Context"], Tensor]  # (model, batch, output, ctx) -> loss
During = Callable[[nn.Module, float], None]  # (model, t in [0, 1]) -> None, called before every optimizer step


class Schedule(BaseModel):
    """How long and how fast a model is trained: cosine schedule with linear warm-up, gradient clipping."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: Annotated[float, Field(gt=0), Between(0.25, 4, log=True)] = 1.0
    lr: Annotated[float, Field(gt=0), Between(1e-4, 3e-2, log=True)] = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch_size: Annotated[int, Field(gt=0)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] = 5.0

    def term(self) -> Term:
        """The loss that is minimised when the caller brings none: the task's own."""
        return task_loss


class Training(Schedule):
    """How a model is trained: its schedule, and optionally a teacher's soft targets.

    `teacher` is the weight of the original model's soft targets in the loss (the task's own loss gets the rest).
    """

    teacher: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0

    def term(self) -> Term:
        """The task's loss and the soft targets, by their weights."""
        return weighted([(1 - self.teacher, task_loss), (self.teacher, soft_targets(self.temperature))])


def task_loss(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
    """The task's own loss."""
    return ctx.task.loss(output, batch)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened class distributions, times temperature squared (Hinton et al.,
    arXiv:1503.02531).

    Both are logits, N x ... x classes; the mean is over all but the last dimension.
    """
    log_student = torch.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    log_teacher = torch.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def soft_targets(temperature: float, teachers: Sequence[nn.Module] = ()) -> Term:
    """A term that pulls the student's softened classes to the teacher's (or to the mean of an ensemble's
    probabilities).
    """

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        with torch.no_grad():
            logits = [first(ctx.task.call(teacher, batch)).float() for teacher in (teachers or (ctx.teacher,))]
            target = logits[0]
            if len(logits) > 1:
                target = (
                    torch.stack([torch.softmax(item / temperature, -1) for item in logits])
                    .mean(0)
                    .clamp_min(1e-12)
                    .log()
                    * temperature
                )
        return soft_cross_entropy(first(output), target, temperature)

    return term


def weighted(terms: Sequence[tuple[float, Term]]) -> Term:
    """The weighted sum of terms; those of weight zero are not computed."""

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        parts = [weight * each(model, batch, output, ctx) for weight, each in terms if weight]
        return torch.stack(parts).sum()

    return term


def fit(
    model: nn.Module,
    ctx: Context,
    training: Schedule,
    term: Term | None = None,
    during: During | None = None,
    text: str = "training",
) -> float:
    """Train `model` in place on the task's training data; return the mean loss over the last epoch's worth of steps.

    Raises `NotFinite` as soon as the loss is NaN or infinite, `TaskError` if there are no training data or nothing to
    train.
    """
    term = training.term() if term is None else term
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TaskError("the model has no trainable parameter")
    if not ctx.task.has("train"):
        raise TaskError(f"task {ctx.task.name} has no 'train' data, which training needs")
    generator = ctx.generator(f"fit:{text}")
    size = training.batch_size or ctx.task.batch_size
    per_epoch = steps_per_epoch(ctx, size)
    total = max(1, round(training.epochs * per_epoch))
    optimizer = _optimizer(parameters, training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, total, training.warmup))
    model.to(ctx.device).train()
    losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        for done, batch in enumerate(ctx.progress.track(_endless(ctx, size, generator, total), text, total)):
            if during is not None:
                during(model, done / total)
            batch = to_device(batch, ctx.device)
            loss = term(model, batch, ctx.task.call(model, batch), ctx)
            if not torch.isfinite(loss):
                raise NotFinite(
                    f"the loss became {float(loss.detach())} at step {done + 1} of {total} of {text}; "
                    f"lower lr (it is {training.lr})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if during is not None:
            during(model, 1.0)
    model.zero_grad(set_to_none=True)
    model.eval()
    return float(torch.stack(losses[-per_epoch:]).mean())


def steps_per_epoch(ctx: Context, size: int) -> int:
    """How many batches of `size` the training data give; an iterable of batches counts as it is."""
    data = ctx.task.train
    from .data import is_map_style

    if is_map_style(data):
        return max(1, -(-len(data) // size))
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in ctx.task.batches("train", size))


def _endless(ctx: Context, size: int, generator: torch.Generator, total: int) -> Any:
    done = 0
    while done < total:
        before = done
        for batch in ctx.task.batches("train", size, generator):
            yield batch
            done += 1
            if done == total:
                return
        if done == before:
            raise TaskError(
                f"task {ctx.task.name}: the 'train' data gave no batch; an iterable must start anew each time"
            )


def _optimizer(parameters: list[nn.Parameter], training: Schedule) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=training.lr, momentum=0.9, nesterov=True, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)


def _rate(done: int, total: int, warmup: float) -> float:
    import math

    start = warmup * total
    if done < start:
        return (done + 1) / (start + 1)
    return 0.5 * (1 + math.cos(math.pi * (done - start) / max(1.0, total - start)))
