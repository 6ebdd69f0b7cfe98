"""Factors in place of layers: what is put in, what it costs, what is left alone, and that it runs everywhere."""

import numpy as np
import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, fingerprint, run_recipe, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.fit import Training
from featherweight.core.outputs import as_arrays
from featherweight.core.recipe import Recipe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.factored import Factored, TensorTrain, TensorTrainEmbedding
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
CASES = [
    ("factor.svd", conv_task, {"keep": 0.6}),
    ("factor.svd", conv_task, {"keep": 0.6, "whiten": False, "allocation": "layer"}),
    ("factor.svd", transformer_task, {"keep": 0.7, "allocation": "sensitivity"}),
    ("factor.tucker", conv_task, {"keep": 0.6}),
    ("factor.cp", conv_task, {"keep": 0.5}),
    ("factor.cp", conv_task, {"keep": 0.5, "kernel": "whole"}),
    ("factor.train", transformer_task, {"keep": 0.6}),
    ("factor.train", conv_task, {"keep": 0.8, "cores": 3}),
]


def made(task: Task, kind: str, **given):
    return run_step(step(kind, **given), task.fresh(), Context(task, device=CPU))


def off(got, wanted) -> float:
    """How far outputs are from others: root mean square over that of the others."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def layer_by_name(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def weights(module: nn.Module) -> int:
    return sum(each.numel() for name, each in module.named_parameters() if "bias" not in name)


@pytest.mark.parametrize(("kind", "make", "given"), CASES)
def test_factored_layers_are_smaller_saved_trained_and_exported(kind, make, given, tmp_path):
    task = make()
    model, record = made(task, kind, **given)
    whole = sum(weights(layer_by_name(task.original, name)) for name in record.changed)
    found = sum(weights(layer_by_name(model, name)) for name in record.changed)
    # an allocation over all layers leaves some whole; budgets over those have a test of their own
    if given.get("allocation", "layer" if kind != "factor.svd" else "energy") == "layer":
        assert found <= whole * given["keep"]
    assert record.parameters_before - record.parameters_after == whole - found > 0
    every = {n for n, m in task.original.named_modules() if any(True for _ in m.parameters(recurse=False))}
    named = {each.layer for each in record.left} | record.changed.keys()
    assert every - {""} <= named, "no layer is passed over without a word"
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", like=task.original)
    assert fingerprint(again) == fingerprint(model)
    artifact = target("onnxruntime").export(again, task.example, tmp_path / "artifact")
    images = task.test.tensors[0][:50]
    with torch.no_grad():
        wanted = as_arrays(model(images))
    assert off(artifact.open()(images), wanted) < 1e-4
    before = [each.detach().clone() for each in model.parameters()]
    Context(task, device=CPU).fit(model, Training(epochs=0.1, lr=1e-3))
    assert all(not torch.equal(one, other) for one, other in zip(before, model.parameters()))


@pytest.mark.parametrize(
    ("kind", "make"), [("factor.svd", conv_task), ("factor.tucker", conv_task), ("factor.train", transformer_task)]
)
def test_the_more_parameters_the_less_is_lost(kind, make):
    task = make()
    errors = []
    for keep in (0.3, 0.6, 0.95):
        model, _ = made(task, kind, keep=keep)
        images = task.test.tensors[0]
        with torch.no_grad():
            errors.append(off(model(images), task.original(images)))
    assert errors[2] < errors[1] < errors[0]
    if kind == "factor.svd":
        assert errors[2] < 0.35


def test_a_convolution_in_factors_computes_its_weight_wherever_it_is_applied():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="circular")
            self.two = nn.Conv2d(12, 10, 3, padding="same")

        def forward(self, x):
            return self.two(torch.relu(self.one(x))).mean((2, 3))

    torch.manual_seed(1)
    images = torch.randn(64, 8, 9, 11)
    data = {name: (images, torch.zeros(64, dtype=torch.long)) for name in ("train", "validate", "test")}
    task = Task(
        name="applied",
        model=Net().eval(),
        **{name: torch.utils.data.TensorDataset(*each) for name, each in data.items()},
    )
    for kind, given in [
        ("factor.svd", {"allocation": "layer", "keep": 0.99}),
        ("factor.tucker", {"keep": 0.99}),
        ("factor.cp", {"keep": 0.99}),
        ("factor.cp", {"keep": 0.99, "kernel": "whole"}),
    ]:
        model, record = made(task, kind, **given)
        assert set(record.changed) == {"one", "two"}
        for name in record.changed:
            layer, parts = layer_by_name(task.original, name), layer_by_name(model, name)
            x = torch.randn(3, layer.in_channels, 9, 11)
            with torch.no_grad():
                # the sequence is linear: what it does to single inputs is the weight that it stands for
                eye = torch.zeros(1, layer.in_channels, 9, 11)
                assert parts(x).shape == layer(x).shape
                assert torch.allclose(parts(2 * x) - parts(eye), 2 * (parts(x) - parts(eye)), atol=1e-4)
                assert off(parts(x), layer(x)) < 0.6


def test_whitened_factors_miss_less_of_the_outputs_than_plain_ones():
    task = transformer_task()
    seen = {}
    Context(task, device=CPU).observe(task.original, {"wide": lambda given, out: seen.update(x=given[0])})
    errors = {}
    for whiten in (True, False):
        model, _ = made(task, "factor.svd", keep=0.4, whiten=whiten, allocation="layer", only="wide")
        with torch.no_grad():
            errors[whiten] = off(model.wide(seen["x"]), task.original.wide(seen["x"]))
    assert errors[True] < 0.9 * errors[False]


def test_budgets_are_kept_and_ranks_are_multiples():
    task = transformer_task()
    for allocation in ("energy", "layer", "sensitivity"):
        model, record = made(task, "factor.svd", keep=0.6, allocation=allocation, multiple=4)
        names = ["embed", "attend.query", "attend.key", "attend.value", "attend.out", "wide", "narrow", "head"]
        open_ = [
            n for n in names if n in record.changed or "worth more" in str([x for x in record.left if x.layer == n])
        ]
        whole = sum(weights(layer_by_name(task.original, name)) for name in open_)
        assert sum(weights(layer_by_name(model, name)) for name in open_) <= 0.6 * whole + 1
        ranks = [layer_by_name(model, name)[0].out_features for name in record.changed]
        assert all(rank % 4 == 0 or rank < 8 for rank in ranks) and any(rank % 4 == 0 for rank in ranks)


def test_a_budget_that_no_ranks_meet_is_said():
    task = transformer_task()
    for allocation in ("energy", "layer"):
        _, record = made(task, "factor.svd", keep=0.01, allocation=allocation)
        assert any("keep=0.01" in text for text in record.warnings)


def test_cores_are_layers_that_are_quantized():
    task = transformer_task()
    recipe = Recipe([step("factor.train", keep=0.6), step("quantize.weights", bits=4, group=None)])
    model, _ = run_recipe(recipe, Context(task, device=CPU))
    assert isinstance(model.wide, TensorTrain)
    assert {name for name in encodings(model) if name.startswith("wide.")} == {
        "wide.cores.0.weight",
        "wide.cores.1.weight",
    }


class Words(nn.Module):
    """A table of words, an average, a head: N x T to N x 10."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(97, 16, padding_idx=0), nn.Linear(16, 16), nn.Linear(16, 10)
        self.again = nn.Linear(16, 97, bias=False) if tied else None
        if self.again is not None:
            self.again.weight = self.words.weight

    def forward(self, x):
        x = self.mix(self.words(x).mean(1))
        return self.head(x) if self.again is None else self.head(x) + self.again(x)[:, :10]


