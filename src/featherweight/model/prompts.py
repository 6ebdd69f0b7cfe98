"""Trained vectors in front of the tokens of a sequence, for any model that takes token ids.

`Prompted` makes the sequence longer at its start, so that positions, masks and rotary embeddings come out as for a
longer text; what stands there is replaced on the way: by `Prompt` behind the table of embeddings, by `Prefix` behind
the layers that make keys and values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core.adapted import Adapted


class Prompted(Adapted):
    """A model `base` that is given `tokens` more positions at the start of each sequence; it holds no tensors itself.

    `ids` names its input of token ids (N x T integers); `ones` and `zeros` name other inputs of N x T, which are
    continued with ones (masks) and zeros. `cut` says of each tensor that it gives whether it has positions (N x T x
    ...), which lose their start again. `names` are the inputs in the order in which they may be given by position.
    """

    def __init__(
        self,
        tokens: int,
        ids: str,
        ones: Sequence[str] = (),
        zeros: Sequence[str] = (),
        cut: Sequence[bool] = (),
        names: Sequence[str] = (),
    ):
        super().__init__()
        self.tokens, self.ids = tokens, ids
        self.ones, self.zeros, self.cut, self.names = list(ones), list(zeros), list(cut), list(names)
        self.base: nn.Module = nn.Identity()

    @property
    def config(self) -> Any:
        """What a model of transformers says of itself."""
        return self.base.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        output = self.base(**{name: self._longer(name, value) for name, value in inputs.items()})
        leaves, tree = pytree.tree_flatten(output)
        leaves = [leaf[:, self.tokens :] if cut else leaf for leaf, cut in zip(leaves, self.cut)]
        return pytree.tree_unflatten(leaves, tree)

    def _longer(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name not in (self.ids, *self.ones, *self.zeros):
            return value
        start = value.new_zeros(value.shape[0], self.tokens) + int(name in self.ones)
        return torch.cat([start, value], 1)


class Prompt(Adapted):
    """A table of embeddings `base` behind which the first `tokens` positions are trained vectors of `width`.

    Lester et al., arXiv:2104.08691.
    """

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.base: nn.Module = nn.Identity()
        self.prompt = nn.Parameter(torch.zeros(tokens, width))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"

    def forward(self, ids: Tensor) -> Tensor:
        return with_rows(self.base(ids), self.prompt)


class Prefix(Adapted):
    """A linear layer `base` that makes keys or values [N, positions, width], of which the first `tokens` positions are
    trained vectors. Li and Liang, arXiv:2101.00190.
    """

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.base: nn.Module = nn.Identity()
        self.prompt = nn.Parameter(torch.zeros(tokens, width))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"

    def forward(self, x: Tensor) -> Tensor:
        return with_rows(self.base(x), self.prompt)


def with_rows(values: Tensor, rows: Tensor) -> Tensor:
    """`values` [N, positions, width] with `rows` [tokens, width] in place of its first positions."""
    start = rows.to(values.dtype).expand(values.shape[0], -1, -1)
    return torch.cat([start, values[:, rows.shape[0] :]], 1)


def inputs_of(model: nn.Module, example: dict[str, Tensor]) -> list[str]:
    """The names of a model's inputs in the order in which they may be given by position."""
    known = [name for name in inspect.signature(model.forward).parameters if name in example]
    return known + [name for name in example if name not in known]
