"""Ports: small modules between layers that quantize activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers torch.ops.quantized_decomposed

UNSIGNED = (0, 255)


class Port(nn.Module):
    """Quantize an activation to 8 bits with a fixed scale and zero point, and back; gradients pass straight through
    inside the range.

    `value = (integer - zero) * scale` with integers from 0 to 255. In evaluation it computes with the operators
    `torch.ops.quantized_decomposed.{quantize,dequantize}_per_tensor`, which exporters know. Jacob et al.,
    arXiv:1712.05877.
    """

    def __init__(self, scale: float = 1.0, zero: int = 0):
        super().__init__()
        self.scale, self.zero = float(scale), int(zero)

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, zero={self.zero}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *UNSIGNED)
        values = torch.ops.quantized_decomposed.quantize_per_tensor(x, self.scale, self.zero, *UNSIGNED, torch.uint8)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(
            values, self.scale, self.zero, *UNSIGNED, torch.uint8
        )


@torch.library.custom_op("featherweight::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor) -> Tensor:
    """Quantize `x` to 8 unsigned bits with the range that it has now (zero included, per tensor), and back to float32.

    The same arithmetic as ONNX's DynamicQuantizeLinear followed by DequantizeLinear.
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


@dynamic_quantize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


dynamic_quantize.register_autograd(lambda ctx, gradient: gradient)


class DynamicPort(nn.Module):
    """Quantize an activation to 8 bits with the range that it has at run time, and back; gradients pass straight
    through.
    """

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_quantize(x)
