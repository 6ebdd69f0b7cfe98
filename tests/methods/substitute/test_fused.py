"""Layers that become one: the same outputs, less to compute, and what stays apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, digits, one_thread, transformer_task  # noqa: F401
from torch import fx, nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.cost import forward_macs
from featherweight.model.fusion import composed
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def run(task: Task, **given):
    return run_step(step("substitute.fused", **given), task.fresh(), Context(task, device=CPU))


def near(one: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(one(images), other(images), atol=1e-4, rtol=1e-4)


@given(kernel=st.integers(1, 3), first=st.booleans(), second=st.booleans(), stride=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_a_map_of_channels_behind_a_convolution_is_one_convolution(kernel, first, second, stride):
    one = nn.Conv2d(3, 5, kernel, stride=stride, padding=kernel // 2, bias=first).double()
    other = nn.Conv2d(5, 2, 1, bias=second).double()
    weight, bias = composed(one.weight, one.bias, other.weight, other.bias)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    found = nn.functional.conv2d(x, weight, bias, stride=stride, padding=kernel // 2)
    assert torch.allclose(found, other(one(x)))
    assert (bias is None) == (not first and not second)


def test_batch_norms_are_folded_and_all_stays_editable():
    task = conv_task()
    model, record = run(task)
    assert near(task.original, model, task.test.tensors[0])
    assert isinstance(model.stem_norm, nn.Identity) and isinstance(model.conv_norm, nn.Identity)
    assert model.conv.bias is not None and record.changed["conv"] == "conv_norm folded in"
    assert record.changed["conv_norm"] == "became part of conv"
    smaller, _ = run_step(step("prune.structured", keep=0.6), model, Context(task, device=CPU))
    assert smaller.conv.out_channels < 16


class Row(nn.Module):
    """Linear layers in a row, one of which is wide: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.pick, self.mix = nn.Conv2d(1, 6, 3, bias=False), nn.Conv2d(6, 4, 1)
        self.wide, self.back = nn.Linear(144, 200), nn.Linear(200, 24, bias=False)
        self.thin, self.head = nn.Linear(24, 2), nn.Linear(2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.mix(self.pick(x))).flatten(1)
        return self.head(self.thin(torch.relu(self.back(self.wide(x)))))


def test_what_follows_without_anything_between_becomes_one_where_that_computes_less(tmp_path):
    torch.manual_seed(0)
    task = Task(name="row", model=Row().eval(), batch_size=64, **digits())
    model, record = run(task)
    images = task.test.tensors[0]
    assert near(task.original, model, images)
    assert isinstance(model.mix, nn.Identity) and isinstance(model.back, nn.Identity)
    assert model.wide.out_features == 24 and model.pick.out_channels == 4
    assert isinstance(model.thin, nn.Linear) and isinstance(model.head, nn.Linear)
    reasons = {each.layer: each.reason for each in record.left}
    assert reasons["thin"].startswith("one layer of both would compute 3.53 times as much")
    assert forward_macs(model, task.example) < forward_macs(task.original, task.example)
    save(model, tmp_path / "model")
    assert near(model, load(tmp_path / "model", like=task.original), images)
    kept, record = run(task, skip=["wide"])
    assert isinstance(kept.back, nn.Linear) and isinstance(kept.mix, nn.Identity)
    with pytest.raises(NoEffect, match="nothing that can become part of it is right behind it"):
        run(task, linears=False)


def test_layers_side_by_side_become_one_in_the_graph(tmp_path):
    task = transformer_task()
    with pytest.raises(NoEffect):
        run(task)
    model, record = run(task, parallel=True)
    images = task.test.tensors[0]
    assert isinstance(model, fx.GraphModule) and near(task.original, model, images)
    assert set(record.changed) == {"attend.query", "attend.key", "attend.value"}
    assert dict(model.named_parameters())["attend.query_joined.weight"].shape == (96, 32)
    save(model, tmp_path / "model")
    assert near(model, load(tmp_path / "model", like=task.original), images)
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "artifact")
    with torch.no_grad():
        assert abs(artifact.open()(images) - model(images).numpy()).max() < 1e-3


def test_weights_that_are_shared_stay_apart():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.other.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.other(self.one(x.flatten(1)))))

    task = Task(name="shared", model=Shared().eval(), batch_size=64, **digits())
    with pytest.raises(NoEffect, match=r"the weight of \w+ is stored otherwise, or shared"):
        run(task)
