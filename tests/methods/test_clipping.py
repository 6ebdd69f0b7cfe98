"""Learned ranges of activations: gradients against a slow reference in float64, and what they repair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.methods.quantize.clipping import LearnedRange, on_grid
from featherweight.model.port import Port

CPU = torch.device("cpu")


def reference(values, scale, zero, top, gradient):
    """arXiv:1902.08153, equation 3, and arXiv:2004.09576, equations 6 and 7, one number at a time; `zero` is whole."""
    output, to_values, to_scale, to_zero = [], [], 0.0, 0.0
    for value, each in zip(values.tolist(), gradient.tolist()):
        v = value / scale
        integer = round(v) + zero  # Python rounds half to even, as torch does
        inside = 0 <= integer <= top
        level = min(max(integer, 0), top) - zero
        output.append(level * scale)
        to_values.append(each if inside else 0.0)
        to_scale += each * (round(v) - v if inside else level)
        to_zero += 0.0 if inside else -each * scale
    return output, to_values, to_scale, to_zero


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([3, 15, 255]), st.floats(0, 1), st.floats(0.01, 3), st.integers(1, 60), st.integers(0, 10**6))
def test_values_and_gradients_are_those_of_the_papers(top, share, scale, count, seed):
    zero, generator = round(share * top), torch.Generator().manual_seed(seed)
    steps = (torch.rand(count, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * top - zero
    steps = torch.where((steps - steps.floor() - 0.5).abs() < 1e-3, steps + 0.01, steps)  # no ties: rounding decides
    values, gradient = steps * scale, torch.randn(count, generator=generator, dtype=torch.float64)
    given_values, given_scale, given_zero = (
        part.clone().requires_grad_()
        for part in (values, torch.tensor(scale, dtype=torch.float64), torch.tensor(zero, dtype=torch.float64))
    )
    output = on_grid(given_values, given_scale, given_zero, top)
    output.backward(gradient)
    want, to_values, to_scale, to_zero = reference(values, scale, zero, top, gradient)
    assert output.tolist() == pytest.approx(want, rel=1e-12)
    assert given_values.grad.tolist() == pytest.approx(to_values, rel=1e-12)
    size = 1e-9 * count * top * max(1.0, scale)
    assert float(given_scale.grad) == pytest.approx(to_scale, rel=1e-9, abs=size)
    assert float(given_zero.grad) == pytest.approx(to_zero, rel=1e-9, abs=size)


@given(st.floats(-1, 1), st.floats(-0.5, 0.5), st.sampled_from([2, 4, 8]), st.floats(0, 1))
def test_what_is_learned_ends_as_the_port_that_it_was(growth, shift, bits, share):
    port = Port(0.3, round(share * (2**bits - 1)), bits)
    learned = LearnedRange(port)
    x = torch.linspace(-3, 3, 50)
    assert torch.allclose(learned(x), port(x), atol=1e-5) and learned.shift.requires_grad == (port.zero > 0)
    with torch.no_grad():
        learned.growth.fill_(growth)
        learned.shift.fill_(shift)
    settled = learned.settled()
    assert settled.scale == pytest.approx(0.3 * math.exp(growth), rel=1e-5)
    assert settled.zero == pytest.approx(min(port.top, max(0, port.zero + shift * port.top)), abs=0.501)


def quantized(task, **given_settings):
    item = step("quantize.static", bias_correction=False, **given_settings)
    return run_step(item, task.fresh(), Context(task, device=CPU))


def apart(task, model):
    x = task.test.tensors[0][:128]
    with torch.no_grad():
        return float((model(x) - task.original(x)).norm() / task.original(x).norm())


def ports(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Port)}


@pytest.mark.parametrize("make", [conv_task, transformer_task])
@pytest.mark.parametrize("rounding", ["nearest", "block"])
def test_learned_ranges_are_nearer_to_the_original(make, rounding):
    task, given_settings = make(), {"activation_bits": 3, "rounding": rounding, "iterations": 60}
    calibrated, _ = quantized(task, bits=6, **given_settings)
    learned, record = quantized(task, bits=6, clipping="learned", **given_settings)
    assert apart(task, learned) < 0.9 * apart(task, calibrated)
    assert all("range" in how and "learned" in how for how in record.changed.values())
    grids = [[(port.scale, port.zero, port.bits) for port in ports(model).values()] for model in (calibrated, learned)]
    assert grids[0] != grids[1] and [each[2] for each in grids[0]] == [each[2] for each in grids[1]]


def test_ports_on_one_grid_stay_on_one_grid_and_the_runtime_agrees(tmp_path):
    task = conv_task()
    model, _ = quantized(task, activation_bits=4, clipping="learned", iterations=10, calibration="mse")
    found = ports(model)
    pooled = next(name for name in found if "max_pool" in name)
    before = model.graph.find_nodes(op="call_module", target=pooled)[0].args[0].args[0]
    assert (found[pooled].scale, found[pooled].zero) == (found[before.target].scale, found[before.target].zero)
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "file")
    assert artifact.manifest.evidence["integer_kernels"]["QLinearConv"] == 3


def test_same_seed_same_ranges():
    one, other = (ports(quantized(conv_task(), clipping="learned", iterations=5)[0]) for _ in range(2))
    assert {name: port.scale for name, port in one.items()} == {name: port.scale for name, port in other.items()}


def test_a_range_with_nothing_below_zero_keeps_its_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    task = conv_task()
    task = type(task)(name="plain", model=model, batch_size=64, calibrate=task.calibrate, test=task.test)
    made, _ = quantized(task, activation_bits=4, clipping="learned", iterations=20)
    assert all(port.zero == 0 for port in ports(made).values())
