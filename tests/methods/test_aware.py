"""quantize.aware: what it does to a model, what it leaves as it was, and that what is deployed is what was trained."""

from dataclasses import replace

import pytest
import torch
from small_tasks import conv_task, one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NotFinite, RecipeError, TaskError
from featherweight.core.evaluate import torch_figure
from featherweight.core.fit import Training
from featherweight.core.soft import Mask, encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.quantize.aware import InBfloat16, _normed
from featherweight.methods.quantize.learning import Learning, plan
from featherweight.methods.quantize.static import StaticQuantization
from featherweight.model.learned import LearnedPort, LearnedRounding
from featherweight.model.port import Port
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def aware(task, **given):
    return run_step(step("quantize.aware", **{"epochs": 1, **given}), task.fresh(), Context(task, device=CPU))


def learning(task, freeze=0.2, ternary=False, **given):
    """A graph as it is when training begins."""
    ctx = Context(task, device=CPU)
    normed = _normed(task.fresh(), ctx) if freeze < 1 else set()
    module = StaticQuantization(calibration="mse", weights="mse", **given).apply(task.fresh(), ctx)
    return Learning(module, ctx, normed, ternary), ctx


def ports(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Port)}


# -- what it leaves ----------------------------------------------------------------------------------------------------
def test_weights_and_activations_have_the_bits_asked_for():
    task = conv_task()
    model, record = aware(task, bits=2, activation_bits=4)
    forms = {name.rpartition(".")[0]: encoding.form for name, encoding in encodings(model).items()}
    assert forms == {"stem": "int8", "conv": "int2", "depth": "int2", "hidden": "int2", "head": "int8"}
    for name, encoding in encodings(model).items():
        values = encoding.values
        assert len(values.unique()) > 1 and (encoding.bits == 8 or (values.min() >= -2 and values.max() <= 1)), name
    assert {port.bits for port in ports(model).values()} == {4, 8}
    assert not any(isinstance(module, LearnedPort | LearnedRounding | nn.BatchNorm2d) for module in model.modules())
    assert "batch_norm" not in model.code and "norms" not in model.code
    assert "first layer" in record.changed["stem"] and "last layer" in record.changed["head"]
    assert "learned" in record.changed["conv"] and "layer" not in record.changed["conv"].replace("first", "")


def test_ternary_weights_are_three_values_per_channel():
    model, _ = aware(conv_task(), ternary=True, ends=2, activation_bits=8)
    for encoding in encodings(model).values():
        assert encoding.form == "int2" and set(encoding.values.unique().tolist()) <= {-1, 0, 1}


def test_training_recovers_what_rounding_lost():
    task = conv_task()
    start = step("quantize.static", bits=2, activation_bits=4, calibration="mse", weights="mse")
    rounded, _ = run_step(start, task.fresh(), Context(task, device=CPU))
    trained, _ = aware(task, bits=2, activation_bits=4, epochs=4, lr=3e-3)
    before, after = torch_figure(task, rounded), torch_figure(task, trained)
    assert after > before + 4 and after > torch_figure(task) - 5


def test_only_steps_leaves_the_weights_where_they_were():
    task = conv_task()
    model, _ = aware(task, train="steps", freeze=1.0, activation_bits=8, bits=8)
    begun, _ = learning(task, freeze=1.0)
    for name, module in begun.module.named_modules():
        if parametrize.is_parametrized(module):
            original = model.get_submodule(name).parametrizations["weight"].original
            assert torch.equal(original, module.parametrizations["weight"].original) and original.requires_grad
    scales = [encoding.scale for encoding in encodings(model).values()]
    assert any(not torch.equal(a, b.scale) for a, b in zip(scales, encodings(begun.module).values()))


# -- before, while and after training ----------------------------------------------------------------------------------
def test_at_the_start_it_computes_what_static_quantization_does():
    task = conv_task()
    static, _ = run_step(
        step("quantize.static", calibration="mse", weights="mse"), task.fresh(), Context(task, device=CPU)
    )
    x = task.example["x"]
    for freeze in (0.2, 1.0):
        begun, _ = learning(task, freeze=freeze)
        assert bool(begun.norms) == (freeze < 1)
        with torch.no_grad():
            error = (static(x) - begun.module(x)).norm() / static(x).norm()
        assert error < 0.02  # some value stands on the edge between two steps


