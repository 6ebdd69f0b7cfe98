"""Weights in blocks: what ONNX Runtime really runs, where that pays, and that it agrees."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.encoding import Affine
from featherweight.core.soft import fold
from featherweight.core.target import Artifact, target
from featherweight.model.port import Port
from featherweight.targets.onnxruntime import reading
from featherweight.targets.onnxruntime.blocks import block_size

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from test_forms import Stands, affine

WIDE = 256


def stand(module: nn.Module, encoding: Affine) -> None:
    parametrize.register_parametrization(module, "weight", Stands(encoding))


class Stack(nn.Module):
    """Linear layers with and without a bias, on rows or on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle = nn.Linear(WIDE, 512), nn.Linear(512, WIDE, bias=False)
        self.last = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.up(x)))))


def stack(bits: int, group: int | None, **rest: bool) -> Stack:
    torch.manual_seed(0)
    model = Stack().eval()
    for layer in model.children():
        stand(layer, affine(tuple(layer.weight.shape), bits, group, **rest))
    return model


def export(model: nn.Module, folder: Path, *shape: int, **settings: str) -> Artifact:
    return target("onnxruntime", **settings).export(model, {"x": torch.randn(shape)}, folder / "out")


def run_kinds(artifact: Artifact) -> list[str]:
    """The operators of the graph that ONNX Runtime runs."""
    return [node.op_type for node in reading.optimized(reading.read(artifact.file), artifact.file).node]


def relative(artifact: Artifact, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want = fold(model)(x).numpy()
    difference = artifact.open()(x) - want
    return float(np.sqrt((difference**2).mean() / (want**2).mean()))


@pytest.mark.parametrize("shape", [(2, WIDE), (2, 3, WIDE)], ids=["rows", "sequences"])
@pytest.mark.parametrize(
    ("bits", "group", "rest"),
    [
        (4, 32, {}),
        (4, 128, {"signed": True, "symmetric": True}),
        (4, None, {}),
        (2, 64, {"signed": True}),
        (8, 32, {"half": True}),
        (8, 64, {"signed": True, "symmetric": True}),
        (8, None, {"signed": True, "symmetric": True}),
    ],
)
def test_linear_layers_run_in_the_kernel_for_blocks(
    tmp_path: Path, shape: tuple[int, ...], bits: int, group: int | None, rest: dict[str, bool]
) -> None:
    model = stack(bits, group, **rest)
    artifact = export(model, tmp_path, *shape)
    kinds = run_kinds(artifact)
    assert kinds.count("MatMulNBits") == 3
    assert not {"MatMul", "Gemm", "Add", "Transpose", "Expand", "DequantizeLinear"} & set(kinds)
    evidence = artifact.manifest.evidence
    assert evidence["integer_kernels"] == {"MatMulNBits": 3} and evidence["float_kernels"] == {}
    assert evidence["integer_layers"] == ["last.weight", "middle.weight", "up.weight"]
    entries = 2 * WIDE * 512 + WIDE * WIDE
    steps = 3 if len(shape) == 3 else 1
    assert artifact.manifest.work.integer_macs == artifact.manifest.work.macs == entries * steps
    assert artifact.manifest.work.parameters >= entries
    form = f"{'int' if rest.get('signed') else 'uint'}{bits}"
    assert {artifact.manifest.stored[f"{name}.weight"] for name in ("up", "middle", "last")} == {form}
    assert relative(artifact, model, torch.randn(5, *shape[1:])) < 0.02


def test_scales_lie_as_they_are_given(tmp_path: Path) -> None:
    model = stack(4, 32, half=True, signed=True, symmetric=True)
    artifact = export(model, tmp_path, 2, WIDE)
    entries = 2 * WIDE * 512 + WIDE * WIDE
    biases = 4 * (512 + WIDE)
    assert artifact.manifest.work.weight_bytes <= entries * 4.5 / 8 + biases + 100


def test_groups_of_several_blocks_and_rows_with_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(480, 300), nn.ReLU(), nn.Linear(300, 400)).eval()
    stand(model[0], affine((300, 480), 4, 96))
    stand(model[2], affine((400, 300), 8))
    artifact = target("onnxruntime").export(model, {"input": torch.randn(2, 480)}, tmp_path / "out")
    kernels = [node for node in onnx.load(str(artifact.file)).graph.node if node.op_type == "MatMulNBits"]
    settings = [{each.name: each.i for each in node.attribute} for node in kernels]
    assert [(each["block_size"], each["K"], each["N"]) for each in settings] == [(32, 480, 300), (64, 300, 400)]
    assert relative(artifact, model, torch.randn(3, 480)) < 0.02


