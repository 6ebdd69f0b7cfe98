"""The one training loop of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .data import is_map_style, to_device
from .errors import NotFinite, TaskError
from .metric import same_class
from .outputs import first
from .step import Between

if TYPE_CHECKING:
    from .context import Context

Term = Callable[[nn.Module, Any, Any, "Context"], Tensor]  # (model, batch, output, ctx) -> loss
During = Callable[[nn.Module, float], None]  # (model, t in [0, 1]) -> None, called before every optimizer step
After = Callable[[torch.optim.Optimizer, float], None]  # (optimizer, t in (0, 1]) -> None, after each of its steps
Groups = Sequence[dict[str, Any]]  # as torch.optim takes them: {"params": [...], "lr": ..., "weight_decay": ...}


class Schedule(BaseModel):
    """How long and how fast a model is trained: cosine schedule with linear warm-up, gradient clipping.

    With `precision` "bfloat16" matrix products and convolutions are computed in it, the model's and its teachers';
    weights, their gradients and the loss stay in float32 (mixed precision, arXiv:1905.12322).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: Annotated[float, Field(gt=0), Between(0.25, 4, log=True)] = 1.0
    lr: Annotated[float, Field(gt=0), Between(1e-4, 3e-2, log=True)] = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    batch_size: Annotated[int, Field(gt=0)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] = 5.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def term(self) -> Term:
        """The loss that is minimised when the caller brings none: the task's own."""
        return task_loss


class Training(Schedule):
    """How a model is trained: its schedule, and optionally a teacher's soft targets.

    `teacher` is the weight of the original model's outputs in the loss (the task's own loss gets the rest): softened by
    `temperature` where they are classes, as they are where not (see `towards`).
    """

    teacher: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0

    def term(self) -> Term:
        """The task's loss and the soft targets, by their weights."""
        return weighted([(1 - self.teacher, task_loss), (self.teacher, towards(self.temperature))])


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


def ensemble_logits(logits: Sequence[Tensor], temperature: float, weights: Sequence[float] = ()) -> Tensor:
    """The logits, N x ... x classes, whose softened probabilities are the mean of those of `logits`, by `weights`."""
    if len(logits) == 1:
        return logits[0].float()
    soft = torch.stack([torch.softmax(each.float() / temperature, -1) for each in logits])
    return mean_outputs(list(soft), weights).clamp_min(1e-12).log() * temperature


