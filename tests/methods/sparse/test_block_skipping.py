"""LayerDrop and stochastic depth: what is skipped is not computed, how often, and what becomes of the network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from small_tasks import blocks_task, conv_task, digits, one_thread  # noqa: F401
from torch import Tensor, nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.sparse.residual import branch_ends
from featherweight.methods.sparse.skipping import Draw, evenly, linear_decay, skipping


class Block(nn.Module):
    """As in ResNet: two convolutions, added to what passes by, then ReLU."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x[:, :, :: self.stride, :: self.stride] + inner)


class Normed(nn.Module):
    """As in a transformer: the norm stands before the branch, so a network of any depth has the same statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8, 2), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def net_task() -> Task:
    torch.manual_seed(0)
    x = torch.randn(96, 1, 8, 8)
    return Task(name="net", model=Net(), train=Arrays(x, x.mean((1, 2, 3)).argsort().argsort() // 32), batch_size=16)


def run(kind: str, task: Task, **settings: Any) -> Any:
    ctx = Context(task, device=torch.device("cpu"))
    return run_step(step(kind, **({"epochs": 1, "lr": 1e-3} | settings)), task.fresh(), ctx)


# -- the rules --------------------------------------------------------------------------------------------------------
def test_the_chance_to_be_skipped_rises_linearly():
    """Figure 2 of arXiv:1603.09382: survival from 1 at the input to 0.5 at the last of 54 blocks."""
    survival = [1 - rate for rate in linear_decay(54, 0.5)]
    assert survival == pytest.approx([1 - place / 54 * (1 - 0.5) for place in range(1, 55)])


@given(some.integers(1, 40), some.data())
def test_what_stays_is_spread_evenly(count: int, data: Any):
    kept = data.draw(some.integers(1, count))
    found = evenly(count, kept)
    assert len(set(found)) == kept and all(0 <= place < count for place in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_half_of_the_blocks_is_every_other():
    assert evenly(12, 6) == [1, 3, 5, 7, 9, 11]


def test_blocks_are_drawn_by_their_own_chance_and_none_at_the_end():
    draw = Draw({"a": 0.1, "b": 0.6}, torch.Generator().manual_seed(0))
    both = 0
    for turn in range(4000):
        draw.during(nn.Identity(), turn / 4000)
        both += draw.skipped == {"a", "b"}
    assert draw.drawn["a"] / 4000 == pytest.approx(0.1, abs=0.02)
    assert draw.drawn["b"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert both / 4000 == pytest.approx(0.06, abs=0.02)
    draw.during(nn.Identity(), 1.0)
    assert not draw.skipped and draw.steps == 4000


# -- what is skipped --------------------------------------------------------------------------------------------------
def test_a_skipped_block_is_not_computed_and_has_no_gradient():
    model, called = Net(), []
    for name in ("blocks.0.conv1", "blocks.1.conv1", "blocks.1.bn2"):
        model.get_submodule(name).register_forward_hook(lambda *_given, name=name: called.append(name))
    skipped = {"blocks.1"}
    x = torch.randn(2, 1, 8, 8)
    with skipping(model, dict.fromkeys(["blocks.0", "blocks.1"], lambda x: x), skipped):
        output = model(x)
        output.sum().backward()
    assert called == ["blocks.0.conv1"]
    assert model.get_parameter("blocks.1.conv1.weight").grad is None
    assert model.get_parameter("blocks.0.conv1.weight").grad is not None
    without = nn.Sequential(model.blocks[0], *model.blocks[2:])
    assert torch.equal(output, model.head(without(torch.relu(model.stem(x))).mean((2, 3))))
    assert "forward" not in vars(model.blocks[1])
    called.clear()
    model(x)
    assert called == ["blocks.0.conv1", "blocks.1.conv1", "blocks.1.bn2"]


def test_no_block_is_left_patched_when_training_fails():
    model = Net()
    with pytest.raises(ZeroDivisionError), skipping(model, {"blocks.0": lambda x: x}, set()):
        raise ZeroDivisionError
    assert "forward" not in vars(model.blocks[0])


def test_statistics_of_batch_norms_see_only_the_steps_in_which_their_block_ran():
    model, record = run("sparse.layerdrop", net_task(), rate=0.5, epochs=2)
    steps = int(model.get_buffer("blocks.2.bn1.num_batches_tracked"))
    assert steps == 12
    for name in ("blocks.0", "blocks.1", "blocks.3"):
        ran = int(model.get_buffer(f"{name}.bn1.num_batches_tracked"))
        assert record.changed[name] == f"skipped in {steps - ran} of {steps} steps" and ran < steps


def test_a_block_that_gives_a_tuple_gives_one_when_it_is_skipped():
    class Tupled(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.linear, self.more = nn.Linear(6, 6), more

        def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            return x + self.linear(x), x.sum() if self.more else None

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleList([Tupled(False), Tupled(False), Tupled(True)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.rows:
                x, _ = block(x, mask=None)
            return x

    x = torch.randn(64, 6)
    task = Task(name="tupled", model=Rows(), train=Arrays(x, (x[:, 0] > 0).long()), batch_size=4)
    _, record = run("sparse.layerdrop", task, rate=0.5)
    assert set(record.changed) == {"*", "rows.0", "rows.1"}
    assert "several tensors" in {left.layer: left.reason for left in record.left}["rows.2"]
    _, record = run("sparse.stochastic_depth", task, rate=0.5)
    assert "linear scaled by 0.833" in record.changed["rows.0"]


# -- LayerDrop --------------------------------------------------------------------------------------------------------
def test_blocks_that_change_the_form_are_never_skipped_and_named():
    _, record = run("sparse.layerdrop", net_task())
    reasons = {left.layer: left.reason for left in record.left}
    assert set(record.changed) == {"*", "blocks.0", "blocks.1", "blocks.3"}
    assert "it turns" in reasons["blocks.2"] and "no block that is skipped" in reasons["blocks.2.conv1"]
    assert {"stem", "head"} <= set(reasons)


def test_a_share_of_the_depth_is_kept():
    task = blocks_task()
    whole, record = run("sparse.layerdrop", task)
    half, cut = run("sparse.layerdrop", task, keep=0.5)
    blocks = [name for name in record.changed if name != "*"]
    gone = [name for name, how in cut.changed.items() if "taken away" in how]
    assert len(gone) == len(blocks) - round(len(blocks) / 2)
    kept = dict(half.named_parameters())
    assert len(kept) < len(dict(whole.named_parameters()))
    assert cut.parameters_after < cut.parameters_before == record.parameters_after
    assert any("prune.blocks takes them anew" in warning for warning in cut.warnings) and not record.warnings


def test_a_network_without_rows_of_blocks_is_an_error_with_the_reasons():
    with pytest.raises(NoEffect, match=r"sparse\.layerdrop changed nothing: conv: it stands in no block"):
        run("sparse.layerdrop", conv_task())


def test_training_with_layerdrop_makes_shallow_networks_better():
    torch.manual_seed(0)
    parts = {name: Arrays(part.tensors[0].flatten(1), part.tensors[1]) for name, part in digits().items()}
    rows = nn.Sequential(*(Normed(48) for _ in range(6)))
    task = Task(name="rows", model=nn.Sequential(nn.Linear(64, 48), rows, nn.Linear(48, 10)), batch_size=32, **parts)
    plain, _ = run("finetune", task, epochs=10, lr=3e-3)
    dropped, record = run("sparse.layerdrop", task, epochs=10, lr=3e-3, rate=0.5)
    names = [name for name in record.changed if name != "*"]
    images, labels = task.test.tensors

    @torch.no_grad()
    def loss_at_half_depth(model: nn.Module) -> float:
        with skipping(model, dict.fromkeys(names, lambda x: x), set(names[::2])):
            return float(nn.functional.cross_entropy(model(images), labels))

    assert loss_at_half_depth(dropped) < 0.7 * loss_at_half_depth(plain)


# -- stochastic depth -------------------------------------------------------------------------------------------------
def test_branches_end_where_they_are_added():
    x = torch.rand(2, 8, 6, 6)
    block = Block(8).eval()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert branch_ends(block, lambda: (x, block(x))) == ["bn2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    assert branch_ends(plain, lambda: (x, plain(x))) == []


def test_without_biases_the_end_is_the_last_layer_not_the_norm_before_it():
    """With its norm at zero such a branch is silent too, but what it adds is not in proportion to the norm's weight."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(12, 6, bias=False), nn.Linear(6, 12, bias=False)
            self.norm = nn.RMSNorm(6)  # registered last, called first

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.silu(self.up(self.norm(x))))

    block, x = Gated(), torch.randn(4, 6)
    assert branch_ends(block, lambda: (x, block(x))) == ["down"]
    bent = nn.Sequential(nn.Linear(6, 6))
    assert branch_ends(bent, lambda: (x, x + torch.tanh(bent(x)))) == []
    assert branch_ends(bent, lambda: (x, x + torch.relu(bent(x)))) == ["0"]