def test_block_sizes_are_those_that_were_measured_to_pay() -> None:
    assert [block_size(512, group, 4) for group in (16, 32, 48, 96, 128, 512, 8, None)] == [
        *(16, 32, 16, 32, 128, 256),
        *(None, 256),
    ]
    assert [block_size(512, group, 2) for group in (16, 32, 64, 256)] == [None, 32, 64, 128]
    assert [block_size(512, group, 2, many=True) for group in (16, 32, 64)] == [None, None, 64]
    assert [block_size(length, None, 8) for length in (100, 384, 33, 1000)] == [16, 128, None, 256]


@pytest.mark.parametrize("case", ["small", "float zeros", "2 bits in 16", "2 bits in 32 on sequences", "asked"])
def test_what_the_kernel_would_slow_down_is_floats_when_it_runs(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    size = 64 if case == "small" else WIDE
    encoding = affine(
        (size, size), 2 if "2 bits" in case else 4, 16 if "16" in case else 32, floating=case == "float zeros"
    )
    model = nn.Linear(size, size).eval()
    stand(model, encoding)
    shape = (2, 3, size) if "sequences" in case else (2, size)
    settings = {"products": "float32"} if case == "asked" else {}
    artifact = target("onnxruntime", **settings).export(model, {"input": torch.randn(shape)}, tmp_path / "out")
    kinds = run_kinds(artifact)
    assert len(kinds) <= 2 and set(kinds) <= {"Gemm", "MatMul", "Add"}, "the weight is computed ahead"
    assert artifact.manifest.stored["weight"] == encoding.form
    assert (
        artifact.manifest.work.weight_bytes <= sum(part.nbytes for part in encoding.parts().values()) + 4 * size + 150
    )
    assert relative(artifact, model, torch.randn(4, *shape[1:])) < 1e-5


class Tied(nn.Module):
    """Tokens, their rows, and scores of all tokens by the same weight."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(count, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(tokens), self.embed.weight)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (2, 64), (4, None)])
def test_a_tied_embedding_is_stored_once_and_looked_up_in_blocks(tmp_path: Path, bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    model = Tied(512, WIDE).eval()
    encoding = affine((512, WIDE), bits, group)
    stand(model.embed, encoding)
    tokens = torch.randint(0, 512, (3, 5))
    artifact = target("onnxruntime").export(model, {"tokens": tokens[:2]}, tmp_path / "out")
    kinds = run_kinds(artifact)
    assert kinds.count("MatMulNBits") == 1 and kinds.count("GatherBlockQuantized") == 1 and "Gather" not in kinds
    stored = sum(part.nbytes for part in encoding.parts().values())
    assert artifact.manifest.work.weight_bytes <= 1.02 * stored + 200
    assert artifact.manifest.work.parameters == 512 * WIDE
    assert relative(artifact, model, tokens) < 0.02


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_embedding_is_looked_up_exactly_and_stays_small_in_memory(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(300, 64).eval()
    stand(model, affine((300, 64), bits, 16))
    tokens = torch.randint(0, 300, (3, 5))
    artifact = target("onnxruntime").export(model, {"input": tokens[:2]}, tmp_path / "out")
    assert run_kinds(artifact) == ["GatherBlockQuantized"]
    with torch.no_grad():
        np.testing.assert_allclose(artifact.open()(tokens), fold(model)(tokens), rtol=1e-6, atol=1e-7)


def test_the_form_is_read_off_the_bytes(tmp_path: Path) -> None:
    """A file that says int2 of bytes that are int4 is not believed."""
    artifact = export(stack(4, 32), tmp_path, 2, WIDE)
    model = onnx.load(str(artifact.file))
    for entry in model.metadata_props:
        entry.value = entry.value.replace("uint4", "uint2")
    onnx.save(model, str(tmp_path / "other.onnx"))
    assert artifact.target.stored(tmp_path / "other.onnx")["up.weight"] == "uint8"


def test_any_session_finds_what_is_stored(tmp_path: Path) -> None:
    artifact = export(stack(4, 32), tmp_path, 2, WIDE)
    session = onnxruntime.InferenceSession(str(artifact.file), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["up.weight"] == f"uint4 512x{WIDE}"


def test_quantized_inputs_go_to_the_kernels_for_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Port(0.02, 128), nn.Linear(WIDE, WIDE), Port(0.02, 128)).eval()
    stand(model[1], affine((WIDE, WIDE), 4, signed=True, symmetric=True))
    artifact = target("onnxruntime").export(model, {"input": torch.randn(2, WIDE)}, tmp_path / "out")
    assert "MatMulNBits" not in artifact.manifest.evidence["integer_kernels"]
    assert artifact.manifest.evidence["float_kernels"] == {}
    assert artifact.manifest.stored["1.weight"] == "int4"
