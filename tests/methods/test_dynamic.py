"""quantize.dynamic: what it stores, what it computes, and what it leaves alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import Transformer, accuracy, conv_task, digits, one_thread, transformer_task  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, fingerprint, run_step
from featherweight.core.data import Arrays
from featherweight.core.encoding import Affine
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.evaluate import torch_figure
from featherweight.core.fit import Training
from featherweight.core.recipe import Recipe
from featherweight.core.soft import Mask, encodings, fold
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task
from featherweight.methods.quantize.arithmetic import scale_by_error, scale_by_max
from featherweight.model.port import dynamic_quantize, dynamic_quantize_tokens
from featherweight.model.ported import PortedLinear
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def quantized(task: Task, model: nn.Module | None = None, **settings):
    given = task.fresh() if model is None else model
    return run_step(step("quantize.dynamic", **settings), given, Context(task, device=CPU))


def picture_task(model: nn.Module) -> Task:
    return Task(name="pictures", model=model.eval(), batch_size=64, **digits(rows=True))


def test_a_transformer_keeps_its_accuracy_in_integers():
    task = transformer_task()
    model, record = quantized(task)
    linear = {name for name, layer in task.original.named_modules() if isinstance(layer, nn.Linear)}
    assert set(record.changed) == linear and set(encodings(model)) == {f"{name}.weight" for name in linear}
    assert accuracy(task, model) > accuracy(task, task.original) - 0.02
    assert {left.layer for left in record.left} == {"", "norm", "last"}  # the raw position, and two norms


def test_it_computes_with_rounded_weights_and_inputs():
    task = conv_task()
    model, _ = quantized(task)
    assert isinstance(model.head, PortedLinear) and isinstance(model.head, nn.Linear)
    encoding = encodings(model)["head.weight"]
    assert isinstance(encoding, Affine) and encoding.axis == 0 and encoding.values.dtype == torch.int8
    original = task.original.head.weight
    assert torch.equal(encoding.scale, scale_by_max(original, 0))
    x = torch.randn(5, 32)
    wanted = nn.functional.linear(dynamic_quantize(x), encoding.decode(), model.head.bias)
    assert torch.equal(model.head(x), wanted)
    assert torch.equal(fold(model).head(x), wanted)


def test_an_input_is_quantized_as_onnx_runtime_does():
    """DynamicQuantizeLinear of ONNX: range with zero in it, 255 steps, half to even."""
    x = torch.tensor([[-1.0, 0.0, 0.3, 2.0]])
    scale = 3.0 / 255
    zero = round(1.0 / scale)
    integers = (torch.round(x / scale) + zero).clamp(0, 255)
    assert torch.allclose(dynamic_quantize(x), (integers - zero) * scale, atol=1e-6)
    assert torch.equal(dynamic_quantize(torch.zeros(2, 3)), torch.zeros(2, 3))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_a_row_is_quantized_by_its_own_largest_magnitude(rows, columns, seed):
    """One number at a time in float64: round(v / s) s with s = max |v| / 127 over the row."""
    x = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    got = dynamic_quantize_tokens(x)
    for row, want in zip(x.flatten(0, 1).double().tolist(), got.flatten(0, 1).tolist()):
        scale = max(map(abs, row)) / 127
        for value, made in zip(row, want):
            assert abs(made / scale - round(made / scale)) < 1e-3 and abs(made - value) <= 0.5001 * scale
    assert torch.equal(dynamic_quantize_tokens(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("make", [conv_task, transformer_task])
def test_rows_with_scales_of_their_own_run_on_integers_and_come_back(make, tmp_path):
    task = make()
    model, record = quantized(task, activations="token")
    assert all(how.endswith("8-bit input per token") for how in record.changed.values())
    assert accuracy(task, model) > accuracy(task, task.original) - 0.02
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", task.original)) == fingerprint(model)
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "file")
    assert artifact.manifest.evidence["integer_kernels"] == {"MatMulIntegerToFloat": len(record.changed)}
    assert artifact.manifest.agreement.relative < 1e-3
    x = task.test.tensors[0]
    with torch.no_grad():
        want = model(x)
    assert (torch.as_tensor(artifact.open()(x)) - want).norm() < 0.01 * want.norm()


def test_one_large_token_does_not_coarsen_the_others():
    task = transformer_task()
    model, _ = quantized(task, activations="token")
    x = torch.randn(2, 8, 8)
    x[:, 0] *= 100
    port = model.embed.port
    assert torch.equal(port(x)[:, 1:], port(x[:, 1:])) and not torch.equal(dynamic_quantize(x)[:, 1:], port(x)[:, 1:])


def test_scales_by_least_error():
    task = conv_task()
    model, _ = quantized(task, weights="mse")
    assert torch.equal(encodings(model)["hidden.weight"].scale, scale_by_error(task.original.hidden.weight, 0))


def test_convolutions_and_norms_are_left_alone_and_named():
    _, record = quantized(conv_task())
    reasons = {left.layer: left.reason for left in record.left}
    assert set(record.changed) == {"hidden", "head"}
    assert set(reasons) == {"stem", "stem_norm", "conv", "conv_norm", "depth"}
    assert reasons["stem_norm"] == "is a BatchNorm2d, not a linear layer; stays in floats"


def test_chosen_layers_only():
    model, record = quantized(conv_task(), skip=["head"])
    assert set(encodings(model)) == {"hidden.weight"}
    assert {left.layer: left.reason for left in record.left}["head"] == "excluded by skip='head'"
    assert type(model.head) is nn.Linear


def test_masks_stay_in_force():
    task = conv_task()
    model = task.fresh()
    keep = model.hidden.weight.abs() > model.hidden.weight.abs().median()
    parametrize.register_parametrization(model.hidden, "weight", Mask(keep))
    copied = copy.deepcopy(model)
    found, _ = quantized(task, model)
    assert (found.hidden.weight[~keep] == 0).all() and encodings(found)["hidden.weight"].form == "int8"
    assert isinstance(found.hidden, PortedLinear)
    assert not isinstance(copied.hidden, PortedLinear) and torch.isfinite(copied(task.example["x"])).all()


def test_twice_is_no_order_and_no_effect():
    task = conv_task()
    model, _ = quantized(task)
    ctx = Context(task, device=CPU)
    with pytest.raises(NoEffect, match=r"quantize\.dynamic changed nothing: "):
        run_step(step("quantize.dynamic"), model, ctx)
    assert {left.reason for left in ctx.record.left if left.layer == "head"} == {"its weight is already stored as int8"}
    with pytest.raises(RecipeError, match="needs a model that is still editable"):
        Recipe([step("quantize.dynamic"), step("quantize.static")]).check()


def test_a_model_without_linear_layers_says_so():
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    task = Task(name="plain", model=model.eval(), **digits())
    with pytest.raises(NoEffect, match="0: is a Conv2d, not a linear layer"):
        quantized(task)


class Rows(nn.Module):
    """torch's own transformer layer, whose fused kernel reads weights past their modules."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


