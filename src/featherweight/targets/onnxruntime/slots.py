"""Tensors of adapters as inputs with defaults, so that one loaded base runs with any adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    from onnxscript import ir

    from featherweight.core.adapter import Slots
    from featherweight.core.target import Artifact

MOST = 2**31 - 1  # ONNX Runtime's adapter files hold versions as integers of 32 bits


def open_slots(model: ir.Model, slots: Slots) -> None:
    """Make the initializers of these names inputs with defaults; where a shape says -1 any size is taken.

    What is computed on the way from one tensor with a free size to the one that sums over it is written without shapes.
    """
    from onnxscript import ir

    inside: set[ir.Value] = set()
    summing: set[ir.Value] = set()
    for name, shape in slots.items():
        value = model.graph.initializers[name]
        model.graph.inputs.append(value)
        value.shape = ir.Shape([size if size >= 0 else f"{name}.size" for size in shape])
        if -1 in shape:
            (summing if shape.index(-1) else inside).add(value)
    for node in model.graph:
        read = {value for value in node.inputs if value is not None}
        if not read & (inside | summing):
            continue
        group = summing if node.op_type == "Transpose" and read <= summing else inside
        if group is inside and read & summing:
            continue  # the product that sums over the free size
        for output in node.outputs:
            output.shape = None
            group.add(output)


def read_slots(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The inputs of a file that have defaults: their shapes, with -1 where any size is taken."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    found = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input if value.name in defaults}
    return {
        name: [each.dim_value if each.HasField("dim_value") else -1 for each in dims] for name, dims in found.items()
    }


class OpenFile:
    """A loaded ONNX file, called with arrays by name; `use` exchanges the adapter that it runs with."""

    def __init__(self, session: Any):
        self.session = session
        self.names = {value.name for value in session.get_inputs()}
        self.adapter: dict[str, np.ndarray] = {}

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        given = {name: array for name, array in inputs.items() if name in self.names}
        return self.session.run(None, {**given, **self.adapter})

    def use(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Run with these tensors in the slots from now on."""
        self.adapter = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def native(adapter: str | Path, artifact: Artifact, path: str | Path) -> None:
    """Write the adapter in a file as ONNX Runtime's own, which programs in any language load beside the artifact
    (`LoraAdapter`, `RunOptions.add_active_adapter`).

    Its model version is the first 31 bits of the digest of the base: that format has no room for the whole. Raises
    `ArtifactError` if the adapter does not fit the artifact.
    """
    import onnxruntime

    from featherweight.core.target import tensors_for

    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    tensors = tensors_for(artifact.manifest, adapter)
    file.set_model_version(int(artifact.manifest.base[:8], 16) & MOST)
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(each) for name, each in tensors.items()})
    file.export_adapter(str(path))