def test_norms_behind_layers_are_folded_without_a_change(monkeypatch):
    monkeypatch.setattr("featherweight.methods.quantize.learning.round_bias", lambda *_: None)  # a change that is meant
    task = conv_task()
    begun, _ = learning(task, bits=3, activation_bits=4)
    torch.manual_seed(0)
    for norm in begun.norms.values():
        norm.weight.data *= 0.5 + torch.rand_like(norm.weight)
        norm.bias.data += 0.1 * torch.randn_like(norm.bias)
        norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
        norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    next(iter(begun.norms.values())).weight.data[0] = -1.0  # what a large step could make
    begun.during(frozen=True)
    x = torch.cat([batch[0] for batch in task.batches("test")])[:200]
    integers = {name: begun._parts(name)[0][-1].encode(begun._parts(name)[1]).values for name in begun.plan.layers}
    with torch.no_grad():
        before = begun.module.eval()(x)
        begun.settle()
        after = begun.module(x)
    for name, encoding in encodings(begun.module).items():
        assert torch.equal(encoding.values, integers[name])
    assert ((before - after).norm(dim=1) / before.norm(dim=1)).median() < 1e-4


class Mixed(nn.Module):
    """Every kind of layer that takes a batch norm in: N x 1 x 8 x 8 to N x 10."""

    def __init__(self):
        super().__init__()
        self.rows, self.rows_norm = nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.wide, self.wide_norm = nn.ConvTranspose2d(1, 4, 2, stride=2, bias=False), nn.BatchNorm2d(4)
        self.volume, self.volume_norm = nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3)
        self.flat, self.flat_norm, self.head = nn.Linear(3 * 2 * 4 * 6, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, x):
        x = torch.relu(self.rows_norm(self.rows(x[:, 0])))
        x = torch.relu(self.wide_norm(self.wide(x[:, None])))[:, None]
        x = torch.relu(self.volume_norm(self.volume(x[..., :6, :8])))
        return self.head(torch.relu(self.flat_norm(self.flat(x.flatten(1)))))


def test_every_kind_of_layer_keeps_its_norm_while_it_trains_and_its_integers_after():
    torch.manual_seed(0)
    model = Mixed()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 0, 1)  # negative factors too
            nn.init.normal_(module.running_mean, 0, 0.1)
    task = replace(conv_task(), model=model.eval())
    begun, ctx = learning(task, bits=8)
    assert {name.rpartition(".")[0] for name in begun.norms} == {"rows", "wide", "volume", "flat"}
    x = task.test.tensors[0][:100]
    with torch.no_grad():
        assert (begun.module(x) - model(x)).norm() / model(x).norm() < 0.1
    ctx.fit(begun.module, Training(epochs=1, lr=1e-2), during=lambda _model, t: begun.during(t > 0.8))
    with torch.no_grad():
        before = begun.module(x)
        begun.settle()
        after = begun.module(x)
    assert ((before - after).norm(dim=1) / before.norm(dim=1)).median() < 1e-3


def test_what_is_frozen_does_not_move():
    task = conv_task()
    begun, ctx = learning(task)
    norm, port = next(iter(begun.norms.values())), begun.module.get_submodule(begun.plan.ports[0])
    seen = []

    def during(_model, t):
        begun.during(t >= 0.5)
        seen.append((t, norm.running_mean.clone(), port.scale.detach().clone(), norm.weight.detach().clone()))

    ctx.fit(begun.module, Training(epochs=1, lr=1e-2), during=during, groups=begun.groups(1e-2, 0.1))
    early, late = ([each for each in seen if (each[0] >= 0.5) == last] for last in (False, True))
    assert len(early) > 2 and len(late) > 2
    for place in (1, 2):
        assert not torch.equal(early[0][place], early[-1][place])
        assert torch.equal(late[0][place], late[-1][place])
    assert not torch.equal(late[0][3], late[-1][3])  # the norm's factor is still learned


