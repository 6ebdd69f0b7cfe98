"""Second moments of the inputs of layers, against their definition in float64."""

import pytest
import torch
from small_tasks import Task, conv_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context
from featherweight.core.data import Arrays
from featherweight.core.errors import NotFinite, TaskError
from featherweight.methods.quantize.hessian import hessians
from featherweight.model.moments import Moments, outputs_of, rows_of

LAYERS = [
    (nn.Linear(6, 4), (5, 7, 6)),
    (nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2), (3, 6, 9, 8)),
    (nn.Conv2d(4, 8, (3, 1), dilation=2, padding=(2, 0), padding_mode="circular"), (2, 4, 9, 8)),
    (nn.Conv1d(4, 4, 3, padding="same", groups=4), (3, 4, 11)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_the_rows_are_what_the_layer_multiplies_with_its_weight(layer, shape):
    given = torch.randn(shape)
    rows = torch.cat(list(rows_of(layer, given)), 1)
    groups = rows.shape[0]
    weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    got = torch.einsum("gni,goi->ngo", rows, weight).flatten(1) + layer.bias
    wanted = layer(given).flatten(0, -2) if isinstance(layer, nn.Linear) else layer(given).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert torch.equal(outputs_of(layer, layer(given)), wanted)


def test_the_running_mean_is_the_mean():
    parts = [torch.randn(2, n, 5) for n in (1, 0, 9, 4)]
    moments = Moments()
    for part in parts:
        moments.add([part])
    rows = torch.cat(parts, 1).double()
    assert torch.allclose(moments.mean().double(), rows.mT @ rows / rows.shape[1], atol=1e-6)


def test_one_pass_over_the_calibration_split_gives_all_layers():
    task = conv_task()
    found = hessians(task.original, ["stem", "depth", "head"], Context(task, device=torch.device("cpu")))
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        "stem": (1, 9, 9),
        "depth": (16, 9, 9),
        "head": (1, 32, 32),
    }
    images = task.calibrate.tensors[0]
    patches = nn.functional.unfold(images, 3, padding=1).mT.flatten(0, 1).double()
    assert torch.allclose(found["stem"][0].double(), patches.mT @ patches / len(patches), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_observed_is_an_error():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.named = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.named(input=self.used(x / x.sum(1, keepdim=True)).nan_to_num())

    def context(values):
        split = Arrays(values, torch.zeros(4).long())
        return Context(
            Task(name="odd", model=Odd(), train=split, validate=split, test=split), device=torch.device("cpu")
        )

    clean, broken = context(torch.ones(4, 3)), context(torch.zeros(4, 3))
    with pytest.raises(TaskError, match="'unused' met no calibration data"):
        hessians(clean.task.original, ["unused"], clean)
    with pytest.raises(TaskError, match="'named' is given its input by keyword"):
        hessians(clean.task.original, ["named"], clean)
    with pytest.raises(NotFinite, match="'used'"):
        hessians(broken.task.original, ["used"], broken)
