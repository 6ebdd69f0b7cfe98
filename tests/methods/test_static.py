"""quantize.static: ranges, where ports stand, and what it does to a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.encoding import Affine
from featherweight.core.errors import NotFinite, RecipeError
from featherweight.core.fit import Training
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.quantize.ranges import BINS, Histogram, activation_range, squared_error
from featherweight.model.port import Port
from featherweight.model.skeleton import load, save


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.depth = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.depth(torch.relu(self.conv(x))))
        return self.fc(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def _task(model: nn.Module | None = None, x: torch.Tensor | None = None) -> Task:
    torch.manual_seed(0)
    x = torch.randn(96, 3, 8, 8) if x is None else x
    data = Arrays(x, torch.randint(0, 4, (len(x),)))
    return Task(name="static", model=(model or Residual()).eval(), train=data, calibrate=data, test=data, batch_size=32)


def _quantized(task: Task, **settings):
    return run_step(step("quantize.static", **settings), task.fresh(), Context(task, device=torch.device("cpu")))


# -- ranges -----------------------------------------------------------------------------------------------------------
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=60), st.integers(1, 5))
def test_a_histogram_counts_everything_and_knows_its_ends(values, parts):
    tensor, histogram = torch.tensor(values), Histogram()
    for part in tensor.chunk(parts):
        histogram.add(part)
    assert histogram.low == float(tensor.min()) and histogram.high == float(tensor.max())
    assert int(histogram.counts.sum()) == len(values)


def test_a_histogram_that_grows_is_close_to_one_made_at_once():
    torch.manual_seed(0)
    values, grown, whole = torch.randn(20000) * torch.linspace(0.1, 3, 20000), Histogram(), Histogram()
    for part in values.chunk(20):
        grown.add(part)
    whole.add(values)
    for method in ("percentile", "mse"):
        a, b = (activation_range(item, method, 99.0) for item in (grown, whole))
        assert a == pytest.approx(b, abs=0.05 * (whole.high - whole.low))
    assert len(grown.counts) == BINS


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_ranges_hold_zero_and_stay_inside_what_was_seen(method):
    torch.manual_seed(1)
    histogram = Histogram()
    histogram.add(torch.rand(5000) + 0.5)
    low, high = activation_range(histogram, method)
    assert low == 0.0 and 0.5 < high <= histogram.high


def test_the_best_range_by_error_cuts_an_outlier_off():
    torch.manual_seed(2)
    histogram = Histogram()
    histogram.add(torch.cat([torch.randn(100_000), torch.tensor([40.0])]))
    low, high = activation_range(histogram, "mse")
    assert high < 39 and squared_error(histogram, low, high) < squared_error(histogram, histogram.low, histogram.high)


def test_nan_in_calibration_is_named():
    with pytest.raises(ValueError):
        Histogram().add(torch.tensor([1.0, float("nan")]))


# -- placement --------------------------------------------------------------------------------------------------------
def test_ports_stand_at_both_ends_of_every_integer_operation():
    model, record = _quantized(_task())
    ports = {name.removeprefix("ports."): module for name, module in model.named_modules() if isinstance(module, Port)}
    assert {"x", "relu", "relu_1", "conv2d_2", "relu_2", "mean"} <= set(ports)
    assert "linear" not in ports  # the last sums leave in floats
    pooled = next(name for name in ports if name.startswith("max_pool2d"))
    assert (ports[pooled].scale, ports[pooled].zero) == (ports["relu_2"].scale, ports["relu_2"].zero)
    assert ports["relu"].zero == 0
    assert set(record.changed) == {"stem", "conv", "depth", "fc"}


def test_what_is_not_selected_stays_in_floats_and_is_named():
    model, record = _quantized(_task(), skip=("depth",))
    assert set(encodings(model)) == {"stem.weight", "conv.weight", "fc.weight"}
    assert {left.layer: left.reason for left in record.left} == {"depth": "excluded by skip='depth'"}


def test_weights_are_integers_per_channel_and_outputs_stay_close():
    task = _task()
    model, _ = _quantized(task)
    for encoding in encodings(model).values():
        assert isinstance(encoding, Affine) and encoding.form == "int8" and encoding.scale.dim() == 1
    x = task.example["x"]
    error = (model(x) - task.original(x)).norm() / task.original(x).norm()
    assert 0 < error < 0.1


def test_masks_survive_the_capture():
    task = _task()
    model, _ = run_step(step("prune.weights", sparsity=0.5), task.fresh(), Context(task))
    model, _ = run_step(step("quantize.static"), model, Context(task))
    zeros = float((encodings(model)["conv.weight"].decode() == 0).float().mean())
    assert zeros >= 0.5
    Context(task).fit(model, Training(epochs=1, lr=1e-2))
    assert float((encodings(model)["conv.weight"].decode() == 0).float().mean()) >= 0.5


def test_it_can_be_trained_saved_and_trained_again(tmp_path):
    task = _task()
    model, _ = _quantized(task, calibration="mse", weights="mse")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Context(task).fit(model, Training(epochs=1, lr=1e-2))
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    save(model, tmp_path / "model")
    again, x = load(tmp_path / "model"), task.example["x"]
    assert torch.equal(again(x), model(x))
    Context(task).fit(again, Training(epochs=1, lr=1e-2))


def test_a_norm_that_cannot_be_folded_is_left_and_said():
    """The norm takes away a mean beside which the outputs are rounding; folding it would leave another rounding."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    with torch.no_grad():
        for values, value in ((model[0].bias, 1e5), (model[1].running_mean, 1e5), (model[1].running_var, 1e-6)):
            values.fill_(value)
    pictures = Arrays(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.long))
    task = Task(name="edge", model=model, calibrate=pictures, test=pictures)
    made, record = run_step(step("quantize.static"), task.fresh(), Context(task, device=torch.device("cpu")))
    assert any("batch norms are not folded" in text and "differs by" in text for text in record.warnings)
    assert any(node.target is torch.ops.aten.batch_norm.default for node in made.graph.nodes)


def test_nan_while_calibrating_is_not_finite():
    class Bad(Residual):
        def forward(self, x):
            return super().forward(torch.where(x.abs() > 3.5, x / 0 - x / 0, x))

    x = torch.randn(96, 3, 8, 8).clamp(-3, 3)
    x[70] = 4.0
    with pytest.raises(NotFinite):
        _quantized(_task(Bad(), x))


def test_settings_out_of_range_are_one_line():
    with pytest.raises(RecipeError, match="percentile"):
        step("quantize.static", percentile=20)
