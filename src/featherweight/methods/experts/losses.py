"""Losses that keep a router's choices even and its logits small. Pure functions of logits [n, experts]."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing(logits: Tensor, indices: Tensor) -> Tensor:
    """Experts times the sum over experts of the share of choices and the mean probability: 1 where all is even.

    `indices` [n, k] are the choices; gradients pass through the probabilities. Switch (arXiv:2101.03961, equation 4),
    GShard (arXiv:2006.16668) for k above 1.
    """
    experts = logits.shape[-1]
    probabilities = logits.float().softmax(-1).mean(0)
    chosen = torch.nn.functional.one_hot(indices, experts).float().sum(1).mean(0) / indices.shape[-1]
    return experts * (chosen * probabilities).sum()


def router_z(logits: Tensor) -> Tensor:
    """The mean squared logarithm of the sum of exponentials: keeps logits small (ST-MoE, arXiv:2202.08906)."""
    return logits.float().logsumexp(-1).square().mean()
