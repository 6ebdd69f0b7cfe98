"""sparse.rigl: sparse training in which connections grow where the gradient of the dense weight is largest."""

from __future__ import annotations

from typing import ClassVar

from .training import SparseTraining


class RigL(SparseTraining, kind="sparse.rigl"):
    """Train at a fixed sparsity, from scratch or from given weights, and grow connections by gradient magnitude.

    The gradient is that of the dense weight, over the batch of the step that ends with an exchange (that step's update
    is made as well, where the paper leaves it out). Grown weights and their momentum begin at zero. Biases, norms,
    embeddings and shared weights stay dense. Raises `TaskError` without training data, `NotFinite` if the loss leaves
    the finite numbers.
    """

    paper: ClassVar[str] = "arXiv:1911.11134"
