"""Losses between the scores of a student and of its teacher: decoupled (DKD) and by correlation (DIST).

Hinton's divergence and the squared difference are `soft_cross_entropy` and `missed_variance` of `core.fit`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., arXiv:2203.08679), times temperature squared.

    Hinton's divergence is that of the true class against all others, plus that among the others weighted by the
    probability that the teacher gives them, so that what a sure teacher knows of them hardly counts. Here they are
    weighted by `alpha` and `beta` instead. `student` and `teacher` are logits, N x classes, `target` the true classes,
    N integers; the mean is over N.
    """
    right_student, others_student = _split(student.float() / temperature, target)
    right_teacher, others_teacher = _split(teacher.float() / temperature, target)
    of_target = _divergence(right_student, right_teacher)
    among_others = _divergence(torch.log_softmax(others_student, -1), torch.log_softmax(others_teacher, -1))
    return (alpha * of_target + beta * among_others) * temperature**2


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the true class and of all others together (N x 2), and the others' logits."""
    others = logits[~nn.functional.one_hot(target, logits.shape[-1]).bool()].view(len(logits), -1)
    right = torch.cat([logits.gather(-1, target[:, None]), torch.logsumexp(others, -1, keepdim=True)], -1)
    return torch.log_softmax(right, -1), others


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two sets of log-probabilities, N x classes; the mean over N."""
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def by_correlation(
    student: Tensor, teacher: Tensor, temperature: float, inter: float = 1.0, intra: float = 1.0
) -> Tensor:
    """DIST (Huang et al., arXiv:2205.10536): one minus Pearson's correlation of class probabilities, times temperature
    squared.

    `inter` weighs the correlation over the classes of each input, `intra` that over the inputs for each class. Scale
    and shift do not count, so a student need not copy how sure a far larger teacher is. Both are logits, N x classes;
    the intra-class part says more the more inputs a batch has.
    """
    mine, theirs = (torch.softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return (inter * _uncorrelated(mine, theirs) + intra * _uncorrelated(mine.T, theirs.T)) * temperature**2


def _uncorrelated(one: Tensor, other: Tensor) -> Tensor:
    """One minus the correlation of matching rows, averaged over the rows."""
    one, other = (rows - rows.mean(-1, keepdim=True) for rows in (one, other))
    return 1 - nn.functional.cosine_similarity(one, other, dim=-1).mean()
