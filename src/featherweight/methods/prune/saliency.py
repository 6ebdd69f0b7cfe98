"""How much a connection is worth: pure functions on matrices [rows, columns], one score for each weight.

Removing the connections of lowest score should cost least. What each score estimates is said beside it.
"""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """`|w|` (Han et al., arXiv:1506.02626)."""
    return weight.abs()


def first_order(weight: Tensor, gradient: Tensor) -> Tensor:
    """`(w g)^2`, the squared first-order change of the loss when `w` becomes 0 (Molchanov et al., arXiv:1906.10771)."""
    return (weight * gradient).square()


def brain_damage(weight: Tensor, curvature: Tensor) -> Tensor:
    """`h w^2 / 2`, the second-order change of the loss at a minimum with a diagonal Hessian `h` (LeCun, Denker and
    Solla, Optimal Brain Damage, 1989).
    """
    return curvature * weight.square() / 2


def by_input_norm(weight: Tensor, moment: Tensor) -> Tensor:
    """`|w| ||x||`, with `moment` [columns, columns] the mean of `x x^T` over the rows of inputs (Wanda,
    arXiv:2306.11695); the norm is divided by the root of the number of rows.
    """
    return weight.abs() * moment.diagonal().clamp_min(0).sqrt()


def by_input_size(weight: Tensor, largeness: Tensor) -> Tensor:
    """`|w| E|x|`, with `largeness` [columns] the mean magnitude of each input: what a connection carries on average."""
    return weight.abs() * largeness


def moved(score: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """The score of movement pruning after one more step of training: `s - w dL/dw`.

    `gradient` is that in the weight as the layer sees it, 0 where masked, so that masked weights are judged too. Those
    that training moves away from 0 gain (Sanh et al., arXiv:2005.07683, equation 2 and appendix A.1).
    """
    return score - weight * gradient
