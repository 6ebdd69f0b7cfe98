"""Losses between hidden features of a student and of its teacher: hints, attention, relations, contrast, cosine.

Features are N x D vectors, N x T x D sequences, N x C x H x W images, or volumes with one dimension more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.fit import missed_variance


# -- form ------------------------------------------------------------------------------------------------------------
def channels_last(features: Tensor) -> Tensor:
    """Features with the width as the last dimension: images are turned, vectors and sequences are so already."""
    return features.movedim(1, -1) if features.dim() > 3 else features


def width(features: Tensor) -> int:
    """How wide features are: their channels, or the length of their vectors."""
    return features.shape[1] if features.dim() > 3 else features.shape[-1]


def resized(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Images averaged down to the smaller of both sizes; anything else as it is."""
    if student.dim() < 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:])]
    pool: Any = nn.functional.adaptive_avg_pool2d if student.dim() == 4 else nn.functional.adaptive_avg_pool3d
    return pool(student, size), pool(teacher, size)


def pooled(features: Tensor, real: Tensor | None = None) -> Tensor:
    """One vector for each input, N x D: the mean over positions; `real` (N x T) says which of a sequence count."""
    features = channels_last(features)
    if features.dim() == 2:
        return features
    if features.dim() == 3 and real is not None:
        weight = real[..., None].to(features.dtype)
        return (features * weight).sum(1) / weight.sum(1).clamp_min(1)
    return features.flatten(1, -2).mean(1)


def positions(features: Tensor, real: Tensor | None = None) -> Tensor:
    """The vectors of all positions, M x D; of a sequence only the `real` ones (N x T)."""
    features = channels_last(features)
    return features[real] if features.dim() == 3 and real is not None else features.flatten(0, -2)


# -- losses ----------------------------------------------------------------------------------------------------------
def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNets (Romero et al., arXiv:1412.6550): the mean squared difference of vectors, M x D each.

    It is taken over the variance of the teacher's, so that a weight means the same for features of any scale.
    """
    return missed_variance(student, teacher)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer (Zagoruyko and Komodakis, arXiv:1612.03928): the squared distance of maps of attention.

    A map is the mean square over the width, at each position, with norm one; so widths may differ. Features N x T x D,
    or N x C x H x W (averaged down to the smaller size); the sum is over positions, the mean over N: 0 to 2.
    """
    student, teacher = resized(student, teacher)
    return (_attention(student) - _attention(teacher)).square().sum(1).mean()


def _attention(features: Tensor) -> Tensor:
    return nn.functional.normalize(channels_last(features).float().square().mean(-1).flatten(1), dim=1)


def relational(student: Tensor, teacher: Tensor, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """Relational knowledge distillation (Park et al., arXiv:1904.05068): how inputs of a batch lie to one another.

    Vectors N x D of any two widths. `distance` weighs the Huber loss of all distances, each over their mean, `angle`
    that of the cosines of all angles that three inputs make (the paper weighs them 1 to 2). Time and memory grow with
    N cubed.
    """
    student, teacher = student.float(), teacher.float()
    loss = student.new_zeros(())
    if distance:
        loss = loss + distance * nn.functional.smooth_l1_loss(_distances(student), _distances(teacher))
    if angle:
        loss = loss + angle * nn.functional.smooth_l1_loss(_angles(student), _angles(teacher))
    return loss


def _distances(vectors: Tensor) -> Tensor:
    """Distances of all pairs, N x N, over the mean of those that are not nought."""
    apart = (vectors[:, None] - vectors[None]).square().sum(-1)
    found = apart.clamp_min(1e-12).sqrt() * (apart > 0)  # the root has no gradient at nought
    return found / found[apart > 0].mean() if bool((apart > 0).any()) else found


def _angles(vectors: Tensor) -> Tensor:
    """Cosines of the angles at each input between all pairs of others, N x N x N."""
    towards = nn.functional.normalize(vectors[None] - vectors[:, None], dim=-1)
    return towards @ towards.transpose(1, 2)


def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.07, classes: Tensor | None = None) -> Tensor:
    """Contrastive representation distillation (Tian et al., arXiv:1910.10699), with the other inputs of the batch as
    negatives (no memory bank).

    Tells which of two embeddings, N x D with norm one, are of the same input: the critic is r / (r + m) for m
    negatives, where r is exp(cosine / temperature) over its mean in the batch, which stands for the bank's constant
    and gets no gradient. Pairs of two inputs of one class (`classes`, N) are no negatives. The mean is over N.
    """
    if len(student) < 2:
        raise ValueError("a contrast needs a batch of two inputs or more")
    score = student.float() @ teacher.float().T / temperature
    same = torch.eye(len(score), dtype=torch.bool, device=score.device)
    alike = same if classes is None else classes[:, None] == classes[None]
    count = (~alike).sum(1, keepdim=True).clamp_min(1)
    ratio = score - (torch.logsumexp(score.detach().flatten(), 0) - 2 * torch.log(torch.tensor(float(len(score)))))
    critic = ratio - count.log()  # the logit of r / (r + m)
    found = nn.functional.logsigmoid(critic).diagonal() + nn.functional.logsigmoid(-critic).masked_fill(alike, 0).sum(1)
    return -found.mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of matching vectors, M x D each, averaged: 0 to 2 (DistilBERT, Sanh et al.,
    arXiv:1910.01108)."""
    return 1 - nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