def test_each_branch_is_scaled_by_the_chance_to_be_there():
    """Two trainings that differ in nothing but the scale: the second has its rule taken out."""
    task = net_task()
    model, record = run("sparse.stochastic_depth", task, rate=0.8)
    rates = dict(zip(("blocks.0", "blocks.1", "blocks.3"), (0.2, 0.4, 0.8)))
    for name, rate in rates.items():
        assert record.changed[name] == f"skipped with a chance of {rate:.1%}; bn2 scaled by {1 - rate:.3g}"
        block, x = model.get_submodule(name), torch.rand(2, 8, 6, 6)
        with torch.no_grad():
            inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            assert torch.allclose(block(x), torch.relu(x + inner))
        # the weights of a trained norm lie near 1; scaled, near the chance
        assert float(block.bn2.weight.detach().mean()) == pytest.approx(1 - rate, abs=0.05)
    assert float(model.get_parameter("blocks.2.bn2.weight").detach().mean()) == pytest.approx(1, abs=0.05)


def test_branches_that_start_silent_are_skipped_and_scaled_too():
    """The last norm of each block starts at zero (arXiv:1706.02677), so that untrained blocks hand on what they get."""
    task = net_task()
    for block in task.original.blocks:
        nn.init.zeros_(block.bn2.weight)
    model, record = run("sparse.stochastic_depth", task, rate=0.5, lr=1e-2)
    assert [name for name in record.changed if name != "*"] == ["blocks.0", "blocks.1", "blocks.3"]
    assert all("; bn2 scaled by" in how for name, how in record.changed.items() if name != "*")
    assert bool(model.get_parameter("blocks.3.bn2.weight").any())


