"""What every target promises, tested for each on the day it appears."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.core import registry
from featherweight.core.encoding import Affine
from featherweight.core.errors import ArtifactError, TaskError
from featherweight.core.files import file_digest
from featherweight.core.outputs import as_arrays
from featherweight.core.soft import encodings, fold
from featherweight.core.target import Artifact, Target, target

sys.path.insert(0, str(Path(__file__).parent.parent / "targets"))
from small_models import CASES, Case, keep_as

registry.load("targets")
KINDS = sorted(name for name, kind in Target.kinds.items() if kind.__module__.startswith("featherweight."))
Exported = tuple[Case, nn.Module, Artifact]


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A case by its name, its model with some weights stored, and the artifact of it; each is exported once."""
    made: dict[str, Exported] = {}

    def export(case_name: str) -> Exported:
        if case_name not in made:
            torch.manual_seed(0)
            case = CASES[case_name]()
            model = copy.deepcopy(case.model)
            STORE[case_name](model)
            folder = tmp_path_factory.mktemp(name) / case_name
            made[case_name] = (case, model, target(name).export(model, case.inputs(2), folder, case.free))
        return made[case_name]

    return export


def _store_convolutions(model: nn.Module) -> None:
    keep_as(model.depthwise, "weight", axis=0)
    keep_as(model.down, "weight", axis=None)
    keep_as(model.head, "weight", "uint8", axis=0)


def _store_recurrent(model: nn.Module) -> None:
    keep_as(model.embedding, "weight", axis=0)
    for layer, attribute in (
        (model.lstm, "weight_ih_l0"),
        (model.lstm, "weight_hh_l0_reverse"),
        (model.gru, "weight_hh_l0"),
    ):
        keep_as(layer, attribute)
    keep_as(model.head, "weight", axis=1)


def _store_attention(model: nn.Module) -> None:
    keep_as(model.embed, "weight", axis=1)
    for layer in (model.q, model.out, model.up):
        keep_as(layer, "weight")
    keep_as(model.down, "weight", "uint8", axis=None)


STORE = {"convolutions": _store_convolutions, "recurrent": _store_recurrent, "attention": _store_attention}


@pytest.mark.parametrize("case_name", CASES)
def test_it_computes_what_the_model_computes_at_any_batch_size(
    exported: Callable[[str], Exported], case_name: str
) -> None:
    case, model, artifact = exported(case_name)
    run, plain = artifact.open(), fold(model)
    for size in (1, 5):
        inputs = case.inputs(size)
        with torch.no_grad():
            want = as_arrays(plain(**inputs))
        got = run(**inputs)
        assert type(got) is type(want)
        names = list(want) if isinstance(want, dict) else range(len(want)) if isinstance(want, tuple) else [...]
        assert len(got) == len(want)
        for key in names:
            np.testing.assert_allclose(got[key], want[key], atol=1e-4)


def test_a_free_dimension_that_is_not_the_batch_is_free(exported: Callable[[str], Exported]) -> None:
    case, model, artifact = exported("attention")
    inputs = case.inputs(3, 9)
    with torch.no_grad():
        want = fold(model)(**inputs)["hidden"].numpy()
    np.testing.assert_allclose(artifact.open()(**inputs)["hidden"], want, atol=1e-4)
    assert artifact.manifest.inputs[0].shape == [-1, -1]


@pytest.mark.parametrize("case_name", CASES)
def test_what_is_stored_is_what_was_asked(exported: Callable[[str], Exported], case_name: str) -> None:
    _, model, artifact = exported(case_name)
    found = artifact.target.stored(artifact.file)
    assert found == artifact.manifest.stored
    asked = encodings(model)
    assert len(asked) >= 3
    assert {name: found[name] for name in asked} == {name: encoding.form for name, encoding in asked.items()}
    plain = dict(fold(model).named_parameters())
    assert set(found) <= set(plain), "a name that is no weight of the model"
    rest = {name for name, tensor in plain.items() if tensor.dim() > 1} - set(asked)
    assert {found[name] for name in rest} <= {"float32"}


