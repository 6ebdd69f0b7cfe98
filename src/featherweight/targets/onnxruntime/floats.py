"""From a torch model to an ONNX graph of plain floats whose weights keep their names."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.core.errors import ArtifactError, OutputError

if TYPE_CHECKING:
    from onnxscript import ir
    from torch import Tensor, nn

    from featherweight.model.graph import Free


def float_graph(model: nn.Module, example: dict[str, Tensor], free: Free, opset: int, keep: set[str]) -> ir.Model:
    """`model` as ONNX operators on floats, optimized; no operation on a parameter is computed ahead, so that its name
    survives.

    The weights in `keep` are left exactly as they are: nothing is folded into them. The model's parameters are not
    trained any more afterwards: where a bias of attention is, torch lays out what it gives in another way than it was
    captured. Raises `ArtifactError` if an operator of the model has no translation.
    """
    import torch

    from featherweight.model.graph import capture

    from .exporter import to_onnx
    from .simplify import simplify

    program = capture(model.requires_grad_(False), example, free)
    parameters = {name for name, _ in model.named_parameters()}
    with quiet():
        try:
            made = to_onnx(program, opset, args=(), kwargs=example, custom_translation_table=_translations())
        except torch.onnx.OnnxExporterError as error:
            raise ArtifactError(f"the model cannot be written as ONNX: {_reason(error)}") from error
        _call_by_first_names(made.graph, model)
        for node in made.graph:
            if node.op_type == "Split" and len(node.inputs) > 1:  # the recorder wants the number, ONNX forbids it
                node.attributes.pop("num_outputs", None)
        with _hidden(made.graph, keep):
            simplify(made, lambda node: _may_fold(node, parameters))
    return made


def save(model: ir.Model, path: Path, largest: int) -> None:
    """Write the model as one file; weights go to a file beside it if together they are larger than `largest` bytes."""
    from onnxscript import ir

    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if total > largest else None)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def _call_by_first_names(graph: ir.Graph, model: nn.Module) -> None:
    """Call a parameter that the model holds under several names by the first, as `named_parameters` does; the recorder
    takes the last.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        wanted = first[id(parameter)]
        if name in graph.initializers and wanted not in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = wanted
            graph.register_initializer(value)


def _may_fold(node: ir.Node, parameters: set[str]) -> bool | None:
    if node.op_type != "Shape" and any(value is not None and value.name in parameters for value in node.inputs):
        return False
    return None  # the optimizer's own rules decide


@contextlib.contextmanager
def _hidden(graph: ir.Graph, names: set[str]) -> Iterator[None]:
    """Let the optimizer see these initializers as inputs of the graph, whose values it cannot use."""
    values = [graph.initializers.pop(name) for name in sorted(names) if name in graph.initializers]
    tensors = [value.const_value for value in values]
    for value in values:
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value, tensor in zip(values, tensors):
            graph.inputs.remove(value)
            value.const_value = tensor
            graph.register_initializer(value)


def _translations() -> dict[Any, Any]:
    """How operators that are not torch's own read in ONNX.

    Dynamic quantization is DynamicQuantizeLinear and back; with a scale for each row of the last dimension, for which
    there is no operator, it is written out. The experts of `transformers` get the rows up to their place in `ends`.
    """
    import numpy as np
    import torch
    from onnxscript import ir, opset18

    import featherweight.model.dispatch
    import featherweight.model.port  # noqa: F401  both register operators

    op: Any = opset18

    def dynamic_quantize(x: Any) -> Any:
        values, scale, zero = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(values, scale, zero)

    def dynamic_quantize_tokens(x: Any) -> Any:
        middle = op.Constant(value=ir.tensor(np.array(128, np.uint8)))
        largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]))
        scale = op.Max(op.Div(largest, op.Constant(value_float=127.0)), op.Constant(value_float=1e-12))
        one = op.Constant(value_float=1.0)
        values = op.QuantizeLinear(op.Div(x, scale), one, middle)
        return op.Mul(op.DequantizeLinear(values, one, middle), scale)

    def grouped_products(given: Any, weight: Any, ends: Any) -> Any:
        starts = op.Concat(op.Constant(value_ints=[0]), op.Cast(ends, to=ir.DataType.INT64), axis=0)
        found = []
        for expert in range(int(weight.shape[0])):
            place, after = (op.Constant(value_ints=[each]) for each in (expert, expert + 1))
            rows = op.Slice(given, op.Gather(starts, place), op.Gather(starts, after), op.Constant(value_ints=[0]))
            found.append(op.MatMul(rows, op.Squeeze(op.Gather(weight, place), op.Constant(value_ints=[0]))))
        return op.Concat(*found, axis=0)

    def split_rows(given: Any, counts: Any) -> Any:
        return op.Split(given, counts, axis=0, num_outputs=int(counts.shape[0]))  # the number is dropped below

    table: dict[Any, Any] = {
        torch.ops.featherweight.split_rows.default: split_rows,
        torch.ops.featherweight.dynamic_quantize.default: dynamic_quantize,
        torch.ops.featherweight.dynamic_quantize_tokens.default: dynamic_quantize_tokens,
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # what the library registers when it is imported
        table[torch.ops.transformers.grouped_mm_fallback.default] = grouped_products
    return table


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the user's terminal; what goes wrong is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(error: BaseException) -> str:
    """The first cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
