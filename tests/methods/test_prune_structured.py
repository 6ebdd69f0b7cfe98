"""Structured pruning: what it reaches, what it leaves, what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import accuracy, conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featherweight.core.context import Context, count_parameters, fingerprint, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect, RecipeError, TaskError
from featherweight.core.fit import Training
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.methods.prune.structured import StructuredPrune
from featherweight.model.recalibrate import recalibrate
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


class Wide(nn.Module):
    """Three convolutions with batch norm, one of them in a shortcut, and a linear layer: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.inner, self.inner_norm = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.back, self.back_norm = nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        return self.head(torch.relu(x + self.back_norm(self.back(y))).mean((2, 3)))


def context(task: Task) -> Context:
    return Context(task, device=CPU)


def wide_task(labels: bool = True) -> Task:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)
    torch.manual_seed(0)
    calibrate = Arrays(x, y) if labels else [x[:32], x[32:]]
    return Task(
        name="wide",
        model=Wide().eval(),
        train=Arrays(x, y),
        calibrate=calibrate,
        validate=Arrays(x, y),
        test=Arrays(x, y),
    )


def pruned(task: Task, width_multiple: int = 1, **settings: Any) -> tuple[Any, Context]:
    ctx = Context(task, device=CPU, width_multiple=width_multiple)
    model, _ = run_step(StructuredPrune(**settings), task.fresh(), ctx)
    return model, ctx


