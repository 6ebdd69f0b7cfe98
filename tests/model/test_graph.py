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
