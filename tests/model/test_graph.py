"""Captured graphs: dimensions that stay free, and graphs that survive as JSON."""

import json

import pytest
import torch
from torch import nn

from featherweight.core.errors import TaskError
from featherweight.model.graph import capture, captured
from featherweight.model.program import dump_graph
from featherweight.model.skeleton import load, save


class FixedByLength(nn.Module):
    """Calls len(x), which fixes the batch for the exporter."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        return self.layer(x).view(len(x), -1, 2, 3).flatten(0, 1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, tokens, mask):
        hidden = self.table(tokens) * mask[..., None]
        return {"logits": self.layer(hidden), "mean": hidden.sum(1) / mask.sum(1, keepdim=True)}


class ByProduct(nn.Module):
    """A size that follows two free dimensions together."""

    def forward(self, x):
        return x.reshape(len(x) * len(x[0]), 3)


class ByValue(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_batch_stays_free_where_code_calls_len():
    model, x = FixedByLength().eval(), torch.randn(2, 5, 4)
    graph = captured(model, {"x": x}, {"x": {0: "batch"}})
    for size in (1, 2, 7):
        x = torch.randn(size, 5, 4)
        assert torch.equal(graph(x), model(x))


def test_several_inputs_and_free_dimensions():
    model = TwoInputs().eval()
    example = {"tokens": torch.randint(0, 11, (2, 6)), "mask": torch.ones(2, 6)}
    free = {name: {0: "batch", 1: "sequence"} for name in example}
    program = capture(model, example, free)
    tokens, mask = torch.randint(0, 11, (3, 9)), torch.ones(3, 9)
    got, want = program.module()(tokens=tokens, mask=mask), model(tokens, mask)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_keep_their_names():
    model = FixedByLength().eval()
    graph = captured(model, {"x": torch.randn(2, 5, 4)}, {"x": {0: "batch"}})
    assert {name: tuple(p.shape) for name, p in graph.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }


def test_a_size_of_two_free_dimensions_together_is_refused():
    free = {"x": {0: "batch", 1: "sequence"}}
    with pytest.raises(TaskError, match="only one dynamic dimension"):
        capture(ByProduct(), {"x": torch.randn(2, 5, 3)}, free)


class Fixed(nn.Module):
    """Computes with a Python number that follows the batch in the way that `use` says."""

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x):
        return self.use(x, len(x))


@pytest.mark.parametrize(
    "use, reason",
    [
        (lambda x, n: x * (n * n), "does not follow it linearly"),
        (lambda x, n: x + x[: n // 2].sum(0), "does not follow it linearly"),
        (lambda x, n: x * max(n, 4), "does not follow it linearly"),
        (lambda x, n: x * (1 / n), "at size 2 the model hands 0.5"),
        (lambda x, n: x.sum(tuple(range(n - 1))), "at size 3"),
        (lambda x, n: x.cumsum(0).reshape([1] * (n - 2) + [-1]), "at size 3"),
        (lambda x, n: x * torch.tensor([0.5, float(n), 1.0]), "constant 'lifted_tensor_0'"),
        (lambda x, n: torch.cat([x[n - 1 - place] for place in range(n)]), "computes differently"),
    ],
)
def test_what_follows_a_size_otherwise_than_linearly_is_refused(use, reason):
    with pytest.raises(TaskError, match=reason) as error:
        captured(Fixed(use).eval(), {"x": torch.randn(2, 5, 3)}, {"x": {0: "batch"}})
    assert "\n" not in str(error.value) and "take sizes from x.shape" in str(error.value)


@pytest.mark.parametrize("use", [lambda x, n: x * (3 * n - 2), lambda x, n: x.new_ones(n + 3, 2).sum() + x[:n]])
def test_what_follows_a_size_linearly_stays_free(use):
    model = Fixed(use).eval()
    graph = captured(model, {"x": torch.randn(2, 5, 3)}, {"x": {0: "batch"}})
    for size in (1, 5, 16):
        x = torch.randn(size, 5, 3)
        torch.testing.assert_close(graph(x), model(x))


def test_a_long_dimension_is_checked_at_shorter_sizes():
    """The halves of 65 and 66, rounded down, lie on a line that shorter ones are off; longer ones the model lacks."""
    table = torch.randn(66, 3)

    class Positions(nn.Module):
        def forward(self, x):
            count = len(x[0])
            return (x + table[:count])[:, : count // 2]

    with pytest.raises(TaskError, match="the dimension 'position' cannot be left dynamic"):
        captured(Positions().eval(), {"x": torch.randn(2, 65, 3)}, {"x": {0: "batch", 1: "position"}})


def test_a_model_that_runs_at_no_further_size_is_refused():
    class Only(nn.Module):
        def forward(self, x):
            if len(x) not in (2, 3):
                raise ValueError("two or three")
            return x * 2

    with pytest.raises(TaskError, match=r"the model runs at none of the sizes \[1, 4, 7\]"):
        captured(Only().eval(), {"x": torch.randn(2, 3)}, {"x": {0: "batch"}})


def test_what_cannot_be_exported_is_refused_in_one_line():
    with pytest.raises(TaskError) as error:
        capture(ByValue(), {"x": torch.randn(2, 3)}, {"x": {0: "batch"}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, example",
    [
        (FixedByLength(), {"x": torch.randn(2, 5, 4)}),
        (TwoInputs(), {"tokens": torch.randint(0, 11, (2, 6)), "mask": torch.ones(2, 6)}),
        (nn.LSTM(4, 5, batch_first=True), {"input": torch.randn(2, 3, 4)}),
    ],
)
def test_a_graph_is_json_and_is_rebuilt_from_it(tmp_path, model, example):
    graph = captured(model.eval(), example, {name: {0: "batch"} for name in example})
    json.dumps(dump_graph(graph), allow_nan=False)
    save(graph, tmp_path / "saved")
    rebuilt = load(tmp_path / "saved")
    for want, got in zip(
        torch.utils._pytree.tree_leaves(graph(**example)), torch.utils._pytree.tree_leaves(rebuilt(**example))
    ):
        assert torch.equal(want, got)
    assert any(p.requires_grad for p in rebuilt.parameters())
