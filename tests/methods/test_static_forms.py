"""quantize.static beyond 8-bit convolutions: few bits, embeddings, recurrent and transposed layers, bad data."""

import pytest
import torch
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NotFinite, RecipeError, TaskError
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.port import Port
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions: N x 4 x 8 x 8 to N x 3."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depth, self.up = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.depth(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


class Words(nn.Module):
    """An embedding, an LSTM and a GRU: N x T ids to N x 5."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16), nn.Linear(24, 5)
        self.forwards, self.gated = nn.LSTM(16, 20, batch_first=True), nn.GRU(20, 24, batch_first=True)

    def forward(self, x):
        return self.head(self.gated(self.forwards(self.table(x))[0])[0][:, -1])


def _task(model, x):
    data = Arrays(x, torch.randint(0, 3, (len(x),)))
    return Task(name="forms", model=model.eval(), train=data, calibrate=data, test=data, batch_size=32)


def _pictures(model=None, x=None):
    torch.manual_seed(0)
    x = torch.randn(64, 4, 8, 8) if x is None else x
    return _task(model or Mixed(), x)


def _words():
    torch.manual_seed(0)
    return _task(Words(), torch.randint(0, 50, (64, 7)))


def _quantized(task, **settings):
    return run_step(step("quantize.static", **settings), task.fresh(), Context(task, device=CPU))


def _ports(model):
    return {name.removeprefix("ports."): each for name, each in model.named_modules() if isinstance(each, Port)}


def _apart(one, other):
    return float((one - other).norm() / other.norm())


# -- few bits ----------------------------------------------------------------------------------------------------------
def test_first_and_last_layer_get_more_bits_and_globs_go_before_all():
    model, record = _quantized(_pictures(), bits=4, activation_bits=4, layer_bits={"depth": 6})
    assert {name: encoding.form for name, encoding in encodings(model).items()} == {
        "stem.weight": "int8", "grouped.weight": "int4", "depth.weight": "int6", "up.weight": "int4",
        "head.weight": "int8",
    }  # fmt: skip
    ports = _ports(model)
    assert ports["x"].bits == 8 and ports["relu"].bits == 4
    assert record.changed["grouped"].startswith("int4 weight, 4-bit activations")


@pytest.mark.parametrize("symmetric", [False, True])
def test_activations_of_four_bits_agree_in_the_runtime(symmetric, tmp_path):
    task = _pictures()
    model, _ = _quantized(task, activation_bits=4, ends=4, symmetric=symmetric)
    inner = _ports(model)["relu"]
    assert inner.bits == 4 and inner.zero == 0 and (not symmetric or _ports(model)["x"].zero == 8)
    seen = inner(torch.linspace(-5, 5, 1000)).unique()
    assert len(seen) <= 16
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "file")
    x = task.test.tensors[0]
    with torch.no_grad():
        want = model(x)
    # a sum on the edge between two of the 16 steps may be rounded the other way, and that is a large step
    assert _apart(torch.as_tensor(artifact.open()(x)), want) < 0.02
    assert artifact.manifest.evidence["integer_kernels"]["QLinearConv"] == 3


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_weights_of_few_bits_lie_packed_and_still_run_on_integer_kernels(bits, tmp_path):
    task = _pictures()
    artifacts = {}
    for width in (8, bits):
        model, _ = _quantized(task, bits=width, ends=width)
        artifacts[width] = target("onnxruntime").export(model, task.example, tmp_path / str(width))
    stored = artifacts[bits].manifest.stored
    assert stored["grouped.weight"] == stored["depth.weight"] == stored["head.weight"] == f"int{bits}"
    assert artifacts[bits].manifest.evidence["integer_kernels"] == artifacts[8].manifest.evidence["integer_kernels"]
    x = task.test.tensors[0]
    with torch.no_grad():
        assert _apart(torch.as_tensor(artifacts[bits].open()(x)), model(x)) < 0.02


@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_bits_out_of_range_are_one_line(bits):
    for name in ("bits", "activation_bits", "ends"):
        with pytest.raises(RecipeError, match=name):
            step("quantize.static", **{name: bits})


def test_a_glob_for_bits_that_matches_nothing_is_said():
    _, record = _quantized(_pictures(), layer_bits={"nothing.*": 4})
    assert any("nothing.*" in warning for warning in record.warnings)


# -- embeddings and recurrent layers -----------------------------------------------------------------------------------
def test_embeddings_and_recurrent_weights_are_stored_in_integers(tmp_path):
    task = _words()
    model, record = _quantized(task)
    stored = encodings(model)
    assert {"table.weight", "forwards.weight_ih_l0", "forwards.weight_hh_l0", "gated.weight_ih_l0"} <= set(stored)
    assert stored["table.weight"].scale.shape == (50,) and "rows" in record.changed["table"]
    x = task.test.tensors[0]
    with torch.no_grad():
        want = model(x)
        assert 0 < _apart(want, task.original(x)) < 0.05
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "file")
    assert {form for name, form in artifact.manifest.stored.items() if "weight" in name} == {"int8"}
    assert _apart(torch.as_tensor(artifact.open()(x)), want) < 0.01
    save(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(x), want)


def test_values_that_stay_floats_are_not_rounded_for_others():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.norm(x)
            return self.second(x + torch.tanh(self.first(x)))

    model, _ = _quantized(_task(Shortcut(), torch.randn(64, 5, 8)))
    add = next(node for node in model.graph.nodes if node.name.startswith("add"))
    assert add.args[0].name.startswith("layer_norm"), "the shortcut is added in floats, so it is not quantized"
    assert {"layer_norm", "add"} == set(_ports(model))


# -- bad data ----------------------------------------------------------------------------------------------------------
def test_no_calibration_data_is_one_line():
    task = Task(name="empty", model=Mixed().eval(), test=Arrays(torch.randn(8, 4, 8, 8), torch.zeros(8)), calibrate=[])
    with pytest.raises(TaskError, match="calibrate"):
        _quantized(task)


def test_calibration_data_of_another_shape_are_named():
    batches = [(torch.randn(4, 4, 8, 8), torch.zeros(4)), (torch.randn(4, 4, 8, 10), torch.zeros(4))]
    task = Task(name="shapes", model=Mixed().eval(), calibrate=batches, test=batches[:1])
    with pytest.raises(TaskError, match=r"'x' of shape \[4, 4, 8, 10\].*dynamic"):
        _quantized(task)


def test_nan_in_calibration_data_is_named():
    x = torch.randn(64, 4, 8, 8)
    x[40, 0, 0, 0] = torch.nan
    with pytest.raises(NotFinite, match="calibrate"):
        _quantized(_pictures(x=x))
