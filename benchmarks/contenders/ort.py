"""ONNX Runtime's own quantizer, as its documentation says to use it: pre-processed graph, QDQ, uint8 activations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from ..contender import Material, contender, one_length


class Batches(CalibrationDataReader):
    """The calibration batches, one after the other, as ONNX Runtime asks for them."""

    def __init__(self, batches: list[dict[str, np.ndarray]]):
        self.batches: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def prepared(material: Material) -> Path:
    """The float graph after ONNX Runtime's own shape inference and fusions, which its quantizer wants to see."""
    path = material.folder / "prepared.onnx"
    quant_pre_process(str(material.original.file), str(path), skip_symbolic_shape=True)
    return path


def static(material: Material, method: CalibrationMethod, **extra: Any) -> Path:
    path = material.folder / "model.onnx"
    quantize_static(
        str(prepared(material)),
        str(path),
        Batches(one_length(material.calibration)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
        extra_options=extra,
    )
    return path


@contender("onnxruntime static min-max", package="onnxruntime")
def minmax(material: Material) -> Path:
    """quantize_static: QDQ, int8 weights per channel, uint8 activations, ranges by minimum and maximum."""
    return static(material, CalibrationMethod.MinMax)


@contender("onnxruntime static entropy", package="onnxruntime")
def entropy(material: Material) -> Path:
    """quantize_static: QDQ, int8 weights per channel, uint8 activations, ranges by entropy."""
    return static(material, CalibrationMethod.Entropy)


@contender("onnxruntime static percentile", package="onnxruntime")
def percentile(material: Material) -> Path:
    """quantize_static: QDQ, int8 weights per channel, uint8 activations, ranges by the 99.999th percentile."""
    return static(material, CalibrationMethod.Percentile, CalibPercentile=99.999)


@contender("onnxruntime dynamic", package="onnxruntime")
def dynamic(material: Material) -> Path:
    """quantize_dynamic: int8 weights per channel, activations quantized at run time."""
    path, source = material.folder / "model.onnx", prepared(material)
    model = onnx.load(str(source))
    del model.graph.value_info[:]  # its own shape inference stumbles over the shapes noted there (ONNX Runtime 1.31)
    onnx.save(model, str(source))
    quantize_dynamic(str(source), str(path), per_channel=True, weight_type=QuantType.QInt8)
    return path
