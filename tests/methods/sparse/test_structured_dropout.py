"""Structured dropout: smaller matrices that give what masking would give, and a network that is whole afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import accuracy, conv_task, one_thread, transformer_task  # noqa: F401
from test_block_skipping import Net, net_task
from torch import Tensor, nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.sparse.subset import Units, cuts, in_part


def run(task: Task, **settings: Any) -> Any:
    ctx = Context(task, device=torch.device("cpu"))
    settings = {"epochs": 1, "lr": 1e-3} | settings
    return run_step(step("sparse.structured_dropout", **settings), task.fresh(), ctx)


def each(count: int) -> Tensor:
    return torch.arange(count)[:, None]


def masked(model: Net, x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """The first block with the whole matrices, and a mask on its hidden channels."""
    block = model.blocks[0]
    mask = torch.zeros(8).index_fill(0, kept, scale)[:, None, None]
    x = torch.relu(model.stem(x))
    hidden = torch.relu(block.bn1(block.conv1(x))) * mask
    return model.head(model.blocks[1:](torch.relu(x + block.bn2(block.conv2(hidden)))).mean((2, 3)))


def test_smaller_matrices_give_what_a_mask_gives_forward_and_backward():
    torch.manual_seed(0)
    small, whole, x = Net().train(), Net().train(), torch.randn(4, 1, 8, 8)
    whole.load_state_dict(small.state_dict())
    units = Units("hidden", 8, 3, {"blocks.0.conv1": each(8), "blocks.0.bn1": each(8)}, {"blocks.0.conv2": each(8)})
    units.draw(torch.Generator().manual_seed(1))
    assert len(units.kept) == 3
    shapes: list[tuple[int, ...]] = []
    small.blocks[0].bn1.register_forward_hook(lambda _m, given, _out: shapes.append(tuple(given[0].shape)))
    with in_part(small, cuts([units])):
        output = small(x)
    assert shapes == [(4, 3, 8, 8)], "the dropped channels were computed"
    wanted = masked(whole, x, units.kept, 8 / 3)
    assert torch.allclose(output, wanted, atol=1e-5)
    output.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in small.named_parameters():
        assert torch.allclose(parameter.grad, whole.get_parameter(name).grad, atol=1e-3, rtol=1e-3), name
    dropped = torch.ones(8, dtype=torch.bool).index_fill(0, units.kept, False)
    assert bool((small.get_parameter("blocks.0.conv1.weight").grad[dropped] == 0).all())  # type: ignore[index]


def test_statistics_of_dropped_channels_stay():
    model = Net().train()
    units = Units("hidden", 8, 4, {"blocks.0.conv1": each(8), "blocks.0.bn1": each(8)}, {"blocks.0.conv2": each(8)})
    units.draw(torch.Generator().manual_seed(0))
    with in_part(model, cuts([units])):
        model(torch.randn(4, 1, 8, 8))
    moved = model.get_buffer("blocks.0.bn1.running_mean") != 0
    assert set(moved.nonzero().flatten().tolist()) == set(units.kept.tolist())
    assert int(model.get_buffer("blocks.0.bn1.num_batches_tracked")) == 1


def test_on_average_the_outputs_are_those_of_the_whole_network():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(4, 5)
    units = Units("hidden", 12, 6, {"0": each(12)}, {"2": each(12)})
    generator, outputs = torch.Generator().manual_seed(0), []
    with in_part(model, cuts([units])), torch.no_grad():
        for _ in range(3000):
            units.draw(generator)
            outputs.append(model(x))
    with torch.no_grad():
        assert torch.allclose(torch.stack(outputs).mean(0), model(x), atol=0.03)


def test_units_of_several_indices_go_together():
    """Four channels, flattened from 2 x 2 pictures: a channel is four inputs of the linear layer behind it."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.conv(x)).flatten(1))

    x = torch.randn(32, 1, 2, 2)
    task = Task(name="flat", model=Flat(), train=Arrays(x, (x.sum((1, 2, 3)) > 0).long()))
    _, record = run(task)
    assert record.changed["conv"] == "2 of 4 units in each batch"
    assert record.changed["linear"] == "the inputs from 2 of 4 units in each batch"


def test_layers_in_a_row_lose_outputs_and_inputs():
    x = torch.randn(64, 6)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    task = Task(name="row", model=net, train=Arrays(x, (x[:, 0] > 0).long()))
    model, record = run(task, rate=0.25)
    assert "12 of 16" in record.changed["0"] and "9 of 12" in record.changed["4"] and "2" in record.changed
    assert not any("forward" in vars(module) for module in model.modules())
    assert tuple(model[2].weight.shape) == (12, 16)


def test_residual_blocks_lose_inner_channels_only():
    _, record = run(net_task())
    for place in range(4):
        for layer in ("conv1", "bn1"):
            assert record.changed[f"blocks.{place}.{layer}"] == "4 of 8 units in each batch"
    reasons = {left.layer: left.reason for left in record.left}
    assert set(reasons) == {"stem", "head"} and all(reasons.values())


def test_what_cannot_be_cut_is_named_with_its_reason():
    _, record = run(transformer_task())
    reasons = {left.layer: left.reason for left in record.left}
    assert set(record.changed) == {"*", "wide", "narrow"}
    assert {"embed", "attend.query", "attend.out", "head"} <= set(reasons)
    _, record = run(conv_task())
    reasons = {left.layer: left.reason for left in record.left}
    assert "grouped convolution" in reasons["stem"]


def test_a_layer_that_is_excluded_keeps_all_its_units():
    _, record = run(net_task(), skip=["blocks.[01].conv1"])
    assert {left.layer for left in record.left} >= {"blocks.0.conv1", "blocks.1.conv1"}
    assert {name for name in record.changed if name.endswith("conv1")} == {"blocks.2.conv1", "blocks.3.conv1"}
    with pytest.raises(NoEffect, match=r"sparse\.structured_dropout"):
        run(transformer_task(), skip=["wide"])


def test_the_network_is_whole_afterwards_and_still_good():
    task = conv_task()
    model, _ = run(task, epochs=6, lr=3e-3)
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in task.original.parameters()]
    assert accuracy(task, model) > accuracy(task, task.original) - 0.1
