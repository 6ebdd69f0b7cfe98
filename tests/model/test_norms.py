"""Batch norm folded on captured graphs."""

import pytest
import torch
from torch import nn

from featherweight.model.graph import CAPTURED, captured
from featherweight.model.norms import aten, fold_norms, folded, without_norms


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.normal_()
    return model.eval()


def _norms(graph) -> int:
    return sum(node.target is aten.batch_norm.default for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "layer, norm, x",
    [
        (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), torch.randn(2, 3, 9, 9)),
        (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False), torch.randn(2, 4, 9, 9)),
        (nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), torch.randn(2, 3, 9, 9)),
        (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), torch.randn(2, 3, 9)),
        (nn.Linear(5, 8), nn.BatchNorm1d(8), torch.randn(2, 5)),
    ],
)
def test_folding_changes_no_output(layer, norm, x):
    model = _with_statistics(nn.Sequential(layer, norm, nn.ReLU()))
    graph = captured(model, {"input": x}, {"input": {0: "batch"}})
    assert fold_norms(graph) == ["0"]
    assert _norms(graph) == 0
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    assert graph.get_submodule("0").weight.requires_grad


def test_a_norm_that_does_not_follow_a_layer_stays():
    model = _with_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)))
    x = torch.randn(2, 3, 6, 6)
    graph = captured(model, {"input": x}, {"input": {0: "batch"}})
    assert fold_norms(graph) == [] and _norms(graph) == 1


class Shared(nn.Module):
    """One convolution used twice, with a norm behind one use."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(torch.relu(x))


def test_a_weight_that_is_used_twice_keeps_its_norm():
    model, x = _with_statistics(Shared()), torch.randn(2, 3, 6, 6)
    graph = captured(model, {"x": x}, {"x": {0: "batch"}})
    assert fold_norms(graph) == []
    torch.testing.assert_close(graph(x), model(x))


def test_the_formula_against_plain_numbers():
    weight, bias = folded(
        torch.tensor([[2.0], [3.0]]),
        torch.tensor([1.0, 1.0]),
        (*(torch.tensor(pair) for pair in ([2.0, 1.0], [0.0, 5.0], [1.0, 0.0], [4.0, 1.0])), 0.0),
        0,
    )
    assert weight.flatten().tolist() == [2.0, 3.0] and bias.tolist() == [0.0, 6.0]


def test_a_norm_over_a_sequence_stays():
    model = _with_statistics(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)))
    x = torch.randn(2, 16, 8)
    graph = captured(model, {"input": x}, {"input": {0: "batch"}})
    assert fold_norms(graph) == []
    torch.testing.assert_close(graph(x), model(x))


class Functional(nn.Module):
    """Two convolutions without a bias whose weights, and a bias of the user's own, are parameters of one module."""

    def __init__(self, names=("w1_weight", "w2_weight")):
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4, 3, 3)))
        self.bias = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        weights = [getattr(self, name) for name in self.names]
        x = torch.relu(self.one(nn.functional.conv2d(x, weights[0], padding=1))) + self.bias
        return self.two(nn.functional.conv2d(x, weights[1], padding=1))


@pytest.mark.parametrize(
    "names, biases",
    [
        (("w1_weight", "w2_weight"), {"w1_bias", "w2_bias"}),
        (("weight", "kernel"), {"bias_1", "kernel_bias"}),
    ],
)
def test_a_new_bias_takes_no_name_that_is_taken(names, biases):
    model, x = _with_statistics(Functional(names)), torch.randn(2, 4, 6, 6)
    graph = captured(model, {"x": x}, {"x": {0: "batch"}})
    assert len(fold_norms(graph)) == 2 and _norms(graph) == 0
    assert dict(graph.named_parameters()).keys() == {*names, "bias", *biases}
    assert torch.equal(graph.bias, model.bias)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer, norm, x",
    [
        (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.randn(2, 3, 9, 9)),
        (nn.Linear(5, 8), nn.BatchNorm1d(8), torch.randn(2, 5)),
    ],
)
def test_norms_are_folded_where_the_outputs_stay(layer, norm, x):
    model = _with_statistics(nn.Sequential(layer, norm))
    graph = captured(model, {"input": x}, {"input": {0: "batch"}})
    made, layers, reason = without_norms(graph, {"input": x})
    assert (layers, reason) == (["0"], "") and _norms(made) == 0 and _norms(graph) == 1
    assert type(made).__name__ == type(graph).__name__ == CAPTURED
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


def at_the_edge() -> nn.Sequential:
    """The norm takes away a mean beside which what is left is rounding: folded, another rounding is left."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        model[0].bias.fill_(1e5)
        model[1].running_mean.fill_(1e5)
        model[1].running_var.fill_(1e-6)
    return model


def test_norms_stay_where_folding_changes_the_outputs():
    model, x = at_the_edge(), torch.randn(2, 3, 9, 9)
    graph = captured(model, {"input": x}, {"input": {0: "batch"}})
    same, layers, reason = without_norms(graph, {"input": x})
    assert same is graph and layers == [] and "'output' differs by" in reason
    assert torch.equal(graph(x), model(x))
