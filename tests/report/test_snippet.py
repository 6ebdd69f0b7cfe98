"""The lines that the report offers for pasting run as they stand, against real artifacts."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import onnx
import pytest
import sample_runs
import torch
from onnx import TensorProto, helper

from featherweight.report.build import build
from featherweight.report.snippet import snippet


def onnx_artifact(folder: Path) -> None:
    """y = relu(x W), and an input in example.npz that the file does not read."""
    folder.mkdir(parents=True)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 2], [1.0, -1.0, 2.0, 0.5, -3.0, 4.0])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 3), ("y", 2))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "example.npz", x=np.eye(3, dtype=np.float32)[:2], unused=np.zeros(1))


def torch_artifact(folder: Path) -> None:
    folder.mkdir(parents=True)
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.25)
    x = torch.ones(2, 3)
    torch.export.save(torch.export.export(layer, (), {"input": x}, strict=False), folder / "model.pt2")
    np.savez(folder / "example.npz", input=x.numpy())


def paste(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def offered(page: Path) -> str:
    found = re.search(r'<code id="snippet">(.*?)</code>', page.read_text(encoding="utf-8"), re.S)
    assert found
    return unescape(found[1])


def test_the_onnxruntime_snippet_runs_as_the_page_offers_it(tmp_path: Path) -> None:
    onnx_artifact(tmp_path / "artifact")
    run = sample_runs.full().model_copy(update={"artifact": str(tmp_path / "artifact")})
    page = build(run, tmp_path / "report.html")
    assert str(tmp_path) not in page.read_text(encoding="utf-8")
    printed = paste(offered(page), tmp_path)
    assert "y float32 (2, 2)" in printed and "[[1.  0. ]\n [2.  0.5]]" in printed


def test_the_torch_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_artifact(tmp_path / "artifact")
    monkeypatch.chdir(tmp_path)
    exec(snippet("torch", "artifact"), {})  # in this process, which has torch loaded already
    assert "3.25" in capsys.readouterr().out


def test_a_report_written_elsewhere_names_the_artifact_in_full(tmp_path: Path) -> None:
    onnx_artifact(tmp_path / "out it's" / "artifact")
    run = sample_runs.full().model_copy(update={"artifact": str(tmp_path / "out it's" / "artifact")})
    page = build(run, tmp_path / "elsewhere" / "report.html")
    assert "y float32 (2, 2)" in paste(offered(page), tmp_path / "elsewhere")


def test_another_target_is_run_through_the_package(tmp_path: Path) -> None:
    torch_target = pytest.importorskip("featherweight.targets.torch", reason="the target torch is not there yet")
    layer = torch.nn.Linear(3, 2)
    torch_target.Torch().export(layer, {"input": torch.ones(2, 3)}, tmp_path / "artifact")
    code = snippet("some-other-runtime", "artifact")
    assert "onnxruntime" not in code
    with torch.no_grad():
        wanted = layer(torch.ones(1, 3))[0, 0].item()
    assert f"{wanted:.3f}"[:5] in paste(code, tmp_path)
