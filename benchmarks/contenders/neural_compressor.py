"""Intel Neural Compressor's ONNX side: the package onnx-neural-compressor (neural-compressor 3 itself has none)."""

from __future__ import annotations

from pathlib import Path

from ..contender import Material, contender, one_length
from ..peers import Peer, write_calibration


def quantized(material: Material, method: str) -> Path:
    peer, out = Peer("neural-compressor", material.peers), material.folder / "model.onnx"
    calibration = write_calibration(material.folder / "calibration.npz", one_length(material.calibration))
    peer.run("quantize_neural_compressor.py", material.original.file, calibration, out, "--method", method)
    return out


@contender("neural-compressor static", package="onnx-neural-compressor")
def static(material: Material) -> Path:
    """StaticQuantConfig: QDQ, int8 weights per channel, uint8 activations, ranges by minimum and maximum."""
    return quantized(material, "static")


@contender("neural-compressor smoothquant", package="onnx-neural-compressor")
def smoothquant(material: Material) -> Path:
    """StaticQuantConfig as above, after SmoothQuant with its default strength."""
    return quantized(material, "smoothquant")


@contender("neural-compressor dynamic", package="onnx-neural-compressor")
def dynamic(material: Material) -> Path:
    """DynamicQuantConfig: int8 weights, activations quantized at run time."""
    return quantized(material, "dynamic")
