"""The target torch: what lies in its file, and what is never unpickled."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import keep_as, ported
from torch import nn

from featherweight.core.errors import ArtifactError
from featherweight.core.target import Artifact, target


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)).eval()
    keep_as(model[0], "weight")
    keep_as(model[3], "weight", "uint8", axis=None)
    folder = tmp_path_factory.mktemp("torch") / "out"
    return target("torch").export(model, {"input": torch.randn(2, 3, 6, 6)}, folder)


def test_integers_are_on_the_disk(artifact: Artifact) -> None:
    state = torch.export.load(artifact.file).state_dict
    assert state["0.weight"].dtype == torch.int8
    assert state["3.weight"].dtype == torch.uint8
    sizes = {entry.filename.rpartition("/")[2]: entry.file_size for entry in zipfile.ZipFile(artifact.file).infolist()}
    assert (
        sum(size for name, size in sizes.items() if name.startswith("weight_")) == artifact.manifest.work.weight_bytes
    )


def test_the_graph_says_nothing_of_where_it_came_from(artifact: Artifact) -> None:
    data = artifact.file.read_bytes()
    assert str(Path(__file__).parent).encode() not in data
    assert b"stack_trace" not in data


def test_ports_compute_what_they_compute_in_the_model(tmp_path: Path) -> None:
    made = target("torch").export(ported(), {"x": torch.randn(2, 3, 8, 8)}, tmp_path / "out")
    assert made.manifest.agreement.max_abs == 0


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def rewritten(source: Path, path: Path, changes: dict[str, bytes], more: dict[str, bytes]) -> Path:
    """A copy of an archive with entries (by the end of their names) changed, and more added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            changed = [data for end, data in changes.items() if name.endswith(end)]
            new.writestr(name, changed[0] if changed else old.read(name))
        for name, data in more.items():
            new.writestr(f"{root}/{name}", data)
    return path


def test_a_pickle_in_place_of_the_sample_inputs_is_not_run(artifact: Artifact, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Trap(tmp_path / "mark"), buffer)
    path = rewritten(artifact.file, tmp_path / "model.pt2", {"sample_inputs/model.pt": buffer.getvalue()}, {})
    with pytest.raises(ArtifactError, match="damaged"):
        artifact.target.load(path)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_refused(artifact: Artifact, tmp_path: Path) -> None:
    with zipfile.ZipFile(artifact.file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    entry = config["config"]["0.weight"]
    entry["use_pickle"] = True
    trap = {entry["path_name"]: pickle.dumps(Trap(tmp_path / "mark"))}
    changes = {"model_weights_config.json": json.dumps(config).encode(), **trap}
    path = rewritten(artifact.file, tmp_path / "model.pt2", changes, {})
    with pytest.raises(ArtifactError, match="pickled tensors, which are not loaded"):
        artifact.target.load(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["data/constants/opaque_obj_0", "data/weights/model.pt", "data/aotinductor/m/a.so"])
def test_entries_that_torch_would_unpickle_or_run_are_refused(artifact: Artifact, tmp_path: Path, name: str) -> None:
    path = rewritten(artifact.file, tmp_path / "model.pt2", {}, {name: pickle.dumps(Trap(tmp_path / "mark"))})
    with pytest.raises(ArtifactError, match=name.rpartition("/")[2]):
        artifact.target.load(path)
    assert not (tmp_path / "mark").exists()


def test_attention_is_counted(tmp_path: Path) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    shapes = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 4)}
    example = {name: torch.randn(shape) for name, shape in shapes.items()}
    assert target("torch").export(Attend(), example, tmp_path / "out").manifest.work.macs == 3 * 5 * 7 * (8 + 4)
