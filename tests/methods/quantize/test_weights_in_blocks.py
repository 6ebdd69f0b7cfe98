"""quantize.weights block by block: convolutions, experts, repeated layers, work in place; what it says of each."""

import copy

import pytest
import torch
from small_tasks import conv_task, digits, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import RecipeError, TaskError
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.quantize.fisher import loss_hessians
from featherweight.model.moments import gather, stages

CPU = torch.device("cpu")


def quantized(task: Task, **settings):
    item = step("quantize.weights", **{"group": None, "bits": 3, **settings})
    return run_step(item, task.fresh(), Context(task, device=CPU))


class Network(nn.Module):
    """Blocks between a stem and a head: N x 1 x 8 x 8 to N x 10."""

    def __init__(self, make, width: int = 6):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, width, 3, padding=1), nn.ModuleList(make(width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def task_of(make) -> Task:
    torch.manual_seed(0)
    return Task(name="blocks", model=Network(make).eval(), batch_size=32, **digits())


class Residual(nn.Module):
    def __init__(self, width: int, groups: int = 1):
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.two = nn.Conv2d(width, width, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.two(self.act(self.one(x)))


class InPlace(Residual):
    def forward(self, x):
        x += self.two(self.act(self.one(x)))
        return x


class Twice(Residual):
    def forward(self, x):
        return x + self.two(self.one(self.act(self.one(x))))


class Transposed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width, 2, stride=2), nn.ConvTranspose2d(width, width, 2, stride=2)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


class Routed(nn.Module):
    """Each input goes through one of two experts."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.calls = 0

    def forward(self, x):
        chosen = x.mean((1, 2, 3)) > x.mean()
        for expert, rows in zip(self.experts, (chosen, ~chosen)):
            if rows.any():
                x = x.index_put((rows.nonzero()[:, 0],), x[rows] + expert(x[rows]))
        return x


def drift_of(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """The drift of the last convolution of the first block, and the change of the weight that makes up for it."""
    model = task.fresh()
    block = next(iter(Context(task, device=CPU).blocks(model)))
    original = copy.deepcopy(block.module)
    with torch.no_grad():
        block.module.one.weight.mul_(0.8)
    last = stages(block, ["one", "two"])[-1]
    assert last.layers == ["two"] and last.sums == {"two": ""}
    moments = gather(block, original, last)["two"]
    inputs = torch.cat(
        [block.module.act(block.module.one(call[0][0])).movedim(1, -1).flatten(0, -2) for call in block.calls]
    )
    wanted = torch.cat([original(call[0][0]).movedim(1, -1).flatten(0, -2) for call in block.calls])
    now = torch.cat([block.module(call[0][0]).movedim(1, -1).flatten(0, -2) for call in block.calls])
    return moments.drift, inputs.t() @ (wanted - now)


def test_the_drift_of_a_convolution_is_that_of_its_outputs():
    with torch.no_grad():
        found, wanted = drift_of(task_of(Residual))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make", [Residual, lambda width: Residual(width, groups=width), Transposed, Twice, Routed, InPlace]
)
@pytest.mark.parametrize("settings", [{}, {"compensate": False}, {"method": "awq"}], ids=["gptq", "plain", "awq"])
def test_every_kind_of_block_is_quantized_and_what_is_not_made_up_for_is_said(make, settings):
    task = task_of(make)
    model, record = quantized(task, **settings)
    layers = [
        name for name, module in task.original.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert {f"{name}.weight" for name in layers} <= encodings(model).keys()
    if not settings and (make is Twice or "groups" in str(record.warnings)):
        assert any("drift is not made up for" in line for line in record.warnings)


def test_a_layer_that_runs_twice_is_calibrated_on_both():
    task = task_of(Twice)
    block = next(iter(Context(task, device=CPU).blocks(task.fresh())))
    stage = stages(block, ["one"])[0]
    moments = gather(block, copy.deepcopy(block.module), stage)["one"]
    assert stage.repeated == {"one"} and moments.drift is None and "more than once" in moments.note
    assert moments.rows == 2 * sum(call[0][0].shape[0] * 64 for call in block.calls)


def test_work_in_place_changes_nothing():
    outputs = []
    for make in (Residual, InPlace):
        task = task_of(make)
        model, _ = quantized(task)
        with torch.no_grad():
            outputs.append(model(task.test.tensors[0]))
    assert torch.allclose(*outputs, atol=1e-5)


def test_gradients_behind_an_activation_in_place_are_those_before_it():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(216, 10))
        task = Task(name="line", model=model.eval(), **digits())
        found.append(loss_hessians(task.fresh(), ["0", "3"], Context(task, device=CPU)))
    for name in ("0", "3"):
        assert all(torch.allclose(one, other) for one, other in zip(found[0][name], found[1][name]))


def test_a_layer_called_by_keyword_is_a_clear_error():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.line = nn.Flatten(), nn.Linear(64, 10)

        def forward(self, x):
            return self.line(input=self.flat(x))

    task = Task(name="named", model=Named().eval(), **digits())
    with pytest.raises(TaskError, match="by keyword"):
        quantized(task)


@pytest.mark.parametrize("settings", [{"beam": 4}, {"refine": 0}, {"scaling": True}, {"damping": 0.1}])
def test_settings_that_would_do_nothing_are_refused(settings):
    with pytest.raises(RecipeError, match=r"is a setting of the method gptq"):
        step("quantize.weights", method="rtn", **settings)


def test_globs_of_bits_that_match_nothing_are_said():
    _, record = quantized(conv_task(), layer_bits={"no.such": 4})
    assert any("no.such" in line for line in record.warnings)


@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e8])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_size_of_weights_makes_no_difference(factor, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.mul_(factor)
    task = Task(name="line", model=model.eval(), **digits())
    found, _ = quantized(task, bits=8, method=method)
    weight = task.original[1].weight
    assert float(((found[1].weight - weight).norm() / weight.norm()).detach()) < 0.01
