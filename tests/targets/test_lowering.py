"""The arithmetic of lowering, and what becomes of quantized models in ONNX."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Dynamic, keep_as, ported
from torch import Tensor, nn

from featherweight.core.soft import fold
from featherweight.core.target import Artifact, target
from featherweight.model.port import Port
from featherweight.targets.onnxruntime.activations import cuts_alike
from featherweight.targets.onnxruntime.biases import integer_bias
from featherweight.targets.onnxruntime.edit import Grid
from featherweight.targets.onnxruntime.weights import varying, weights_in

SCALES = st.floats(1e-6, 10, allow_nan=False)


# -- arithmetic -------------------------------------------------------------------------------------------------------
@given(st.integers(0, 2**32 - 1), SCALES, SCALES)
def test_integer_bias_is_the_bias_within_half_a_unit(seed: int, input_scale: float, weight_scale: float) -> None:
    random = np.random.default_rng(seed)
    bias = random.normal(size=4).astype(np.float32)
    weight = random.integers(-127, 128, (4, 3, 2)).astype(np.int8)
    scales = np.full(4, weight_scale, dtype=np.float32)
    values, moved, scale = integer_bias(bias, weight, scales, input_scale)
    unit = scale.astype(np.float64) * input_scale
    assert values.dtype == np.int32
    assert (np.abs(values * unit - bias) <= unit * 0.5001).all()
    assert (np.abs(moved.astype(np.int64) - weight * (scales / scale).reshape(-1, 1, 1)) <= 0.501).all()


def test_a_channel_whose_bias_does_not_fit_gets_a_larger_scale_and_the_others_stay() -> None:
    bias = np.array([3.0, 0.5], dtype=np.float32)
    weight = np.array([[100, -50], [100, -50]], dtype=np.int8)
    scales = np.array([1e-12, 0.01], dtype=np.float32)
    values, moved, scale = integer_bias(bias, weight, scales, 0.02)
    assert abs(values[0]) == pytest.approx(2**30, rel=1e-6)
    assert scale[0] * 0.02 * values[0] == pytest.approx(3.0, rel=1e-6)
    assert (moved[0] == 0).all()
    assert scale[1] == scales[1]
    assert (moved[1] == weight[1]).all()


@settings(max_examples=200)
@given(SCALES, st.integers(0, 255), st.floats(-5, 5), st.floats(0, 8), st.lists(st.floats(-50, 50), min_size=1))
def test_clipping_is_dropped_only_where_it_changes_no_integer(
    scale: float, zero: int, low: float, width: float, values: list[float]
) -> None:
    found = Grid(np.float32(scale), np.uint8(zero), None)
    if not cuts_alike(low, low + width, found):
        return

    def quantized(entries: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(entries / float(found.scale)) + zero, 0, 255)

    entries = np.array(values)
    assert (quantized(entries) == quantized(np.clip(entries, low, low + width))).all()


@pytest.mark.parametrize(
    ("high", "zero", "alike"),
    [
        (math.inf, np.uint8(0), True),
        (math.inf, np.int8(-128), True),
        (math.inf, np.uint8(3), False),
        (6.0, np.uint8(0), True),
        (5.0, np.uint8(0), False),
    ],
)
def test_relu_and_relu6_are_dropped_where_the_grid_ends_with_them(high: float, zero: np.ndarray, alike: bool) -> None:
    assert cuts_alike(0.0, high, Grid(np.float32(6 / 255), zero, None)) is alike


def test_varying_names_the_dimensions_that_are_not_constant() -> None:
    column = np.broadcast_to(np.arange(3.0)[:, None], (3, 4))
    assert varying(column) == [0]
    assert varying(column.T) == [1]
    assert varying(np.ones((3, 4))) == []
    assert varying(column, np.broadcast_to(np.arange(4), (3, 4))) == [0, 1]


def test_an_initializer_says_which_weights_it_holds() -> None:
    assert weights_in("layer.weight") == ["layer.weight"]
    assert weights_in("a.w:0|b.w:1") == ["a.w", "b.w"]


# -- graphs -----------------------------------------------------------------------------------------------------------
def graph(artifact: Artifact) -> onnx.GraphProto:
    model = onnx.load(str(artifact.file))
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def kinds(artifact: Artifact) -> list[str]:
    return [node.op_type for node in graph(artifact).node]


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("residual") / "out"
    return target("onnxruntime", activations="uint8").export(ported(), {"x": torch.randn(2, 3, 8, 8)}, folder)


def test_a_quantized_network_runs_on_integers_from_end_to_end(residual: Artifact) -> None:
    evidence, work = residual.manifest.evidence, residual.manifest.work
    assert evidence["float_kernels"] == {}
    assert evidence["float_layers"] == []
    assert evidence["integer_layers"] == ["first.weight", "head.weight", "second.weight", "stem.weight"]
    expected = {"QGemm": 1, "QLinearAdd": 1, "QLinearConv": 3, "QLinearGlobalAveragePool": 1}
    assert evidence["integer_kernels"] == expected
    assert work.integer_macs == work.macs


def test_what_only_moves_values_moves_integers(residual: Artifact) -> None:
    nodes = kinds(residual)
    assert nodes.count("Slice") == 1, "two slices are one"
    assert "Relu" not in nodes, "the grid ends at zero by itself"
    assert "ReduceMean" not in nodes
    moved = {node.op_type: node.input[0] for node in graph(residual).node if node.op_type in ("Slice", "Squeeze")}
    made = {node.output[0]: node.op_type for node in graph(residual).node}
    assert made[moved["Slice"]] == "QuantizeLinear"
    assert made[moved["Squeeze"]] == "QuantizeLinear"


def test_biases_are_stored_as_int32(residual: Artifact) -> None:
    stored = residual.manifest.stored
    assert {stored[name] for name in stored if name.endswith("bias")} == {"int32"}
    assert {stored[name] for name in stored if name.endswith("weight")} == {"int8"}


def test_input_channels_are_padded_in_the_graph_and_not_on_the_disk(residual: Artifact) -> None:
    shapes = {tensor.name: list(tensor.dims) for tensor in graph(residual).initializer}
    assert shapes["stem.weight"] == [16, 3, 3, 3]
    assert kinds(residual).count("Pad") == 3  # the shortcut, the input, and the weight, which the runtime pads at once


def test_activations_are_int8_where_that_is_asked(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 3, 8, 8)}
    artifact = target("onnxruntime", activations="int8").export(ported(), example, tmp_path / "out")
    tensors = {tensor.name: tensor.data_type for tensor in graph(artifact).initializer}
    zeros = {tensors[node.input[2]] for node in graph(artifact).node if node.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.INT8}
    assert onnx.TensorProto.UINT8 not in tensors.values()
    assert artifact.manifest.agreement.relative < 0.05


def test_weights_with_a_zero_point_stay_exact_in_floats(tmp_path: Path) -> None:
    artifact = target("onnxruntime").export(ported("uint8"), {"x": torch.randn(2, 3, 8, 8)}, tmp_path / "out")
    assert {artifact.manifest.stored[name] for name in ("stem.weight", "head.weight")} == {"uint8"}
    assert artifact.manifest.agreement.relative < 0.02


def test_one_dynamic_quantization_serves_all_layers_that_read_a_value(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 5, 16)}
    artifact = target("onnxruntime").export(Dynamic().eval(), example, tmp_path / "out")
    nodes = kinds(artifact)
    assert nodes.count("DynamicQuantizeLinear") == 2
    assert nodes.count("MatMulInteger") == 4
    assert "DequantizeLinear" not in nodes
    integer = artifact.manifest.evidence["integer_kernels"]
    assert integer == {"DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 3}
    assert artifact.manifest.work.integer_macs == artifact.manifest.work.macs == 5 * 3 * 16 * 8 + 8 * 4
    assert artifact.manifest.agreement.relative < 1e-5


def test_static_layers_on_sequences_take_their_bias_into_the_kernel(tmp_path: Path) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.port, self.up, self.down = Port(0.02, 128), nn.Linear(8, 16), nn.Linear(16, 4, bias=False)
            self.hidden = Port(0.02, 100)
            keep_as(self.up, "weight")
            keep_as(self.down, "weight", "uint8", axis=None)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.hidden(torch.tanh(self.up(self.port(x)))))

    artifact = target("onnxruntime").export(Sequence().eval(), {"x": torch.randn(2, 5, 8)}, tmp_path / "out")
    assert kinds(artifact).count("MatMulIntegerToFloat") == 2
    assert "Add" not in kinds(artifact)
    assert artifact.manifest.evidence["integer_layers"] == ["down.weight", "up.weight"]
    assert artifact.manifest.work.integer_macs == artifact.manifest.work.macs == 5 * (8 * 16 + 16 * 4)
    assert artifact.manifest.agreement.relative < 1e-5


@pytest.mark.parametrize(("form", "axis"), [("int8", None), ("int8", 0), ("int8", 1), ("uint8", 0)])
def test_rows_of_a_stored_table_become_floats_after_they_are_looked_up(
    tmp_path: Path, form: str, axis: int | None
) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 2)).eval()
    keep_as(model[0], "weight", form, axis)
    artifact = target("onnxruntime").export(model, {"input": torch.randint(0, 50, (3, 4))}, tmp_path / "out")
    tables = {tensor.name for tensor in graph(artifact).initializer if list(tensor.dims)[:1] == [50]}
    readers = {node.op_type for node in graph(artifact).node if tables & set(node.input)}
    assert readers == {"Gather"}
    assert artifact.manifest.agreement.relative < 1e-6


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_weights_are_rearranged_as_integers(tmp_path: Path, layer: type[nn.RNNBase]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer(6, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model = Net().eval()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        keep_as(model.rnn, name)
    artifact = target("onnxruntime").export(model, {"x": torch.randn(2, 5, 6)}, tmp_path / "out")
    held = {tensor.name: tensor.data_type for tensor in graph(artifact).initializer}
    assert held["rnn.weight_ih_l0"] == held["rnn.weight_hh_l0"] == onnx.TensorProto.INT8
    weights = {name for name in held if "rnn." in name}
    readers = {node.op_type for node in graph(artifact).node if set(node.input) & weights}
    assert readers <= {"Cast", layer.__name__}, "no Slice, no Concat: the gates are in ONNX's order on the disk"
    assert artifact.manifest.agreement.relative < 1e-6


def test_parts_of_one_weight_keep_its_name(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.weight.split(3)
            return torch.cat([x @ one.t(), torch.tanh(x) @ other.t()], -1)

    model = Halves().eval()
    keep_as(model, "weight")
    artifact = target("onnxruntime").export(model, {"x": torch.randn(2, 8)}, tmp_path / "out")
    assert artifact.manifest.stored == {"weight": "int8"}
    assert artifact.manifest.work.parameters == 48
    assert artifact.manifest.agreement.relative < 1e-6


def test_a_weight_read_twice_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.embed(ids)) @ self.embed.weight.t()

    model = Tied().eval()
    keep_as(model.embed, "weight", axis=0)
    artifact = target("onnxruntime").export(model, {"ids": torch.randint(0, 40, (2, 3))}, tmp_path / "out")
    assert artifact.manifest.work.parameters == 320
    assert artifact.manifest.work.weight_bytes < 2 * 320
    assert artifact.manifest.agreement.relative < 1e-6


def test_weights_that_meet_floats_are_computed_once_when_loading(tmp_path: Path) -> None:
    from featherweight.targets.onnxruntime.reading import optimized, read

    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    for place in (0, 1, 3):
        keep_as(model[place], "weight", axis=0)
    artifact = target("onnxruntime").export(model, {"input": torch.randn(2, 4, 6, 6)}, tmp_path / "out")
    ran = {node.op_type for node in optimized(read(artifact.file), artifact.file).node}
    assert not ran & {"DequantizeLinear", "Cast", "Mul"}
    assert artifact.manifest.agreement.relative < 1e-6


def test_nothing_but_weights_takes_room(residual: Artifact) -> None:
    parameters = sum(parameter.numel() for parameter in fold(ported()).parameters())
    biases_and_scales = 8 * (16 + 32 + 32 + 5)
    assert residual.bytes() < parameters + biases_and_scales + 4000
    model = onnx.load(str(residual.file))
    assert not model.metadata_props
    assert not model.graph.value_info
    assert not any(node.name or node.doc_string or node.metadata_props for node in model.graph.node)


def test_equal_models_give_equal_files(residual: Artifact, tmp_path: Path) -> None:
    torch.manual_seed(0)
    again = target("onnxruntime", activations="uint8").export(
        ported(), {"x": torch.randn(2, 3, 8, 8)}, tmp_path / "out"
    )
    assert again.manifest.digests == residual.manifest.digests
