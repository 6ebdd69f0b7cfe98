"""`featherweight pack` and `unpack`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.cli import main


def test_a_saved_model_is_packed_and_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).eval(), torch.randn(2, 6)
    fw.save(model, tmp_path / "saved")
    assert main(["pack", str(tmp_path / "saved"), str(tmp_path / "model.fwc"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"file": str(tmp_path / "model.fwc"), "bytes": (tmp_path / "model.fwc").stat().st_size}
    assert main(["unpack", str(tmp_path / "model.fwc"), str(tmp_path / "out")]) == 0
    assert torch.equal(fw.load(tmp_path / "out")(inputs), model(inputs))
    assert main(["unpack", str(tmp_path / "model.fwc"), str(tmp_path / "out")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_damaged_file_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fw.pack(nn.Linear(6, 20), tmp_path / "model.fwc")
    file.write_bytes(file.read_bytes()[:-3])
    assert main(["unpack", str(file), str(tmp_path / "out")]) == 2
    assert "cut short: the tensor 'bias' is not whole" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(tmp_path), str(tmp_path / "model.fwc")]) == 2
    assert "holds no saved model" in capsys.readouterr().err
    assert not (tmp_path / "model.fwc").exists()


def test_a_finished_run_needs_no_class_of_the_users(tmp_path: Path) -> None:
    task = f"{Path(__file__).parent / 'tiny_tasks.py'}:bars"  # its model is a class of its own
    recipe = fw.Recipe.parse({"steps": [{"kind": "quantize.coded"}]})
    result = fw.apply(task, recipe, "coded", tmp_path / "run", axes=["size"])
    file = fw.pack(tmp_path / "run", tmp_path / "model.fwc")
    assert fw.load(fw.unpack(file, tmp_path / "out")) is not None
    assert result.artifact.manifest.stored
