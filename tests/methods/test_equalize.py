"""Cross-layer equalization and smoothing: scales against slow references, outputs that stay as they are."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight.methods.quantize.equalize import MOST, by_input, equalize, equalizing_scales, scaled_inputs
from featherweight.methods.quantize.placement import place, weight_name
from featherweight.methods.quantize.smooth import smooth, smoothing_scales
from featherweight.model.graph import captured
from featherweight.model.norms import attribute, without_norms

RANGES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=8)


class Separable(nn.Module):
    """A chain of depthwise and pointwise convolutions with batch norm, padded apart, as MobileNet has it."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.grouped = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 4)
        for norm in (self.stem_norm, self.depth_norm):
            norm.running_var.copy_(torch.rand(8) * 4 + 0.01)
            norm.running_mean.copy_(torch.randn(8))
            norm.weight.data.copy_(torch.randn(8) * 3)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))))
        x = torch.relu(self.depth_norm(self.depth(nn.functional.pad(x, (1, 1, 1, 1)))))
        x = nn.functional.leaky_relu(self.grouped(torch.relu(self.point(x))), 0.1)
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One layer norm read by linear layers only, and one that a shortcut reads too; a GELU in between."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.wide, self.narrow = (
            nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 24), nn.Linear(24, width)
        )  # fmt: skip
        self.first.weight.data.mul_(torch.rand(width) * 20)

    def forward(self, x):
        y = self.first(x)
        x = self.second(x + self.query(y) * self.key(y))
        return x + self.narrow(nn.functional.gelu(self.wide(x)))


def _captured(model, x):
    module, _, _ = without_norms(captured(model.eval(), {"x": x}, {"x": {0: "batch"}}), {"x": x})
    wanted = {name for node in module.graph.nodes if (name := weight_name(node))}
    return module, place(module.graph, wanted).layers


def _close(one, other):
    return float((one - other).norm() / other.norm()) < 1e-5


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=8))
def test_equalized_ranges_are_the_geometric_mean(pairs):
    first, second = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs))
    scales = equalizing_scales(first, second)
    for scale, one, other in zip(scales.tolist(), *map(torch.Tensor.tolist, (first, second))):
        assert scale == pytest.approx(math.sqrt(one * other) / other, rel=1e-9)  # s_i = sqrt(r1 r2) / r2
        assert one / scale == pytest.approx(other * scale, rel=1e-9)


@given(RANGES, st.floats(0, 1))
def test_smoothing_divides_the_difficulty(pairs, strength):
    activation, weight = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs))
    wanted = [max(1e-5, one**strength / other ** (1 - strength)) for one, other in pairs]
    assert smoothing_scales(activation, weight, strength).tolist() == pytest.approx(wanted, rel=1e-9)


def test_dead_channels_keep_their_scale():
    zero, one = torch.zeros(2), torch.ones(2)
    assert equalizing_scales(zero, one).tolist() == equalizing_scales(one, zero).tolist() == [1, 1]
    assert smoothing_scales(zero, one, 0.5).tolist() == smoothing_scales(one, zero, 0.5).tolist() == [1, 1]


@given(RANGES, st.data())
def test_scales_stay_within_their_range_and_silenced_channels_keep_theirs(pairs, data):
    first, second = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs))
    before = torch.tensor([data.draw(st.floats(1 / MOST, MOST)) for _ in pairs], dtype=torch.float64)
    dead = data.draw(st.integers(0, len(pairs) - 1))
    first[dead] = 1e-30
    scales = equalizing_scales(first, second, before)
    assert ((scales * before >= 0.999 / MOST) & (scales * before <= 1.001 * MOST)).all()
    assert len(pairs) == 1 or scales[dead] == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_inputs_of_grouped_weights_are_those_of_the_convolution(groups):
    weight, x = torch.randn(8, 8 // groups, 3, 3), torch.randn(2, 8, 5, 5)
    scales = torch.rand(8) + 0.5
    want = nn.functional.conv2d(x * scales.view(1, -1, 1, 1), weight, groups=groups)
    assert torch.allclose(
        nn.functional.conv2d(x, scaled_inputs(weight, scales, groups), groups=groups), want, atol=1e-5
    )
    assert by_input(weight, groups).shape[0] == 8


def test_equalization_goes_through_depthwise_chains_and_keeps_the_outputs():
    torch.manual_seed(0)
    model, x = Separable(), torch.randn(4, 3, 12, 12)
    module, layers = _captured(model, x)
    before, names = copy.deepcopy(module), equalize(module, layers)
    assert names == ["depth", "grouped", "head", "point", "stem"]
    with torch.no_grad():
        assert _close(module(x=x), before(x=x))

    def spread(graph, name):
        reach = attribute(graph, name).detach().flatten(1).abs().amax(1)
        return float(reach.max() / reach.min())

    assert spread(module, "depth.weight") < 0.5 * spread(before, "depth.weight")


def test_channels_that_training_has_silenced_do_not_explode():
    """As in a MobileNet trained with weight decay: the norms of some channels have gains of 1e-30, but biases."""
    torch.manual_seed(0)
    model, x = Separable(), torch.randn(4, 3, 12, 12)
    model.stem_norm.weight.data[:3] = 1e-30
    model.depth.weight.data[2:5] = 1e-25
    model.point.weight.data[:, 5:] = 1e-28
    model.grouped.weight.data[:4] *= 1e-20
    module, layers = _captured(model, x)
    before = copy.deepcopy(module)
    largest = max(float(value.detach().abs().max()) for value in before.parameters())
    assert equalize(module, layers)
    assert max(float(value.detach().abs().max()) for value in module.parameters()) < 100 * largest
    with torch.no_grad():
        assert _close(module(x=x), before(x=x))


def test_smoothing_goes_into_norms_or_in_front_and_keeps_the_outputs():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(6, 5, 16) * torch.linspace(0.1, 10, 16)
    module, layers = _captured(model, x)
    before = copy.deepcopy(module)
    names = smooth(module, layers, lambda: [(x,)], 0.5)
    assert names == ["key", "narrow", "query", "wide"]
    with torch.no_grad():
        assert _close(module(x=x), before(x=x))
    assert not torch.equal(attribute(module, "first.weight"), attribute(before, "first.weight"))
    assert torch.equal(attribute(module, "second.weight"), attribute(before, "second.weight"))
    assert {name for name, _ in module.named_buffers()} == {"smooth_1", "smooth_2"}