def macs(model: nn.Module, task: Task) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**task.example)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("score", ["l1", "l2", "bn", "taylor", "fisher"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_share_of_multiply_accumulates_is_reached(score: str, scope: str):
    task = wide_task()
    model, ctx = pruned(task, keep=0.5, score=score, scope=scope)
    assert 0.47 <= macs(model, task) / macs(task.original, task) <= 0.5
    assert ctx.record.warnings == []
    assert type(model) is Wide


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_the_share_of_parameters_is_reached(keep: float):
    task = wide_task()
    model, _ = pruned(task, keep=keep, of="parameters")
    assert keep - 0.03 <= count_parameters(model) / count_parameters(task.original) <= keep


def test_widths_are_multiples_of_what_the_target_likes():
    task = wide_task()
    by_target, _ = pruned(task, width_multiple=8, keep=0.5)
    by_setting, _ = pruned(task, width_multiple=16, keep=0.5, multiple=8)
    for model in (by_target, by_setting):
        assert [layer.out_channels % 8 for layer in (model.stem, model.inner, model.back)] == [0, 0, 0]
        assert (
            model.stem.out_channels == model.back.out_channels == model.head.in_features == model.stem_norm.num_features
        )
    assert by_target.inner.weight.shape == by_setting.inner.weight.shape


def test_every_group_keeps_its_least():
    model, ctx = pruned(wide_task(), keep=0.05, min_keep=0.5)
    assert (model.stem.out_channels, model.inner.out_channels) == (16, 32)
    assert len(ctx.record.warnings) == 1
    assert "kept 2" in ctx.record.warnings[0] and "not 5.0%" in ctx.record.warnings[0]


def test_every_layer_is_reported():
    model, ctx = pruned(wide_task(), keep=0.5, scope="layer")
    assert set(ctx.record.changed) == {"stem", "inner", "back", "head"}
    assert ctx.record.changed["stem"] == f"32 -> {model.stem.out_channels}"
    assert ctx.record.changed["inner"] == f"64 -> {model.inner.out_channels}, inputs 32 -> {model.stem.out_channels}"
    assert ctx.record.changed["head"] == f"inputs 32 -> {model.stem.out_channels}"


@pytest.mark.parametrize("settings", [{"only": "inner"}, {"skip": ["stem"]}, {"only": "inner,back"}])
def test_a_group_is_cut_only_if_all_who_produce_it_are_chosen(settings: dict[str, Any]):
    model, ctx = pruned(wide_task(), keep=0.6, **settings)
    assert model.stem.out_channels == model.back.out_channels == 32
    assert model.inner.out_channels < 64
    reasons = {left.layer: left.reason for left in ctx.record.left}
    assert "only=" in reasons["stem"] or "skip=" in reasons["stem"]


def test_a_pattern_that_matches_nothing_is_named():
    _, ctx = pruned(wide_task(), keep=0.6, skip=["stemm"])
    assert any("'stemm'" in text for text in ctx.record.warnings)


def test_nothing_to_remove_is_an_error_even_with_recalibration():
    with pytest.raises(NoEffect, match=r"prune\.structured changed nothing"):
        pruned(wide_task(), keep=0.5, only="nothing")


def test_lost_outputs_are_the_least_important_ones():
    task = wide_task()
    original: Any = task.original
    for tensor in (
        original.inner.weight.data,
        original.inner_norm.weight.data,
        original.back.weight.data.transpose(0, 1),
    ):
        tensor[5:37] *= 1e-3
    model, _ = pruned(task, keep=0.53, only="inner", recalibrate=False)
    large = original.inner.weight[[*range(5), *range(37, 64)]]
    kept = model.inner.weight[model.inner.weight.flatten(1).norm(dim=1) > 0.1]
    assert torch.equal(kept, large) and len(large) <= len(model.inner.weight) < 40
    with torch.no_grad():
        torch.testing.assert_close(model(**task.example), original(**task.example), rtol=1e-2, atol=1e-3)


def test_taylor_keeps_what_the_loss_needs():
    """A unit with large weights that the loss does not see goes first; by magnitude it would have stayed."""
    task = wide_task()
    original: Any = task.original
    original.inner.weight.data[:16] *= 30
    original.back.weight.data[:, :16] = 0
    by_loss, _ = pruned(task, keep=0.76, of="parameters", only="inner", score="taylor")
    by_size, _ = pruned(task, keep=0.76, of="parameters", only="inner", score="l1")
    largest = original.inner.weight.abs().max()
    assert by_loss.inner.weight.abs().max() < largest / 10
    assert by_size.inner.weight.abs().max() == largest


def test_taylor_without_labels_says_so():
    with pytest.raises(TaskError, match="score=taylor needs labels in the calibration split"):
        pruned(wide_task(labels=False), keep=0.5, score="taylor")
    pruned(wide_task(labels=False), keep=0.5, score="l2")


def test_batch_norm_scores_need_batch_norms():
    task = transformer_task()
    ctx = context(task)
    with pytest.raises(NoEffect):
        run_step(StructuredPrune(keep=0.8, score="bn"), task.fresh(), ctx)
    reasons = {left.layer: left.reason for left in ctx.record.left}
    assert reasons["wide"] == "it has no batch norm whose scale could be its score"


def test_rounds_reach_the_same_share_in_smaller_steps():
    task = wide_task()
    model, ctx = pruned(task, keep=0.4, rounds=3, score="taylor")
    assert 0.36 <= macs(model, task) / macs(task.original, task) <= 0.4
    assert set(ctx.record.changed) == {"stem", "inner", "back", "head"}
    assert ctx.record.changed["stem"].startswith("32 -> ")


def test_rounds_too_small_for_a_whole_step_do_not_end_the_method():
    task = wide_task()
    model, ctx = pruned(task, keep=0.5, rounds=12, multiple=16)
    assert macs(model, task) / macs(task.original, task) <= 0.5
    assert ctx.record.changed


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_widths_and_shares_hold_over_all_rounds(rounds: int):
    task = wide_task()
    whole = task.fresh()
    for settings in ({"multiple": 16}, {"min_keep": 0.5, "multiple": 1}):
        model, _ = pruned(task, keep=0.1, rounds=rounds, **settings)
        widths = {name: getattr(model, name).out_channels for name in ("stem", "inner", "back")}
        least = {name: getattr(whole, name).out_channels * settings.get("min_keep", 0) for name in widths}
        assert all(width % settings["multiple"] == 0 and width >= least[name] for name, width in widths.items())


def test_retraining_heals():
    task = conv_task()
    settings: dict[str, Any] = {"keep": 0.5, "score": "l2", "recalibrate": False}
    cold, _ = pruned(task, **settings)
    healed, _ = pruned(task, **settings, rounds=2, retrain=Training(epochs=2, lr=3e-3))

    assert count_parameters(healed) < count_parameters(task.original)
    assert accuracy(task, healed) > accuracy(task, cold)


def test_recalibration_gives_the_statistics_of_the_data():
    task = wide_task()
    model: Any = task.fresh()
    recalibrate(model, Context(task, device=CPU))
    x = torch.cat([x for x, _ in task.batches("calibrate")])
    with torch.no_grad():
        seen = model.stem(x)
    torch.testing.assert_close(model.stem_norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.stem_norm.running_var, seen.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert model.stem_norm.momentum == 0.1 and not any(module.training for module in model.modules())


def test_recalibration_on_single_inputs_keeps_the_old_statistics():
    task = wide_task()
    alone = Task(name="one", model=task.original, calibrate=[x[None] for x, _ in task.calibrate], test=task.test)
    model: Any = alone.fresh()
    ctx = Context(alone, device=CPU)
    recalibrate(model, ctx)
    assert fingerprint(model) == fingerprint(alone.original)
    assert "one input each" in ctx.record.warnings[0]


def test_what_is_left_can_be_trained_saved_as_a_state_dict_and_pruned_again():
    task = wide_task()
    model, ctx = pruned(task, keep=0.6)
    ctx.fit(model, Training(epochs=1))
    again, _ = run_step(StructuredPrune(keep=0.6), model, ctx)
    fresh: Any = Wide()
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(again.state_dict())
    assert {
        name: tuple(tensor.shape) for name, tensor in again.state_dict().items()
    }.keys() == fresh.state_dict().keys()
    assert again.stem.weight.shape[0] == again.stem_norm.num_features == again.back.weight.shape[0]


def test_heads_and_neurons_of_a_transformer_are_told_apart():
    task = transformer_task()
    model, record = run_step(StructuredPrune(keep=0.8), task.fresh(), context(task))
    assert count_parameters(model) < count_parameters(task.original)
    told = set(record.changed) | {left.layer for left in record.left}
    assert {name for name, module in task.original.named_modules() if isinstance(module, nn.Linear)} <= told


def test_tied_layers_are_told_why_they_stay():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.wide = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 32)
            self.narrow, self.out = nn.Linear(32, 8), nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.narrow(torch.relu(self.wide(self.embed(x)))))).mean(1)

    x, y = torch.randint(0, 20, (32, 6)), torch.randint(0, 20, (32,))
    model, ctx = pruned(Task(name="tied", model=Tied().eval(), train=Arrays(x, y), test=Arrays(x, y)), keep=0.7)
    reasons = {left.layer: left.reason for left in ctx.record.left}
    assert reasons["out"] in ("it is an output of the model", "its rows are looked up by the model's inputs")
    assert reasons["embed"] == "the operator layer_norm runs over it"
    assert set(ctx.record.changed) == {"wide", "narrow"} and model.out.weight is model.embed.weight


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_weights_that_the_user_has_parametrized_are_named_and_all_else_goes_on(norm: str, tmp_path: Path):
    torch.manual_seed(0)
    normed: Any = getattr(nn.utils.parametrizations, norm)
    body = [normed(nn.Conv2d(1, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    task = Task(name=norm, model=model.eval(), train=Arrays(x, y), test=Arrays(x, y))
    smaller, ctx = pruned(task, keep=0.7)
    reasons = {left.layer: left.reason for left in ctx.record.left}
    assert reasons["0"].startswith("its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations")
    assert "2" in ctx.record.changed and count_parameters(smaller) < count_parameters(task.original)
    assert count_parameters(task.original) == sum(parameter.numel() for parameter in model.parameters())
    save(smaller, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", like=task.original)(x), smaller(x))
    assert target("onnxruntime").export(smaller, task.example, tmp_path / "onnx").manifest.agreement.relative < 1e-5
    _, record = run_step(step("prune.weights"), task.fresh(), context(task))
    kind = "_WeightNorm" if norm == "weight_norm" else "_SpectralNorm"
    assert {left.layer: left.reason for left in record.left}["0"].endswith(f"in another form already ({kind})")


def test_a_recurrent_network():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.out = nn.Embedding(20, 16), nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(self.embed(x))[0][:, -1])

    x, y = torch.randint(0, 20, (32, 6)), torch.randint(0, 20, (32,))
    task = Task(name="last", model=Last().eval(), train=Arrays(x, y), test=Arrays(x, y))
    model, ctx = pruned(task, keep=0.5, of="parameters", score="taylor", width_multiple=4)
    assert count_parameters(model) / count_parameters(task.original) == pytest.approx(0.46, abs=0.04)
    assert model.lstm.hidden_size % 4 == 0 and model.lstm.hidden_size == model.out.in_features < 32
    assert ctx.record.changed["lstm"].startswith(f"32 -> {model.lstm.hidden_size}")
    ctx.fit(model, Training(epochs=1))


@pytest.mark.parametrize(
    "settings", [{"keep": 0}, {"keep": 1}, {"score": "l3"}, {"rounds": 0}, {"multiple": 0}, {"min_keep": 2}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"prune\.structured: " + next(iter(settings))):
        step("prune.structured", **settings)
