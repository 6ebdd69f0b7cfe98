"""Layers that quantize their own input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .port import DynamicPort


class PortedLinear(nn.Linear):
    """A linear layer whose input goes through its own port first; weight and bias keep their names."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.port = DynamicPort()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.port(x))

    @classmethod
    def around(cls, layer: nn.Linear) -> PortedLinear:
        """The same layer with a port: it shares the parameters of `layer`, which must not be parametrized."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)