def test_layers_that_are_never_called_are_left_alone_and_ports_are_not_bypassed():
    torch.manual_seed(0)
    task = picture_task(Rows())
    model, record = quantized(task)
    assert set(record.changed) == {"block.linear1", "block.linear2", "head"}
    reasons = {left.layer: left.reason for left in record.left}
    assert reasons["block.self_attn.out_proj"].startswith("its forward is never called")
    called = []
    model.block.linear1.port.forward = lambda x: called.append(x) or dynamic_quantize(x)
    with torch.no_grad():
        model(**task.example)
    assert len(called) == 1


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_of_linear_is_left_alone():
    task = picture_task(nn.Sequential(nn.Flatten(), OwnLinear(64, 20), nn.Linear(20, 10)))
    _, record = quantized(task)
    assert set(record.changed) == {"2"}
    assert [left.reason for left in record.left] == ["is a OwnLinear, which may compute otherwise than nn.Linear"]


def test_a_layer_used_twice_is_changed_once():
    shared = nn.Linear(64, 64)
    task = picture_task(nn.Sequential(nn.Flatten(), shared, nn.ReLU(), shared, nn.Linear(64, 10)))
    model, record = quantized(task)
    assert set(record.changed) == {"1", "4"} and model[1] is model[3]
    assert len(model[1].parametrizations.weight) == 1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 12), nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed((x * 16).long()).mean((1, 2)))


def test_a_weight_shared_with_an_embedding_is_stored_twice_and_said_so():
    task = picture_task(Tied())
    model, record = quantized(task)
    assert record.warnings == [
        "head shares its weight with embed.weight, which keeps floats: the weight is now stored twice"
    ]
    assert torch.equal(model.embed.weight, task.original.embed.weight)
    assert model.head.parametrizations.weight.original is model.embed.weight