def mean_outputs(outputs: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """The mean of tensors of one shape, by `weights` (any positive scale; equal ones if there are none)."""
    if not weights:
        return torch.stack([each.float() for each in outputs]).mean(0)
    shares = torch.tensor(weights, device=outputs[0].device) / sum(weights)
    return torch.einsum("t,t...->...", shares, torch.stack([each.float() for each in outputs]))


@torch.no_grad()
def answers(teachers: Sequence[nn.Module], batch: Any, ctx: Context) -> list[Tensor]:
    """The first output of each teacher on a batch; the original's where there are none."""
    return [first(ctx.task.call(teacher, batch)).float() for teacher in (teachers or (ctx.teacher,))]


def soft_targets(temperature: float, teachers: Sequence[nn.Module] = (), weights: Sequence[float] = ()) -> Term:
    """A term that pulls the student's softened classes to the teacher's (or to the mean of an ensemble's
    probabilities, by `weights`). It raises `TaskError` where there are not several: the divergence of one from one is
    always nought.
    """

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        check_several(output, ctx)
        target = ensemble_logits(answers(teachers, batch, ctx), temperature, weights)
        return soft_cross_entropy(first(output), target, temperature)

    return term


def check_several(output: Any, ctx: Context) -> None:
    """Raise `TaskError` where the first output is no scores of several classes."""
    if not _several(first(output)):
        raise TaskError(
            f"task {ctx.task.name}: outputs of shape {tuple(first(output).shape)} are no scores of several "
            "classes; match the outputs themselves instead (loss 'mse' of distill.logits)"
        )


def missed_variance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the variance of `teacher`: 0 for equal outputs, 1 for a constant at the mean.

    Regression on a teacher's outputs: Ba and Caruana, arXiv:1312.6184; the scale makes a weight mean the same anywhere.
    """
    return nn.functional.mse_loss(student.float(), teacher.float()) / teacher.float().var(correction=0).clamp_min(1e-12)


def matched_outputs(teachers: Sequence[nn.Module] = (), weights: Sequence[float] = ()) -> Term:
    """A term that pulls the student's first output to the teacher's (or to the mean of several teachers', by
    `weights`).
    """

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        return missed_variance(first(output), mean_outputs(answers(teachers, batch, ctx), weights))

    return term


def are_classes(output: Any, ctx: Context) -> bool:
    """Whether a model's first output is scores of classes: the task's metric agrees by class, and there are several."""
    return ctx.task.metric.agree is same_class and _several(first(output))


def _several(scores: Tensor) -> bool:
    return scores.dim() > 1 and scores.shape[-1] > 1


def towards(
    temperature: float,
    teachers: Sequence[nn.Module] = (),
    loss: Literal["auto", "kl", "mse"] = "auto",
    weights: Sequence[float] = (),
) -> Term:
    """The term that pulls the student to its teachers: "kl" by `soft_targets`, "mse" by `matched_outputs`, "auto" by
    the first where the outputs are classes, else by the second.
    """
    soft, matched = soft_targets(temperature, teachers, weights), matched_outputs(teachers, weights)

    def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
        by_class = loss == "kl" or (loss == "auto" and are_classes(output, ctx))
        return (soft if by_class else matched)(model, batch, output, ctx)

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
    groups: Groups | None = None,
    after: After | None = None,
) -> float:
    """Train `model` in place on the task's training data; return the mean loss over the last epoch's worth of steps.

    A last batch of one input behind larger ones is left out, and said: batch norm cannot be trained on it, and one
    input would weigh as much as a whole batch. The order is drawn anew each epoch, so it is another input each time.
    `groups` gives some parameters a rate or a weight decay of their own; those in no group are trained as `training`
    says. `after` may change weights and what the optimizer remembers of them; gradients are still there.
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
    optimizer = _optimizer(grouped(parameters, groups or ()), training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate(done, total, training.warmup))
    model.to(ctx.device).train()
    losses: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        for done, batch in enumerate(ctx.progress.track(_endless(ctx, size, generator, total, text), text, total)):
            if during is not None:
                during(model, done / total)
            batch = to_device(batch, ctx.device)
            loss = _loss(model, batch, ctx, training, term)
            if not torch.isfinite(loss):
                raise NotFinite(
                    f"the loss became {float(loss.detach())} at step {done + 1} of {total} of {text}; "
                    f"lower lr (it is {training.lr})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
            if after is not None:
                after(optimizer, (done + 1) / total)
            schedule.step()
            losses.append(loss.detach())
        if during is not None:
            during(model, 1.0)
    model.zero_grad(set_to_none=True)
    model.eval()
    return float(torch.stack(losses[-per_epoch:]).mean())


def _loss(model: nn.Module, batch: Any, ctx: Context, training: Schedule, term: Term) -> Tensor:
    """The loss on a batch; what a model in mixed precision gives is widened before anything is computed of it."""
    if training.precision == "float32":
        return term(model, batch, _output(model, batch, ctx), ctx)
    with torch.autocast(ctx.device.type, torch.bfloat16):
        return term(model, batch, tree_map_only(Tensor, _widened, _output(model, batch, ctx)), ctx)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _output(model: nn.Module, batch: Any, ctx: Context) -> Any:
    try:
        return ctx.task.call(model, batch)
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise TaskError(
            f"task {ctx.task.name}: batch norm cannot be trained on a batch of one input; "
            "set batch_size to 2 or more, or give larger batches"
        ) from error


def steps_per_epoch(ctx: Context, size: int) -> int:
    """How many batches of `size` the training data give, without a last one of one input; an iterable of batches counts
    as it is.
    """
    data = ctx.task.train
    if is_map_style(data):
        full, rest = divmod(len(data), size)
        return max(1, full + (rest > 1))
    return len(data) if hasattr(data, "__len__") else sum(1 for _ in ctx.task.batches("train", size))


def training_inputs(ctx: Context) -> int:
    """How many inputs an epoch of the training data has; raises `TaskError` if there are none."""
    if ctx.task.has("train") and is_map_style(ctx.task.train):
        return len(ctx.task.train)
    return sum(ctx.task.count(batch) for batch in ctx.task.batches("train"))


def _endless(ctx: Context, size: int, generator: torch.Generator, total: int, text: str) -> Iterator[Any]:
    """`total` batches of the training data, from the start again and again, without batches of one input behind larger
    ones.
    """
    done, largest = 0, 0
    alone = f"{text}: a last batch of one input was left out of each epoch; another batch_size would use it"
    while done < total:
        before = done
        for batch in ctx.task.batches("train", size, generator):
            largest = max(largest, count := ctx.task.count(batch))
            if count == 1 < largest:
                if alone not in ctx.record.warnings:
                    ctx.warn(alone)
                continue
            yield batch
            done += 1
            if done == total:
                return
        if done == before:
            raise TaskError(
                f"task {ctx.task.name}: the 'train' data gave no batch; an iterable must start anew each time"
            )


def grouped(parameters: list[nn.Parameter], groups: Groups) -> list[dict[str, Any]]:
    """Groups for the optimizer: first the parameters that no group names, then of each group those that are trained."""
    trained = {id(parameter) for parameter in parameters}
    own = [{**group, "params": [each for each in group["params"] if id(each) in trained]} for group in groups]
    named = {id(each) for group in own for each in group["params"]}
    return [{"params": [each for each in parameters if id(each) not in named]}, *own]


def _optimizer(parameters: list[dict[str, Any]], training: Schedule) -> torch.optim.Optimizer:
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
