"""sparse.set: sparse training in which connections grow at random."""

from __future__ import annotations

from typing import ClassVar

from .training import SparseTraining


class SparseEvolutionaryTraining(SparseTraining, kind="sparse.set"):
    """Train at a fixed sparsity, from scratch or from given weights, and grow connections at random.

    The exchanged share falls on a cosine, as in the comparison of arXiv:1911.11134; the paper of the method holds it.
    With `fraction` 0 nothing is exchanged: static random sparsity, the baseline. Biases, norms, embeddings and shared
    weights stay dense. Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    paper: ClassVar[str] = "arXiv:1707.04780"
    random: ClassVar[bool] = True
