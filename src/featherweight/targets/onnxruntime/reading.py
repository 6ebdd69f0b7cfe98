"""What an ONNX file holds and computes, and how ONNX Runtime runs it: read off the file and off the graph that the
runtime makes of it.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.core.errors import ArtifactError
from featherweight.core.storage import Packed

from .edit import MADE
from .weights import weights_in

if TYPE_CHECKING:
    import onnx

PRODUCTS = frozenset(
    {
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "LSTM",
        "DynamicQuantizeLSTM",
        "GRU",
        "RNN",
    }
)
RECURRENT = ("LSTM", "DynamicQuantizeLSTM", "GRU", "RNN")
BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})  # their third operand is a bias
FLOAT_KERNELS = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "LSTM",
        "GRU",
        "RNN",
        "Attention",
        "MultiHeadAttention",
    }
)
NODE, BLOCKS = "node", "MatMulNBits"
INTEGER_MARKS = (
    "QLinear",
    "QGemm",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QAttention",
)


def read(path: Path, data: bool = False) -> onnx.ModelProto:
    """The model in the file, without its external data unless asked; raises `ArtifactError` if it cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=data)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged and cannot be read as ONNX ({' '.join(str(error).split())[:100]}); export it again"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise ArtifactError(f"{path} holds no ONNX graph; export it again")
    return model


def numpy_name(kind: int) -> str:
    """The name of an ONNX tensor type as numpy has it: "float32", "int8", "int4"."""
    import onnx

    name = onnx.TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def stored_forms(model: onnx.ModelProto) -> dict[str, str]:
    """Type of every stored weight, by its name in the torch model."""
    found = {}
    notes = packed(model)
    for tensor in model.graph.initializer:
        if not tensor.name.startswith(MADE):
            note = notes.get(tensor.name)
            for name in weights_in(tensor.name):
                found[name] = numpy_name(tensor.data_type) if note is None else note.form
    return dict(sorted(found.items()))


def packed(model: onnx.ModelProto) -> dict[str, Packed]:
    """The packed weights of the model, by the names of their initializers, where the bytes bear out what is noted."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    found = {
        tensor.name: Packed.read(notes[tensor.name], stored_bytes(tensor))
        for tensor in model.graph.initializer
        if tensor.name in notes
    }
    return {name: note for name, note in found.items() if note is not None}


def parameters(model: onnx.ModelProto) -> int:
    """Number of entries of all weights, each counted once."""
    notes = packed(model)
    return sum(
        notes[tensor.name].entries if tensor.name in notes else math.prod(tensor.dims)
        for tensor in model.graph.initializer
        if not tensor.name.startswith(MADE)
    )


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of everything that is stored beside the graph: weights, scales, zero points, tables."""
    return sum(map(stored_bytes, model.graph.initializer))


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of one initializer."""
    import onnx

    kind = tensor.data_type
    half = kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    width = 4 if half else 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
    return (math.prod(tensor.dims) * width + 7) // 8


# -- products ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """One operation that multiplies and accumulates: its name, the weights that it reads, and how much it does."""

    name: str
    weights: tuple[str, ...]
    macs: int


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name for every node, so that it can be found again in what the runtime makes of it."""
    for place, node in enumerate(model.graph.node):
        node.name = f"{NODE}{place}"
    return model


def products(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Product]:
    """Every product of the graph; with its multiply-accumulates if the `shapes` of a run are given."""
    weights = _origins(model)
    found = []
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            operands = node.input[:2] if node.op_type in BIASED else node.input[:3]
            names = dict.fromkeys(name for value in operands for name in weights.get(value, ()))
            found.append(Product(node.name, tuple(names), 0 if shapes is None else macs(node, shapes)))
    return found


def macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of one operation: each output entry of a product costs the length of the sum behind it."""
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type in ("Conv", "ConvInteger"):
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type in RECURRENT:
        return first[0] * first[1] * (math.prod(second) + math.prod(shapes[node.input[2]]))
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])


def _origins(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """For every value that follows from constants alone: the weights that it is made of."""
    found = {
        tensor.name: tuple(weights_in(tensor.name)) if not tensor.name.startswith(MADE) else ()
        for tensor in model.graph.initializer
    }
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in found for name in node.input if name)):
            names = tuple(dict.fromkeys(weight for name in node.input if name for weight in found[name]))
            found.update(dict.fromkeys(node.output, names))
    return found


def run_shapes(model: onnx.ModelProto, path: Path, example: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of all operands of products, seen in a run of one input (the first, where the first dimension is free)."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    asked = {
        name
        for node in model.graph.node
        if node.op_type in PRODUCTS
        for name in (*node.input[:3], node.output[0])
        if name
    }
    with _written(model, path) as file:
        results = _results(file, asked - set(shapes), example, fold=True)
    return shapes | {name: result.shape for name, result in results.items()}


def result_bytes(model: onnx.ModelProto, path: Path, example: dict[str, np.ndarray]) -> int:
    """Bytes of all that the operations give in one run of one input, each result once, in the graph that the runtime
    makes of it.
    """
    with _optimized(model, path) as file:
        graph = read(file).graph
        inputs = {value.name for value in graph.input}
        made = {name for node in graph.node for name in node.output if name} - inputs
        return sum(result.nbytes for name, result in _results(file, made, example).items() if name in made)


def _results(file: Path, asked: set[str], example: dict[str, np.ndarray], fold: bool = False) -> dict[str, np.ndarray]:
    """What the values in `asked` are in a run of one input; inputs of the graph are given as well.

    `fold` computes ahead what follows from constants: MatMulNBits gives zeros where its scales are computed when it
    runs.
    """
    import onnx

    model = read(file)
    given = {
        value.name: example[value.name][:1] if _free(value) else example[value.name]
        for value in model.graph.input
        if value.name in example  # tensors of adapters have defaults
    }
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(asked - present - set(given)))
    names = [value.name for value in model.graph.output]
    with _written(model, file) as wider:
        session = _session(wider, fold=fold)
        return dict(zip(names, session.run(names, given))) | given


def _free(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return bool(dims) and not dims[0].HasField("dim_value")


@contextlib.contextmanager
def _written(model: onnx.ModelProto, path: Path) -> Iterator[Path]:
    """A changed copy of the graph in `path`, as a file beside it, so that external data are found."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        yield Path(file.name)


def _session(file: Path, optimized: Path | None = None, fold: bool = False) -> Any:
    """A session that runs the graph as it is, or one that writes to `optimized` what ONNX Runtime makes of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if optimized is None:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC if fold else levels.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


# -- what the runtime makes of it --------------------------------------------------------------------------------------
@contextlib.contextmanager
def _optimized(model: onnx.ModelProto, path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _written(model, path) as file:
        result = Path(folder) / "optimized.onnx"
        _session(file, result)
        yield result


def optimized(model: onnx.ModelProto, path: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs on this processor for `model`, whose external data lie beside `path`; weights
    are left out.
    """
    with _optimized(model, path) as file:
        return read(file).graph


def is_integer_kernel(node: onnx.NodeProto) -> bool:
    """Whether an operator computes on integers; MatMulNBits does where its accuracy level is 4."""
    if node.op_type.startswith(BLOCKS):
        return any(attribute.name == "accuracy_level" and attribute.i == 4 for attribute in node.attribute)
    return node.op_type.startswith(INTEGER_MARKS)


def kernels(graph: onnx.GraphProto) -> tuple[dict[str, int], dict[str, int]]:
    """How many integer kernels of each kind there are, and how many products in floats."""
    integer = Counter(node.op_type for node in graph.node if is_integer_kernel(node))
    floats = Counter(
        node.op_type
        for node in graph.node
        if not is_integer_kernel(node) and (node.op_type in FLOAT_KERNELS or node.op_type.startswith(BLOCKS))
    )
    return dict(sorted(integer.items())), dict(sorted(floats.items()))


def integer_products(found: list[Product], graph: onnx.GraphProto) -> set[str]:
    """Names of those products that integer kernels compute: kernels whose name begins with the node's, or that read its
    weight as stored.
    """
    kernels = [node for node in graph.node if is_integer_kernel(node)]
    names = {match.group() for node in kernels if (match := re.match(NODE + r"\d+", node.name))}
    read = {name for node in kernels for value in node.input if value for name in weights_in(value)}
    return {product.name for product in found if product.name in names or set(product.weights) & read}
