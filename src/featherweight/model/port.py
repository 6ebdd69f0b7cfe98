"""Ports: small modules between layers that quantize activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers torch.ops.quantized_decomposed

UNSIGNED = (0, 255)


class Port(nn.Module):
    """Quantize an activation to `bits` (2 to 8) with a fixed scale and zero point, and back; gradients pass straight
    through inside the range.

    `value = (integer - zero) * scale` with integers from 0 to 2**bits - 1. In evaluation it computes with the operators
    `torch.ops.quantized_decomposed.{quantize,dequantize}_per_tensor`, which exporters know. Below 8 bits the integers
    still lie in bytes, so that 8-bit kernels take them, and are cut as integers in between: exporters do not hand on
    where a quantization ends. Jacob et al., arXiv:1712.05877.
    """

    def __init__(self, scale: float = 1.0, zero: int = 0, bits: int = 8):
        super().__init__()
        if not 2 <= int(bits) <= 8:
            raise ValueError(f"bits must be from 2 to 8, not {bits}")
        self.scale, self.zero, self.bits = float(scale), int(zero), int(bits)

    @property
    def top(self) -> int:
        """The highest integer."""
        return 2**self.bits - 1

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, zero={self.zero}, bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, self.top)
        values = torch.ops.quantized_decomposed.quantize_per_tensor(x, self.scale, self.zero, *UNSIGNED, torch.uint8)
        if self.bits < 8:
            values = values.clamp_max(self.top)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(
            values, self.scale, self.zero, *UNSIGNED, torch.uint8
        )


@torch.library.custom_op("featherweight::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor) -> Tensor:
    """Quantize `x` to 8 unsigned bits with the range that it has now (zero included, per tensor), and back to float32.

    The same arithmetic as ONNX's DynamicQuantizeLinear followed by DequantizeLinear.
    """
    if not x.numel():  # such as of an expert that no token is sent to
        return x.clone()
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


@dynamic_quantize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


dynamic_quantize.register_autograd(lambda ctx, gradient: gradient)


@torch.library.custom_op("featherweight::dynamic_quantize_tokens", mutates_args=())
def dynamic_quantize_tokens(x: Tensor) -> Tensor:
    """Quantize `x` to 8 bits with one scale per row of its last dimension, the largest magnitude there over 127, and
    back to float32.

    Symmetric: kernels take a scale per row, but only one zero point for all (arXiv:2206.01861, section 3.2).
    """
    if not x.numel():
        return x.clone()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return torch.round(x / scale) * scale


@dynamic_quantize_tokens.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


dynamic_quantize_tokens.register_autograd(lambda ctx, gradient: gradient)


class DynamicPort(nn.Module):
    """Quantize an activation to 8 bits with the range that it has at run time, or, with `tokens`, with that of each row
    of its last dimension, and back; gradients pass straight through.
    """

    def __init__(self, tokens: bool = False):
        super().__init__()
        self.tokens = tokens

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_quantize_tokens(x) if self.tokens else dynamic_quantize(x)
