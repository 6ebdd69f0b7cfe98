"""Activation-aware scaling of input channels before rounding. AWQ, arXiv:2306.00978."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gptq import loss

Rounded = Callable[[Tensor, Tensor], Tensor]  # (weight, importance of its columns) -> the rounded weight


def channel_scales(largeness: Tensor, share: float) -> Tensor:
    """`largeness ** share` [columns], brought to a geometric mean of extremes of 1, as the paper's code does."""
    scales = largeness.clamp_min(1e-4).pow(share)
    return scales / (scales.max() * scales.min()).sqrt()


def search_scales(
    weights: list[Tensor], largeness: Tensor, hessian: Tensor, rounded: Rounded, steps: int = 20
) -> tuple[Tensor, float]:
    """The scales of input channels with which rounding these matrices [rows, columns] loses least, and the share.

    Each matrix is multiplied by the scales, rounded, and divided by them again; the loss is the squared error of the
    outputs. `largeness` is the mean magnitude of each input channel, and the shares 0, 1/steps, ... below 1 of it are
    tried (equation 5 of the paper); a share of 0 leaves everything as it is.
    """
    best, least, chosen = torch.ones_like(largeness), float("inf"), 0.0
    for step in range(steps):
        share = step / steps
        scales = channel_scales(largeness, share)
        importance = hessian.diagonal() / scales**2
        total = sum(loss(weight, rounded(weight * scales, importance) / scales, hessian) for weight in weights)
        if total < least:
            best, least, chosen = scales, total, share
    return best, chosen