def test_calibration_data_are_not_looked_at_while_it_trains():
    task = conv_task()
    begun, _ = learning(task)
    broken = Arrays(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4, dtype=torch.long))
    ctx = Context(replace(task, calibrate=broken), device=CPU)
    ctx.fit(begun.module, Training(epochs=0.2), during=lambda _model, t: begun.during(False))


def test_ports_behind_what_only_moves_values_share_one_grid():
    task = conv_task()
    model, _ = aware(task, bits=4, activation_bits=4)
    found = plan(model)
    assert found.same  # max pooling
    for name, other in found.same.items():
        one, two = ports(model)[name], ports(model)[other]
        assert (one.scale, one.zero, one.bits) == (two.scale, two.zero, two.bits)


# -- with everything else ----------------------------------------------------------------------------------------------
def test_saved_loaded_exported_and_trained_on(tmp_path):
    task = conv_task()
    model, _ = aware(task, bits=2, activation_bits=4)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    images = torch.cat([batch[0] for batch in task.batches("test")])[:300]
    with torch.no_grad():
        want = model(images)
        assert torch.equal(again(images), want)
    artifact = target("onnxruntime").export(again, task.example, tmp_path / "onnx")
    assert set(artifact.manifest.stored.values()) >= {encoding.form for encoding in encodings(model).values()}
    got = torch.as_tensor(artifact.open()(images.numpy()))
    assert (got.argmax(1) == want.argmax(1)).float().mean() > 0.99
    assert (got - want).norm() / want.norm() < 0.02
    before = {name: encoding.values.clone() for name, encoding in encodings(again).items()}
    Context(task, device=CPU).fit(again, Training(epochs=1, lr=1e-2))
    after = encodings(again)
    assert any(not torch.equal(before[name], after[name].values) for name in before)
    assert {name: encoding.form for name, encoding in after.items()} == {
        name: encoding.form for name, encoding in encodings(model).items()
    }


def test_biases_are_what_integer_kernels_add():
    task = conv_task()
    model, _ = aware(task, bits=2, activation_bits=2)
    for name, node in plan(model).layers.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        port = model.get_submodule(str(node.args[0].target))
        steps = layer.bias / (port.scale * layer.parametrizations["weight"][-1].scale)
        assert torch.allclose(steps, steps.round(), atol=1e-3, rtol=1e-6)


def test_masks_hold():
    task = conv_task()
    pruned, _ = run_step(step("prune.weights", sparsity=0.5), task.fresh(), Context(task, device=CPU))
    model, _ = run_step(step("quantize.aware", epochs=1), pruned, Context(task, device=CPU))
    links = model.get_submodule("conv").parametrizations["weight"]
    assert isinstance(links[0], Mask)
    assert bool((encodings(model)["conv.weight"].values[~links[0].keep] == 0).all())


def test_half_precision_trains_as_well():
    task = conv_task()
    model, _ = aware(task, precision="bfloat16", epochs=3, lr=3e-3)
    assert torch_figure(task, model) > torch_figure(task) - 10
    assert all(tensor.dtype != torch.bfloat16 for tensor in model.state_dict().values())
    seen = []
    layer = nn.Linear(3, 4)
    layer.register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    assert InBfloat16(layer, "cpu")(torch.randn(2, 3)).dtype == torch.float32 and seen == [torch.bfloat16]


# -- errors ------------------------------------------------------------------------------------------------------------
def test_without_training_data_it_says_so_before_it_starts():
    task = conv_task()
    bare = Task(name="bare", model=task.original, calibrate=task.train, test=task.test)
    with pytest.raises(TaskError, match=r"no 'train' data, which quantize\.aware needs"):
        aware(bare)


def test_a_rate_that_breaks_the_numbers_is_named():
    with pytest.raises(NotFinite, match="lower lr"):
        aware(conv_task(), lr=1e30, epochs=2)


def test_bits_that_are_not_there_are_refused():
    for wrong in (1, 9):
        with pytest.raises(RecipeError, match="bits"):
            step("quantize.aware", bits=wrong)
