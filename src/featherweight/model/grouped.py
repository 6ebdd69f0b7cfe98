"""Keys or values of few heads, each of which several heads of queries share."""

from __future__ import annotations

from torch import Tensor, nn


class GroupedHeads(nn.Module):
    """A linear layer that gives `groups` heads of `width`, each `repeats` times over: [..., in_features] to
    [..., groups * repeats * width], as a linear layer with all heads would. Ainslie et al., arXiv:2305.13245.
    """

    def __init__(self, in_features: int, groups: int, width: int, repeats: int, bias: bool = True):
        super().__init__()
        self.in_features, self.groups, self.width, self.repeats = in_features, groups, width, repeats
        self.heads = nn.Linear(in_features, groups * width, bias=bias)

    @property
    def weight(self) -> Tensor:
        """What surrounds a layer asks for its type and device, never for its values."""
        return next(self.heads.parameters()).detach()  # the parameter itself would seem to be shared by two layers

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.heads, "bias", None)  # factors stand in its place once it is factored

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(x).unflatten(-1, (self.groups, 1, self.width))
        return heads.expand(*heads.shape[:-2], self.repeats, self.width).flatten(-3)