@pytest.mark.parametrize("case_name", ["convolutions"])
def test_the_file_shrinks_by_what_integers_save(
    exported: Callable[[str], Exported], name: str, case_name: str, tmp_path: Path
) -> None:
    case, model, artifact = exported(case_name)
    floats = target(name).export(fold(model), case.inputs(2), tmp_path / "floats", case.free)
    saved = sum(3 * encoding.values.numel() for encoding in encodings(model).values() if isinstance(encoding, Affine))
    scales = sum(8 * encoding.scale.numel() for encoding in encodings(model).values() if isinstance(encoding, Affine))
    assert floats.manifest.work.weight_bytes - artifact.manifest.work.weight_bytes >= saved - scales - 64
    assert floats.manifest.work.macs == artifact.manifest.work.macs


def test_work_is_that_of_the_model(exported: Callable[[str], Exported], name: str) -> None:
    work = exported("attention")[2].manifest.work
    model = exported("attention")[1]
    assert work.parameters == sum(parameter.numel() for parameter in fold(model).parameters())
    tokens, wide = 6, 16
    products = 4 * wide * wide + 2 * wide * 24 + 2 * tokens * wide
    assert work.macs == tokens * products
    recurrent = exported("recurrent")[2].manifest.work
    assert recurrent.macs == 7 * (2 * 20 * (6 + 5) + 12 * (10 + 4)) + 4 * 3


def test_every_file_is_verified(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    import shutil

    artifact = exported("convolutions")[2]
    assert set(artifact.manifest.digests) == {artifact.manifest.file, "example.npz"}
    for name in artifact.manifest.digests:
        copied = tmp_path / name
        shutil.copytree(artifact.folder, copied)
        data = bytearray((copied / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copied / name).write_bytes(bytes(data))
        with pytest.raises(ArtifactError, match=rf"{name} is not the file that was written"):
            Artifact(copied).open()
        (copied / name).unlink()
        with pytest.raises(ArtifactError, match=f"{name} is missing"):
            Artifact(copied).open()


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "missing"])
def test_a_damaged_file_is_one_clear_error(exported: Callable[[str], Exported], tmp_path: Path, damage: str) -> None:
    artifact = exported("convolutions")[2]
    data = artifact.file.read_bytes()
    path = tmp_path / artifact.manifest.file
    contents = {"truncated": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 40}
    if damage in contents:
        path.write_bytes(contents[damage])
    for read in (artifact.target.load, artifact.target.stored):
        with pytest.raises(ArtifactError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class Unreadable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())


def test_nothing_half_written_is_left_after_a_failure(name: str, tmp_path: Path) -> None:
    with pytest.raises((TaskError, ArtifactError)) as caught:
        target(name).export(Unreadable(), {"x": torch.randn(2, 3)}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_weight_that_no_layer_reads_is_named(name: str, tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Idle().eval()
    keep_as(model.idle, "weight")
    with pytest.raises(ArtifactError, match=r"does not read the weight 'idle.weight'"):
        target(name).export(model, {"x": torch.randn(2, 3)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(exported: Callable[[str], Exported]) -> None:
    _, model, _ = exported("recurrent")
    torch.manual_seed(0)
    again = copy.deepcopy(CASES["recurrent"]().model)
    STORE["recurrent"](again)
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(one, other), name


def test_an_artifact_replaces_an_older_one_whole(name: str, tmp_path: Path) -> None:
    model, example = nn.Linear(3, 2).eval(), {"input": torch.randn(2, 3)}
    first = file_digest(target(name).export(model, example, tmp_path / "out").file)
    with torch.no_grad():
        model.bias += 1
    second = target(name).export(model, example, tmp_path / "out")
    assert file_digest(second.file) != first
    second.open()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_it_runs_with_more_threads(exported: Callable[[str], Exported]) -> None:
    case, _, artifact = exported("convolutions")
    threads = torch.get_num_threads()
    inputs = case.inputs(4)
    np.testing.assert_allclose(artifact.open(threads=2)(**inputs), artifact.open(threads=1)(**inputs), atol=1e-5)
    assert torch.get_num_threads() == threads
