"""The training loop: deterministic, alive, and loud when numbers break."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from featherweight.core.context import Context, fingerprint
from featherweight.core.data import Arrays
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.fit import (
    Training,
    fit,
    grouped,
    steps_per_epoch,
    task_loss,
    towards,
    training_inputs,
    weighted,
)
from featherweight.core.metric import mean_squared_error, top1
from featherweight.core.task import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.outer = nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 3)

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(x))))


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 6, generator=generator)
    data = Arrays(x, x[:, :3].argmax(1), augment=lambda x, rng: x + 0.1 * torch.randn(x.shape, generator=rng))
    torch.manual_seed(0)
    return Task(name="argmax", model=Net().eval(), train=data, test=data, batch_size=16)


def context(task: Task, seed: int = 0) -> Context:
    return Context(task, seed=seed, device=torch.device("cpu"))


def test_it_learns_and_leaves_no_trace(task):
    model = task.fresh()
    torch.manual_seed(3)
    state, untouched = torch.get_rng_state(), fingerprint(task.original)
    first = fit(model, context(task), Training(epochs=1, lr=1e-2))
    last = fit(model, context(task), Training(epochs=10, lr=1e-2))
    assert last < 0.7 * first
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(task.original) == untouched


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_same_seed_same_weights_whatever_the_global_state(task, optimizer):
    found = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturb)
        model = task.fresh()
        fit(model, context(task, seed), Training(epochs=2, optimizer=optimizer))
        found.append(fingerprint(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.5, 2), (1, 5), (2.2, 11)])
def test_epochs_may_be_parts(task, epochs, steps):
    seen = []
    fit(task.fresh(), context(task), Training(epochs=epochs), during=lambda model, t: seen.append(t))
    assert steps_per_epoch(context(task), 16) == 5
    assert seen == [place / steps for place in range(steps)] + [1.0]


def test_inputs_are_counted_not_batches(task):
    ready = replace(task, train=list(task.batches("train", 9)))
    assert training_inputs(context(task)) == training_inputs(context(ready)) == 70
    with pytest.raises(TaskError, match="has no 'train' data"):
        training_inputs(context(replace(task, train=None)))


def test_the_rate_warms_up_and_ends_near_nought(task, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *rest: (rates.append(self.param_groups[0]["lr"]), step(self, *rest))[1]
    )
    fit(task.fresh(), context(task), Training(epochs=8, optimizer="sgd", lr=0.1, warmup=0.1))
    assert len(rates) == 40 and rates[:4] == sorted(rates[:4]) and rates[0] < 0.03
    assert max(rates) == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.001


def test_a_loss_that_is_nan_stops_at_once(task):
    calls = []

    def loss(output, batch):
        calls.append(1)
        return output.sum() * (math.nan if len(calls) == 3 else 0.0)

    with pytest.raises(NotFinite, match=r"the loss became nan at step 3 of 5 of training; lower lr \(it is 0\.001\)"):
        fit(replace(task, loss=loss).fresh(), context(replace(task, loss=loss)), Training())
    assert len(calls) == 3


def test_no_data_nothing_to_train_and_an_iterable_that_is_used_up(task):
    with pytest.raises(TaskError, match="has no 'train' data"):
        fit(task.fresh(), context(replace(task, train=None)), Training())
    with pytest.raises(TaskError, match="no trainable parameter"):
        fit(task.fresh().requires_grad_(False), context(task), Training())
    used = iter([])
    with pytest.raises(TaskError, match="must start anew each time"):
        fit(task.fresh(), context(replace(task, train=used)), Training())


def test_batches_that_come_ready_are_taken_as_they_are(task):
    ready = [task.train.batch(torch.arange(start, start + 10)) for start in (0, 10, 20)]
    seen = []
    listed = replace(task, train=ready)
    fit(listed.fresh(), context(listed), Training(epochs=2), during=lambda model, t: seen.append(t))
    assert len(seen) == 7


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.outer(torch.relu(self.norm(self.inner(x))))


@pytest.mark.parametrize("ready", [False, True])
def test_a_last_batch_of_one_is_left_out_and_said(task, ready):
    """Batch norm cannot be trained on it."""
    sizes, data = [], Arrays(*(tensor[:49] for tensor in task.train.tensors))
    if ready:
        data = [data.batch(torch.arange(start, min(start + 16, 49))) for start in (0, 16, 32, 48)]

    def loss(output, batch):
        sizes.append(len(output))
        return nn.functional.cross_entropy(output, batch[1])

    lone = replace(task, model=Normed().eval(), train=data, loss=loss)
    ctx = context(lone)
    fit(lone.fresh(), ctx, Training(epochs=2))
    assert sizes == [16] * (8 if ready else 6)
    assert ctx.record.warnings == [
        "training: a last batch of one input was left out of each epoch; another batch_size would use it"
    ]
    assert steps_per_epoch(ctx, 16) == (4 if ready else 3)


def test_batches_of_one_input_are_used_or_refused_in_one_line(task):
    ctx = context(task)
    fit(task.fresh(), ctx, Training(epochs=0.1, batch_size=1))
    assert ctx.record.warnings == [] and steps_per_epoch(ctx, 1) == 70
    normed = replace(task, model=Normed().eval())
    with pytest.raises(TaskError, match="batch norm cannot be trained on a batch of one input; set batch_size"):
        fit(normed.fresh(), context(normed), Training(batch_size=1))
    single = replace(task, train=Arrays(*(tensor[:1] for tensor in task.train.tensors)))
    fit(single.fresh(), context(single), Training(epochs=2))


def test_the_teacher_teaches_outputs_that_are_no_classes():
    """One column, judged by classes or not: softened classes would be equal whatever the model gives."""
    x = torch.randn(64, 6)
    for metric in (mean_squared_error(), top1()):
        task = Task(name="one", model=nn.Linear(6, 1).eval(), train=Arrays(x, x[:, :1]), metric=metric)
        student = nn.Linear(6, 1)
        before = (student(x) - task.original(x)).square().mean().item()
        loss = fit(student, context(task), Training(epochs=100, lr=0.03, teacher=1.0))
        assert loss > 0 and (student(x) - task.original(x)).square().mean().item() < 0.1 * before


def test_classes_are_taught_as_softened_classes(task):
    ctx, batch = context(task), next(iter(task.batches("train")))
    output = nn.Linear(6, 3)(batch[0])
    terms = {name: towards(2.0, loss=name)(task.original, batch, output, ctx) for name in ("auto", "kl", "mse")}
    assert terms["auto"] == terms["kl"] != terms["mse"]


def test_softened_classes_of_one_column_are_refused():
    x = torch.randn(8, 6)
    task = Task(name="one", model=nn.Linear(6, 1).eval(), train=Arrays(x, x[:, :1]))
    with pytest.raises(TaskError, match=r"shape \(8, 1\) are no scores of several classes"):
        towards(2.0, loss="kl")(task.original, (x, x[:, :1]), task.original(x), context(task))


def test_frozen_parameters_do_not_move(task):
    model = task.fresh()
    model.inner.weight.requires_grad_(False)
    before = model.inner.weight.clone()
    fit(model, context(task), Training(weight_decay=0.1))
    assert torch.equal(model.inner.weight, before) and not torch.equal(model.outer.weight, task.original.outer.weight)


def test_terms_are_weighted_and_those_of_weight_nought_not_computed(task):
    def broken(model, batch, output, ctx):
        raise AssertionError("computed")

    model, ctx, batch = task.original, context(task), next(iter(task.batches("train")))
    output = model(batch[0])
    twice = weighted([(2.0, task_loss), (0.0, broken)])(model, batch, output, ctx)
    assert torch.allclose(twice, 2 * task_loss(model, batch, output, ctx))


def test_generators_depend_on_seed_and_purpose_only(task):
    draws = [
        torch.rand(1, generator=context(task, seed).generator(purpose)).item()
        for seed, purpose in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    ]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_a_group_has_its_own_rate_and_decay_and_the_rest_the_schedule(task):
    model = task.fresh()
    slow = [model.inner.weight, nn.Parameter(torch.ones(1))]  # the second is no parameter of the model
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit(model, context(task), Training(lr=1e-2), groups=[{"params": slow, "lr": 1e-9, "weight_decay": 0.0}])
    after = dict(model.named_parameters())
    assert torch.allclose(after["inner.weight"], before["inner.weight"], atol=1e-6)
    assert (after["outer.weight"] - before["outer.weight"]).abs().max() > 1e-4
    parts = grouped(list(model.parameters()), [{"params": slow, "lr": 1.0}])
    assert [len(part["params"]) for part in parts] == [len(before) - 1, 1] and parts[1]["lr"] == 1.0


def test_what_comes_after_a_step_may_change_weights_and_what_the_optimizer_remembers(task):
    """A weight set to zero after every step, its moments too, ends at zero; gradients are there to look at."""
    model, seen = task.fresh(), []

    def after(optimizer, t):
        weight = model.inner.weight
        seen.append((t, float(weight.grad.abs().sum()) > 0, set(optimizer.state[weight])))
        with torch.no_grad():
            weight[0] = 0.0
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][moment][0] = 0.0

    fit(model, context(task), Training(epochs=2), after=after)
    steps = 2 * steps_per_epoch(context(task), 16)
    assert [t for t, _, _ in seen] == [(done + 1) / steps for done in range(steps)]
    assert all(gradient and {"exp_avg", "exp_avg_sq"} <= state for _, gradient, state in seen)
    assert bool((model.inner.weight[0] == 0).all()) and bool((model.inner.weight[1:] != 0).all())


def test_training_in_bfloat16_computes_products_in_it_and_keeps_weights_and_loss_in_float32(task):
    seen: dict[str, set[torch.dtype]] = {"product": set(), "output": set(), "teacher": set()}

    def term(model, batch, output, ctx):
        seen["output"].add(output.dtype)
        seen["teacher"].add(ctx.task.call(ctx.teacher, batch).dtype)
        return task_loss(model, batch, output, ctx)

    model, ctx = task.fresh(), context(task)
    model.inner.register_forward_hook(lambda _module, _inputs, output: seen["product"].add(output.dtype))
    narrow = fit(model, ctx, Training(epochs=10, lr=1e-2, precision="bfloat16"), term)
    assert seen == {"product": {torch.bfloat16}, "output": {torch.float32}, "teacher": {torch.bfloat16}}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert narrow == pytest.approx(fit(task.fresh(), ctx, Training(epochs=10, lr=1e-2)), rel=0.05)


def test_training_in_float32_is_not_narrowed(task):
    model, seen = task.fresh(), set()
    model.inner.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    fit(model, context(task), Training(epochs=1))
    assert seen == {torch.float32}
