"""The target `onnxruntime`: ONNX files with integers inside, run by ONNX Runtime."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from featherweight.core.errors import ArtifactError, MissingExtra
from featherweight.core.target import PACKED, Session, Target, Work

from .slots import OpenFile

if TYPE_CHECKING:  # not at run time: a process that only runs an artifact is weighed, and torch is not part of it
    from torch import Tensor, nn

    from featherweight.core.encoding import Encoding

LARGEST_MESSAGE = 2**31 - 2**20  # a protobuf message ends below 2 GiB; larger weights lie in a file beside it


class OnnxRuntime(Target, name="onnxruntime"):
    """Write an ONNX file (QDQ: integers with DequantizeLinear) and run it with ONNX Runtime.

    `activations` is the form of 8-bit activations: "auto" takes what the kernels of this processor are made for (uint8
    on x86, else int8). `products` is what linear layers with weights of 8, 4 or 2 bits and float inputs compute on:
    "int8" brings the inputs to 8 bits block by block where that is faster than floats (MatMulNBits; about 0.5% off),
    "float32" turns all weights into floats when the file is loaded. `opset` is the version of the operators; `device`
    where the file is run.
    """

    file: ClassVar[str] = "model.onnx"
    carries: ClassVar[frozenset[str]] = frozenset({"int8", "uint8", PACKED})
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx", "onnxscript")
    # Measured with AVX-512 (3 x 3 convolutions, 8 to 64 channels): floats go in blocks of 16 channels, so that 20 cost
    # as much as 32; in int8, 8 cost more than 16, and depthwise 24 more than 32.
    width_multiple: ClassVar[int] = 16

    activations: Literal["auto", "uint8", "int8"] = "auto"
    products: Literal["int8", "float32"] = "int8"
    opset: Annotated[int, Field(ge=21, le=22)] = 21
    device: Literal["cpu", "cuda"] = "cpu"

    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        from featherweight.core.adapted import slots_of

        from .floats import float_graph, save
        from .lower import lower
        from .slots import open_slots

        slots = {name: shape for name, shape in slots_of(plain).items() if name not in stored}
        model = float_graph(plain, example, free, self.opset, {*stored, *slots})
        open_slots(model, slots)
        parameters = {name for name, _ in plain.named_parameters()} - set(slots)
        lower(model, stored, parameters, self._signed(), self.products == "int8", self.opset)
        save(model, path, LARGEST_MESSAGE)

    def load(self, path: Path, threads: int = 1) -> Session:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if threads > 1:  # spinning threads take the processor from each other on a busy machine
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = self._providers(onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime's errors share no base class
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"ONNX Runtime cannot load {path}: {reason}; export it again") from error
        return OpenFile(session)

    def slots(self, path: Path) -> dict[str, list[int]]:
        from .reading import read
        from .slots import read_slots

        return read_slots(read(path))

    def stored(self, path: Path) -> dict[str, str]:
        from .reading import read, stored_forms

        return stored_forms(read(path))

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        from . import reading

        model = reading.named(reading.read(path))
        found = reading.products(model, reading.run_shapes(model, path, example))
        integer = reading.integer_products(found, reading.optimized(model, path))
        return Work(
            parameters=reading.parameters(model),
            macs=sum(product.macs for product in found),
            integer_macs=sum(product.macs for product in found if product.name in integer),
            weight_bytes=reading.weight_bytes(model),
            activation_bytes=reading.result_bytes(model, path, example),
        )

    def evidence(self, path: Path) -> dict[str, Any]:
        from . import reading

        model = reading.named(reading.read(path))
        graph = reading.optimized(model, path)
        integer, floats = reading.kernels(graph)
        found = reading.products(model)
        names = reading.integer_products(found, graph)
        computed = sorted({name for product in found if product.name in names for name in product.weights})
        rest = sorted({name for product in found if product.name not in names for name in product.weights})
        return {"integer_kernels": integer, "float_kernels": floats, "integer_layers": computed, "float_layers": rest}

    def _signed(self) -> bool:
        if self.activations == "auto":
            return platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86")
        return self.activations == "int8"

    def _providers(self, available: list[str]) -> list[str]:
        if self.device == "cpu":
            return ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" not in available:
            raise MissingExtra("this ONNX Runtime has no CUDA; run: pip install onnxruntime-gpu, or use device=cpu")
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
