"""distill.features: layers of the model learn to give what layers of a teacher give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.blocks import real_positions
from ...core.context import Context
from ...core.errors import TaskError
from ...core.fit import Schedule, Term, task_loss, weighted
from ...core.step import Place, Step, Trait
from ...core.task import labels
from .hidden import (
    attention_transfer,
    contrastive,
    cosine_distance,
    hint,
    pooled,
    positions,
    relational,
    resized,
)
from .logits import OutputLoss, output_term
from .pairs import Pair, Watch, find_pairs
from .teachers import Deployed, Recorded, check_outputs, find_teacher, teacher_digests

FeatureLoss = Literal["hint", "attention", "rkd", "crd", "cosine"]


class DistillFeatures(Step, Schedule, kind="distill.features"):
    """Train the model so that its layers give what layers of a teacher give, beside soft targets and the task's loss.

    `loss` "hint" is the squared difference over the teacher's variance (FitNets, arXiv:1412.6550), "attention" that of
    maps of attention (arXiv:1612.03928), "rkd" the distances and angles between the inputs of a batch
    (arXiv:1904.05068), "crd" a contrast with the other inputs of the batch (arXiv:1910.10699; those of the same class
    are no negatives where labels say so), "cosine" the angle between hidden states (DistilBERT, arXiv:1910.01108).
    "hint" and "cosine" project the student linearly where widths differ, "crd" projects both to `embedding` dimensions;
    projections are trained with the student and dropped afterwards. Padding does not count.

    `layers` maps layers of the model to those of the teacher by name, `blocks` by their places in the rows of blocks;
    without both they are matched by shape and order: the last block of each resolution, or each block where there is
    one resolution; "rkd" and "crd" take the last pair. `feature_weight` weighs the mean over the pairs, `weight` the
    soft targets (`soft`, see distill.logits) and the rest of 1 the task's own loss, so that `weight` 0.7 and
    `feature_weight` 0.14 with "cosine" is DistilBERT's recipe of 5 to 2 to 1. `teacher` names another teacher than the
    original: a task or a saved model. Raises `TaskError` for layers that are not there or do not fit.
    """

    needs: ClassVar[Trait] = Trait.TRAINABLE
    paper: ClassVar[str] = "arXiv:1412.6550, arXiv:1612.03928, arXiv:1904.05068, arXiv:1910.10699, arXiv:1910.01108"
    place: ClassVar[Place | None] = None  # on request: which loss suits which layers is the user's to say
    trains: ClassVar[bool] = True

    loss: FeatureLoss = "hint"
    feature_weight: Annotated[float, Field(gt=0)] = 1.0
    layers: dict[str, str] = {}
    blocks: tuple[tuple[int, int], ...] = ()
    embedding: Annotated[int, Field(ge=1)] = 128
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 4.0
    soft: OutputLoss = "auto"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 8.0
    teacher: str = ""

    def full(self) -> dict[str, Any]:
        """Kind and settings, and what the teacher's files hold, so that another teacher is another recipe."""
        digests = teacher_digests([self.teacher] if self.teacher else [])
        return super().full() | ({"folders": digests} if digests else {})

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        teacher = find_teacher(self.teacher, ctx, None) if self.teacher else ctx.teacher
        if isinstance(teacher, Deployed | Recorded):
            raise TaskError(f"{self.kind}: {self.teacher} gives outputs alone; take it in distill.logits")
        if ctx.task.has("train"):
            check_outputs(self.kind, model, [teacher], ctx)
        last, images = self.loss in ("rkd", "crd"), self.loss == "attention"
        pairs = find_pairs(self.kind, model, teacher, ctx, self.layers, self.blocks, last, images)
        heads = self._projections(pairs)
        with (
            Watch(model, [pair.student for pair in pairs]) as mine,
            Watch(teacher, [pair.teacher for pair in pairs]) as theirs,
        ):
            term = self.features_term(pairs, heads, teacher, mine, theirs)
            loss = ctx.fit(Together(model, heads), self, term, text="distilling features")
        matched = "; ".join(f"{pair}{_widths(head)}" for pair, head in zip(pairs, heads))
        ctx.change("*", f"trained for {self.epochs:g} epochs by {self.loss}, last loss {loss:.4g}: {matched}")
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                ctx.leave(name, "frozen (requires_grad is False)")
        return model

    def _projections(self, pairs: Sequence[Pair]) -> nn.ModuleList:
        """For each pair what is trained with the student: nothing, a linear map, or one for each side."""
        made: list[nn.Module] = []
        for mine, theirs in (pair.widths for pair in pairs):
            if self.loss == "crd":
                made.append(nn.ModuleList([nn.Linear(mine, self.embedding), nn.Linear(theirs, self.embedding)]))
            elif self.loss in ("hint", "cosine") and mine != theirs:
                made.append(nn.Linear(mine, theirs))
            else:
                made.append(nn.Identity())
        return nn.ModuleList(made)

    def features_term(
        self, pairs: Sequence[Pair], heads: nn.ModuleList, teacher: nn.Module, mine: Watch, theirs: Watch
    ) -> Term:
        """The loss that is minimised; the teacher runs once on each batch, for its outputs and its features."""
        said = Said()

        def features(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
            real, classes = real_positions(batch), _classes(batch)
            losses = [
                self._of(mine.found[pair.student], theirs.found[pair.teacher], head, real, classes)
                for pair, head in zip(pairs, heads)
            ]
            return torch.stack(losses).mean()

        soft = output_term(self.soft, self.temperature, [said], (), self.alpha, self.beta)
        parts = weighted([(self.feature_weight, features), (self.weight, soft), (1 - self.weight, task_loss)])

        def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
            with torch.no_grad():
                said.output = ctx.task.call(teacher, batch)
            return parts(model, batch, output, ctx)

        return term

    def _of(
        self, student: Tensor, teacher: Tensor, head: nn.Module, real: Tensor | None, classes: Tensor | None
    ) -> Tensor:
        """The loss of one pair of features."""
        student, teacher = resized(student, teacher)
        real = real if real is not None and real.shape == student.shape[:2] else None
        if self.loss == "attention":
            return attention_transfer(student, teacher)
        if self.loss == "rkd":
            return relational(pooled(student, real), pooled(teacher, real))
        if self.loss == "crd":
            return self._contrast(pooled(student, real), pooled(teacher, real), head, classes)
        distance = hint if self.loss == "hint" else cosine_distance
        return distance(head(positions(student, real)), positions(teacher, real))

    def _contrast(self, student: Tensor, teacher: Tensor, heads: nn.Module, classes: Tensor | None) -> Tensor:
        if len(student) < 2:
            raise TaskError(f"{self.kind}: loss 'crd' needs batches of two inputs or more; set batch_size")
        mine, theirs = (nn.functional.normalize(head(each)) for head, each in zip(heads.children(), (student, teacher)))
        known = classes is not None and classes.shape == (len(student),)
        return contrastive(mine, theirs, classes=classes if known else None)


class Said(nn.Module):
    """Gives what a teacher said of the batch at hand, whatever it is called with."""

    output: Any = None

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        return self.output


class Together(nn.Module):
    """A student with its projections, so that they are trained with it; called as the student is, which stays as it
    is: a row of layers would run what is hung on it.
    """

    def __init__(self, student: nn.Module, heads: nn.ModuleList):
        super().__init__()
        self.student, self.heads = student, heads

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.student(*given, **named)


def _classes(batch: Any) -> Tensor | None:
    """The classes of a batch, where its labels are one integer for each input."""
    try:
        found = labels(batch)
    except TaskError:  # no labels: every other input is a negative
        return None
    return found if isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point() else None


def _widths(head: nn.Module) -> str:
    """What a projection does, in words; empty for none."""
    if isinstance(head, nn.Linear):
        return f" ({head.in_features} projected to {head.out_features})"
    return f" (both projected to {head[0].out_features})" if isinstance(head, nn.ModuleList) else ""