def test_branches_are_scaled_where_they_ended_before_training():
    """What ends a branch that training has silenced could not be found out any more."""

    class Silenced(Context):
        def fit(self, model: nn.Module, *given: Any, **named: Any) -> float:
            loss = super().fit(model, *given, **named)
            with torch.no_grad():
                model.get_parameter("blocks.0.bn2.weight").zero_()
                model.get_parameter("blocks.0.bn2.bias").zero_()
            return loss

    ctx = Silenced(net_task(), device=torch.device("cpu"))
    item = step("sparse.stochastic_depth", rate=0.8, epochs=1, lr=1e-3)
    _, record = run_step(item, ctx.task.fresh(), ctx)
    assert record.changed["blocks.0"].endswith("bn2 scaled by 0.8")


def test_a_block_with_two_branches_is_scaled_at_both_ends():
    _, record = run("sparse.stochastic_depth", blocks_task())
    hows = [how for name, how in record.changed.items() if name != "*"]
    assert hows and all("scaled by" in how for how in hows)


def test_a_block_that_is_not_residual_is_left_alone():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rows(x))

    x = torch.randn(32, 6)
    task = Task(name="plain", model=Plain(), train=Arrays(x, (x[:, 0] > 0).long()))
    with pytest.raises(NoEffect, match=r"sparse\.stochastic_depth changed nothing: head"):
        run("sparse.stochastic_depth", task)
    model, _ = run("sparse.layerdrop", task, rate=0.5)
    assert model is not None
