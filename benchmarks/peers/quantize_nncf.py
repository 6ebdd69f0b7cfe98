"""Quantize an ONNX file with NNCF, in NNCF's own environment: python quantize_nncf.py IN.onnx CALIBRATION.npz OUT.onnx.

After its documentation: post-training `nncf.quantize` of the ONNX model for a CPU, and `ModelType.TRANSFORMER` for
networks with attention.
"""

from __future__ import annotations

import argparse

import nncf
import onnx
from calibration import inputs_in


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether a softmax goes straight into a product of matrices."""
    weights = {node.output[0] for node in model.graph.node if node.op_type == "Softmax"}
    return any(node.op_type == "MatMul" and node.input[0] in weights for node in model.graph.node)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("out")
    parser.add_argument("--preset", choices=("performance", "mixed"), required=True)
    given = parser.parse_args()
    model = onnx.load(given.source)
    inputs = inputs_in(given.calibration)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(inputs),
        preset=nncf.QuantizationPreset(given.preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER if has_attention(model) else None,
    )
    onnx.save(quantized, given.out)


if __name__ == "__main__":
    main()
