"""Layers that quantize their own input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.soft import own_class
from .port import DynamicPort


class PortedLinear(nn.Linear):
    """A linear layer whose input goes through its own port first; weight and bias keep their names. `tokens` is that of
    the port.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        tokens: bool = False,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.port = DynamicPort(tokens)

    @property
    def tokens(self) -> bool:
        return self.port.tokens

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.port(x))


class PortedLSTM(nn.LSTM):
    """A recurrent layer whose input goes through its own port first; weights keep their names, and may stand for
    something stored otherwise.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.port = DynamicPort()

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not parametrize.is_parametrized(self):
            return super().forward(self.port(input), hx)
        kept = self._flat_weights  # the layer's own list holds the parameters under the chains, not their values
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(self.port(input), hx)
        finally:
            self._flat_weights = kept

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves to another device or type; the list that torch makes anew then holds no values of chains, which could
        not be copied.
        """
        super()._apply(fn, recurse)
        if parametrize.is_parametrized(self):
            chains: Any = self.parametrizations
            self._flat_weights = [
                chains[name].original if name in chains else getattr(self, name) for name in self._flat_weights_names
            ]
        return self


def add_lstm_port(layer: nn.LSTM) -> None:
    """Turn `layer` into a `PortedLSTM` in place; a parametrized one keeps its chains."""
    if parametrize.is_parametrized(layer):
        own_class(layer, PortedLSTM)
    else:
        layer.__class__ = PortedLSTM
    layer.port = DynamicPort()


def add_port(layer: nn.Linear, tokens: bool = False) -> None:
    """Turn `layer` into a `PortedLinear` in place; a parametrized one keeps its chains."""
    if parametrize.is_parametrized(layer):
        own_class(layer, PortedLinear)
    else:
        layer.__class__ = PortedLinear
    layer.port = DynamicPort(tokens)