@pytest.mark.data
@pytest.mark.slow
def test_a_real_keyword_transformer_keeps_its_accuracy_and_comes_back(tmp_path):
    task = find_task("zoo:kws-kwt1")
    model, record = quantized(task)
    assert len(record.changed) == 74 and torch_figure(task, model) > torch_figure(task) - 0.5
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", task.original)) == fingerprint(model)


def test_gradients_pass_through_ports_and_grids():
    task = transformer_task()
    model, _ = quantized(task)
    assert isinstance(model, Transformer)
    task.loss(model(task.example["x"]), (None, torch.tensor([1, 2]))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(model.embed.parametrizations.weight.original.grad.abs().max()) > 0


# -- recurrent layers --------------------------------------------------------------------------------------------------
class Words(nn.Module):
    """Two LSTM layers in one module, and a GRU behind them: N x T ids to N x 5."""

    def __init__(self, directions: int = 1, layers: int = 2, batch_first: bool = True):
        super().__init__()
        self.table, self.batch_first = nn.Embedding(50, 16), batch_first
        self.cells = nn.LSTM(16, 24, layers, batch_first=batch_first, bidirectional=directions == 2)
        self.gated, self.head = nn.GRU(24 * directions, 8, batch_first=batch_first), nn.Linear(8, 5)

    def forward(self, x):
        x = self.table(x) if self.batch_first else self.table(x).transpose(0, 1)
        x = self.gated(self.cells(x)[0])[0]
        return self.head(x[:, -1] if self.batch_first else x[-1])


def word_task(**settings) -> Task:
    torch.manual_seed(0)
    x = torch.randint(0, 50, (64, 7))
    data = Arrays(x, torch.randint(0, 5, (64,)))
    return Task(name="words", model=Words(**settings).eval(), train=data, calibrate=data, test=data, batch_size=32)


@pytest.mark.parametrize(
    "settings", [{}, {"directions": 2, "layers": 1}, {"layers": 1, "batch_first": False}, {"directions": 2}]
)
def test_an_lstm_runs_on_integers_and_its_weights_are_those_that_torch_has(settings, tmp_path):
    task = word_task(**settings)
    model, record = quantized(task)
    layers, directions = settings.get("layers", 2), settings.get("directions", 1)
    names = {name for name in dict(task.original.named_parameters()) if name.startswith("cells.weight")}
    assert set(encodings(model)) == names | {"head.weight"} and len(names) == 2 * layers * directions
    assert "GRU" in {left.layer: left.reason for left in record.left}["gated"]
    x = task.test.tensors[0]
    with torch.no_grad():
        want = model(x)
        assert torch.equal(fold(model)(x), want), "the layer computes with its rounded weights"
        assert 0 < (want - task.original(x)).norm() < 0.05 * want.norm()
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "file")
    assert artifact.manifest.evidence["integer_kernels"]["DynamicQuantizeLSTM"] == layers
    assert {artifact.manifest.stored[name] for name in names} == {"int8"}
    assert artifact.manifest.work.integer_macs > 0.8 * artifact.manifest.work.macs
    got = torch.as_tensor(artifact.open()(x))
    assert (got - want).norm() < 0.02 * want.norm(), "the kernel rounds the hidden state, too"
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", task.original)(x), want)


def test_an_lstm_in_integers_can_be_trained_and_copied():
    task = word_task()
    model, _ = quantized(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fold(copy.deepcopy(model.to(CPU).float()))(task.test.tensors[0]).shape == (64, 5)  # moved, it can be copied
    Context(task, device=CPU).fit(copy.deepcopy(model), Training(epochs=1, lr=1e-2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    Context(task, device=CPU).fit(model, Training(epochs=1, lr=1e-2))
    name = "cells.parametrizations.weight_hh_l0.original"
    assert not torch.equal(before[name], model.state_dict()[name])


def test_an_lstm_that_projects_is_left_alone():
    task = word_task(layers=1)
    task.original.cells = nn.LSTM(16, 30, proj_size=24, batch_first=True)
    _, record = quantized(task)
    assert "projects its hidden state" in {left.layer: left.reason for left in record.left}["cells"]
