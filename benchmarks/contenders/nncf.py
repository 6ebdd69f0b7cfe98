"""NNCF on the ONNX model, as its documentation says to use it: post-training quantization for a CPU."""

from __future__ import annotations

from pathlib import Path

from ..contender import Material, contender, singles
from ..peers import Peer, write_calibration


def quantized(material: Material, preset: str) -> Path:
    peer, out = Peer("nncf", material.peers), material.folder / "model.onnx"
    calibration = write_calibration(material.folder / "calibration.npz", singles(material.calibration))
    peer.run("quantize_nncf.py", material.original.file, calibration, out, "--preset", preset)
    return out


@contender("nncf performance", package="nncf")
def performance(material: Material) -> Path:
    """nncf.quantize for CPU, preset performance (symmetric activations); model type transformer with attention."""
    return quantized(material, "performance")


@contender("nncf mixed", package="nncf")
def mixed(material: Material) -> Path:
    """nncf.quantize for CPU, preset mixed (affine activations); model type transformer with attention."""
    return quantized(material, "mixed")