def words_task(tied: bool = False) -> Task:
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randint(0, 97, (64, 6), generator=generator), torch.randint(0, 10, (64,), generator=generator)
    )
    torch.manual_seed(0)
    return Task(name="words", model=Words(tied).eval(), train=data, validate=data, test=data)


@pytest.mark.parametrize(("kind", "type_"), [("factor.svd", Factored), ("factor.train", TensorTrainEmbedding)])
def test_tables_are_factored_on_request(kind, type_, tmp_path):
    task = words_task()
    plain, record = made(task, kind, keep=0.8)
    assert isinstance(plain.words, nn.Embedding)
    model, record = made(task, kind, keep=0.8, embeddings=True)
    assert isinstance(model.words, type_) and "words" in record.changed
    indices = torch.arange(97).reshape(1, 97)
    with torch.no_grad():
        near, wanted = model.words(indices), task.original.words(indices)
    assert near.shape == wanted.shape and off(near, wanted) < 0.8
    artifact = target("onnxruntime").export(model, task.example, tmp_path / "artifact")
    batch = next(iter(task.batches("test")))
    with torch.no_grad():
        assert np.allclose(artifact.open()(batch[0]), as_arrays(model(batch[0])), atol=1e-4)
    save(model, tmp_path / "model")
    assert fingerprint(load(tmp_path / "model", like=task.original)) == fingerprint(model)


def test_what_cannot_be_factored_is_named():
    task = words_task(tied=True)
    _, record = made(task, "factor.svd", embeddings=True)
    reasons = {each.layer: each.reason for each in record.left}
    assert reasons["words"] == "shares its weight with another layer, which this would end"
    conv = conv_task()
    _, record = made(conv, "factor.tucker")
    reasons = {each.layer: each.reason for each in record.left}
    assert reasons["depth"] == "has groups of channels, which are thin already"
    assert reasons["head"] == "is no convolution with a kernel above one; factor.svd is for it"
    assert reasons["conv_norm"] == "is a BatchNorm2d; nothing is put in its place"
    recipe = Recipe([step("prune.weights", sparsity=0.5), step("factor.svd")])
    with pytest.raises(NoEffect, match="is pruned, and what takes its place would have no zeros"):
        run_recipe(recipe, Context(conv, device=CPU))


def test_weights_used_without_their_layer_are_left_alone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 5, 16), torch.zeros(32, dtype=torch.long))
    task = Task(name="mixed", model=Net().eval(), train=data, validate=data, test=data)
    _, record = made(task, "factor.svd", keep=0.5)
    reasons = {each.layer: each.reason for each in record.left}
    assert "head" in record.changed and "mix.out_proj" in reasons
