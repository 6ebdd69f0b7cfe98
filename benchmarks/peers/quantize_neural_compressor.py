"""Quantize an ONNX file with Neural Compressor: python quantize_neural_compressor.py IN.onnx CALIBRATION.npz OUT.onnx.

The ONNX side of Intel Neural Compressor 2 moved to the package onnx-neural-compressor; version 3 of neural-compressor
has none. After its documentation: `quantize` with `StaticQuantConfig` or `DynamicQuantConfig` and a reader of data.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from calibration import inputs_in
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import QuantFormat, config, quantize


class Reader(data_reader.CalibrationDataReader):
    """The calibration batches, one after the other, from the start again after `rewind`."""

    def __init__(self, batches: list[dict[str, np.ndarray]]):
        self.batches = batches
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def rewind(self) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = iter(self.batches)


def named(path: str, out: Path) -> str:
    """A copy with a name on every node: the package tells nodes apart by name, and takes all without one for one."""
    model = onnx.load(path)
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{place}"
    onnx.save(model, out)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("calibration")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("static", "smoothquant", "dynamic"), required=True)
    given = parser.parse_args()
    if given.method == "dynamic":
        settings = config.DynamicQuantConfig()
    else:
        batches = inputs_in(given.calibration)
        extra = {"SmoothQuant": True, "SmoothQuantCalibIter": len(batches)} if given.method == "smoothquant" else {}
        settings = config.StaticQuantConfig(
            Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            calibration_sampling_size=len(batches),
            extra_options=extra,
        )
    source = named(given.source, Path(given.out).with_name("named.onnx"))
    quantize(source, given.out, settings)
    onnx.save(onnx.load(given.out), given.out)  # it puts the weights into a file of their own: all in one again


if __name__ == "__main__":
    main()
