"""The target onnxruntime as a whole: files, sessions, settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_models import keep_as
from torch import nn

from featherweight.core.errors import MissingExtra, RecipeError
from featherweight.core.target import Artifact, target
from featherweight.targets import onnxruntime as module

EXAMPLE = {"input": torch.randn(3, 6)}


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2)).eval()
    keep_as(model[2], "weight")
    return model


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return target("onnxruntime").export(small(), EXAMPLE, tmp_path / "out")


def test_weights_too_large_for_one_message_lie_beside_the_file(
    monkeypatch: pytest.MonkeyPatch, artifact: Artifact, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "LARGEST_MESSAGE", 200)
    split = target("onnxruntime").export(small(), EXAMPLE, tmp_path / "split")
    assert set(split.manifest.digests) == {"model.onnx", "model.onnx.data", "example.npz"}
    data = (split.folder / "model.onnx.data").stat().st_size
    assert split.bytes() == split.file.stat().st_size + data
    assert data >= 4 * 6 * 40
    assert split.manifest.stored == artifact.manifest.stored
    assert split.manifest.work == artifact.manifest.work
    np.testing.assert_array_equal(split.open()(EXAMPLE["input"]), artifact.open()(EXAMPLE["input"]))
    moved = split.folder.rename(tmp_path / "moved")
    Artifact(moved).open()


def test_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    target("onnxruntime").export(small(), EXAMPLE, tmp_path / "out").open()(EXAMPLE["input"])
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_it_runs_where_torch_is_not_loaded(artifact: Artifact) -> None:
    code = (
        "import sys, numpy\n"
        "from featherweight.targets.onnxruntime import OnnxRuntime\n"
        "from pathlib import Path\n"
        f"run = OnnxRuntime().load(Path({str(artifact.file)!r}))\n"
        "print(run(input=numpy.zeros((1, 6), numpy.float32))[0].shape, 'torch' in sys.modules, 'onnx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 2) False False"


def test_activations_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, signed in (("x86_64", False), ("AMD64", False), ("aarch64", True), ("arm64", True)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert module.OnnxRuntime()._signed() is signed
        assert module.OnnxRuntime(activations="int8")._signed()
        assert not module.OnnxRuntime(activations="uint8")._signed()


def test_cuda_that_is_not_there_is_one_clear_line(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingExtra, match=r"no CUDA; .*device=cpu"):
        target("onnxruntime", device="cuda").load(artifact.file)


def test_an_opset_without_what_is_needed_is_refused() -> None:
    with pytest.raises(RecipeError, match="opset=20"):
        target("onnxruntime", opset=20)


def test_the_opset_is_the_one_asked_for(artifact: Artifact, tmp_path: Path) -> None:
    newer = target("onnxruntime", opset=22).export(small(), EXAMPLE, tmp_path / "newer")
    for each, opset in ((artifact, 21), (newer, 22)):
        assert {entry.domain: entry.version for entry in onnx.load(str(each.file)).opset_import} == {"": opset}


class Biased(nn.Module):
    """Attention with a trained bias for every pair of places, as Swin has: N x 6 x 16 to N x 6 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(16, 48), nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=self.bias[None])
        return mixed.transpose(1, 2).contiguous().reshape(len(x), 6, 16)


def test_attention_with_a_trained_bias_is_written(tmp_path: Path) -> None:
    """torch lays out what it gives in another way where its bias is trained, for which a captured view does not fit."""
    made = target("onnxruntime").export(Biased().eval(), {"x": torch.randn(2, 6, 16)}, tmp_path / "made")
    assert made.manifest.agreement.relative < 1e-5


def test_the_experts_of_transformers_get_their_rows(tmp_path: Path) -> None:
    """Rows in the order of their experts, of which one gets none."""
    pytest.importorskip("transformers.integrations.moe")

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)

    example = {"x": torch.randn(6, 4), "ends": torch.tensor([2, 2, 6], dtype=torch.int32)}
    made = target("onnxruntime").export(Experts().eval(), example, tmp_path / "made", {})
    assert made.manifest.agreement.relative < 1e-5
    other = {"x": torch.randn(6, 4), "ends": torch.tensor([0, 5, 6], dtype=torch.int32)}
    model = Experts().eval()
    model.weight.data = torch.from_numpy(onnx.numpy_helper.to_array(onnx.load(made.file).graph.initializer[0]).copy())
    got = made.open()(**{name: tensor.numpy() for name, tensor in other.items()})
    torch.testing.assert_close(torch.as_tensor(got), model(**other), rtol=1e-5, atol=1e-6)


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x)

    from featherweight.core.errors import ArtifactError

    with pytest.raises(ArtifactError, match=r"cannot be written as ONNX: .*airy_ai") as caught:
        target("onnxruntime").export(Rare(), {"x": torch.randn(2, 3)}, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.data
@pytest.mark.slow
def test_resnet20_is_small_and_all_integer(tmp_path: Path) -> None:
    from featherweight.core.context import Context, run_step
    from featherweight.core.step import step
    from featherweight.core.task import find_task

    task = find_task("zoo:cifar10-resnet20")
    model, _ = run_step(step("quantize.static"), task.fresh(), Context(task))
    artifact = target("onnxruntime", activations="uint8").export(model, task.example, tmp_path / "out")
    assert artifact.bytes() <= 300_000
    assert artifact.manifest.evidence["float_kernels"] == {}
    assert artifact.manifest.evidence["integer_kernels"]["QLinearConv"] == 19
    assert artifact.manifest.evidence["integer_kernels"]["QLinearAdd"] == 9


def test_what_torch_can_translate_is_listed_once_and_an_export_does_not_add_to_it(tmp_path: Path) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from featherweight.targets.onnxruntime import exporter

    before, listing = dict(exporter.REGISTRIES), ONNXRegistry.from_torchlib
    exporter.REGISTRIES.clear()
    try:
        first = target("onnxruntime").export(small(), EXAMPLE, tmp_path / "first")
        (kept,) = {id(each): each for each in exporter.REGISTRIES.values()}.values()
        known = {operator: len(each) for operator, each in kept.functions.items()}
        again = target("onnxruntime").export(small(), EXAMPLE, tmp_path / "again")
        assert (first.file.read_bytes(), [kept]) == (again.file.read_bytes(), list(exporter.REGISTRIES.values()))
        assert known == {operator: len(each) for operator, each in kept.functions.items()}
        assert ONNXRegistry.from_torchlib == listing
    finally:
        exporter.REGISTRIES.update(before)
