"""What every target inherits: which forms it refuses, how it is compared, what its artifacts take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.core.encoding import Encoding
from featherweight.core.errors import ArtifactError, NotCarried
from featherweight.core.target import PACKED, Artifact, Session, Target, Work

sys.path.insert(0, str(Path(__file__).parent.parent / "targets"))
from small_models import keep_as


class Arrays(Target):
    """Runs one linear layer, and stores its weight as it is or as int8; may fix the batch size to one."""

    name: ClassVar[str] = "arrays"
    file: ClassVar[str] = "weights.npz"
    carries: ClassVar[frozenset[str]] = frozenset({"int8"})
    fixed: bool = False

    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        arrays: dict[str, Any] = {name: tensor.detach().numpy() for name, tensor in plain.named_parameters()}
        for name, encoding in stored.items():
            parts = encoding.parts()
            arrays[name], arrays["scale"] = parts["values"].numpy(), parts["scale"].numpy()
        np.savez(path, **arrays)

    def load(self, path: Path, threads: int = 1) -> Session:
        with np.load(path) as file:
            held = dict(file)
        weight = held["weight"] * held["scale"].reshape(-1, 1) if "scale" in held else held["weight"]

        def run(input: np.ndarray) -> list[np.ndarray]:
            return [(input[:1] if self.fixed else input) @ weight.T + held["bias"]]

        return run

    def stored(self, path: Path) -> dict[str, str]:
        with np.load(path) as file:
            return {"weight": str(file["weight"].dtype)}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        return Work(parameters=1, macs=1, weight_bytes=1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).eval()


def test_a_bit_width_that_the_target_cannot_carry_is_refused_by_name(tmp_path: Path) -> None:
    model = linear()
    keep_as(model, "weight", bits=7)
    message = r"'weight' is stored as int7, which the target arrays does not carry; it carries: int8"
    with pytest.raises(NotCarried, match=message):
        Arrays().export(model, {"input": torch.randn(2, 3)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_form_that_it_lists_is_written(tmp_path: Path) -> None:
    model = linear()
    keep_as(model, "weight")
    assert Arrays().export(model, {"input": torch.randn(2, 3)}, tmp_path / "out").manifest.stored == {"weight": "int8"}


def test_a_target_of_packed_forms_refuses_none_but_zeros() -> None:
    class Packing(Arrays):
        carries: ClassVar[frozenset[str]] = frozenset({PACKED})

    forms = ["int8", "uint3", "codebook4", "trellis2", "sparse", "2:4"]
    assert Packing.refuses(forms) == ["2:4", "sparse"]
    assert Arrays.refuses(forms) == ["2:4", "codebook4", "sparse", "trellis2", "uint3"]


def test_a_single_input_is_compared_at_two_batch_sizes(tmp_path: Path) -> None:
    single = {"input": torch.randn(1, 3)}
    artifact = Arrays().export(linear(), single, tmp_path / "out")
    assert artifact.manifest.agreement.batches == [1, 2]
    with pytest.raises(ArtifactError, match=r"of shape \(1, 2\) for a batch of 2"):
        Arrays(fixed=True).export(linear(), single, tmp_path / "fixed")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    class Two(Arrays, name="two arrays"):
        def load(self, path: Path, threads: int = 1) -> Session:
            return lambda x, mask: [x * mask]

    class Model(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    try:
        example = {"x": torch.randn(2, 3), "mask": torch.ones(2, 3)}
        yield Two().export(Model(3, 3).eval(), example, tmp_path / "out")  # type: ignore[misc]
    finally:
        del Target.kinds["two arrays"]


@pytest.mark.parametrize(
    ("args", "kwargs", "fault"),
    [
        (1, {}, "missing: mask"),
        (2, {"ids": 0}, "unknown: ids"),
        (1, {"x": 0, "mask": 0}, "given twice: x"),
        (3, {}, "too many: 3 by position"),
        (0, {"x": 0, "type": 0}, "missing: mask; unknown: type"),
    ],
)
def test_inputs_that_do_not_fit_are_named(artifact: Artifact, args: int, kwargs: dict[str, int], fault: str) -> None:
    run, array = artifact.open(), np.ones((2, 3), np.float32)
    with pytest.raises(ArtifactError) as caught:
        run(*[array] * args, **dict.fromkeys(kwargs, array))
    assert str(caught.value) == f"the artifact takes the inputs x, mask; {fault}"
    np.testing.assert_array_equal(run(array, mask=array), array)
