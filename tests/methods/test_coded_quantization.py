"""quantize.coded: least bits for an error in the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn

import featherweight as fw
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import torch_figure
from featherweight.core.outputs import first
from featherweight.core.recipe import Recipe
from featherweight.core.scaled import Scaled, powers
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.task import Split
from featherweight.methods.quantize.coded import Sensitivity, together
from featherweight.methods.quantize.gptq import factors, loss, sorted_order
from featherweight.methods.quantize.ratedistortion import code_lengths, exponents, on_grid, rounded

CPU = torch.device("cpu")


def made(task: fw.Task, **settings: float) -> nn.Module:
    return run_step(step("quantize.coded", **settings), task.fresh(), Context(task, device=CPU))[0]


def noise(task: fw.Task, model: nn.Module) -> float:
    """Decibels of the first output's power over that of its error, on the calibration data."""
    signal = error = 0.0
    with torch.no_grad():
        for batch in task.batches("calibrate"):
            wanted = first(task.call(task.original, batch)).double()
            signal += float(wanted.square().sum())
            error += float((first(task.call(model, batch)).double() - wanted).square().sum())
    return 10 * float(torch.tensor(signal / error).log10())


def test_powers_are_those_of_quarter_octaves() -> None:
    places = torch.arange(256)
    torch.testing.assert_close(powers(places.byte()).double(), 2.0 ** (places.double() / 4), rtol=1e-6, atol=0)
    assert powers(torch.tensor([40]))[0] == 2**10


def test_steps_come_back_within_an_eighth_of_an_octave() -> None:
    steps = torch.rand(100).add(1e-3) * 10
    places, least = exponents(steps)
    ratio = (powers(places) * least / steps).log2()
    assert float(ratio.abs().max()) <= 0.1251 and int(places.min()) == 0


def correlated(columns: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(500, columns) @ torch.randn(columns, columns)
    return torch.randn(30, columns), inputs.T @ inputs / 500 + 0.1 * torch.eye(columns)


def test_feedback_loses_less_than_rounding_to_nearest() -> None:
    weight, hessian = correlated(100)
    order = sorted_order(hessian)
    found = factors(hessian[order][:, order])
    assert found is not None
    rows, columns = torch.full((30,), 0.5), torch.ones(100)
    plain = rounded(weight, rows, columns, torch.eye(100), order, 0.0, None)
    torch.testing.assert_close(plain, (weight / 0.5).round())
    better = rounded(weight, rows, columns, found[0], order, 0.0, None)
    assert loss(weight, better * 0.5, hessian) < 0.6 * loss(weight, plain * 0.5, hessian)
    assert torch.equal(better, better.round())


def test_a_rate_takes_bits_away() -> None:
    weight = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    rows, columns, order = torch.full((50,), 0.7), torch.ones(200), torch.arange(200)
    bits = []
    for rate in (0.0, 0.1, 0.3):
        found = rounded(weight, rows, columns, torch.eye(200), order, rate, None)
        lengths = code_lengths(found)
        bits.append(float(lengths[(found + len(lengths) // 2).long()].sum()))
    assert bits[0] > 1.01 * bits[1] > 1.02 * bits[2]


def test_pruned_weights_stay_zero() -> None:
    weight, keep = torch.randn(8, 40), torch.rand(8, 40) > 0.5
    found = rounded(weight, torch.full((8,), 0.1), torch.ones(40), torch.eye(40), torch.arange(40), 0.0, keep)
    assert not found[~keep].any() and found[keep].count_nonzero() > 0.8 * keep.sum()


def test_floats_on_a_grid_are_multiples_of_a_power_of_two() -> None:
    values = torch.randn(50)
    found = on_grid(values, 7)
    assert torch.equal(found * 2**8, (found * 2**8).round()) and not torch.equal(found, values)
    assert float((found - values).abs().max()) <= 2**-7
    assert torch.equal(on_grid(torch.zeros(3), 7), torch.zeros(3))


@pytest.mark.parametrize("make", [conv_task, transformer_task])
def test_the_error_is_what_was_predicted_and_falls_as_bytes_rise(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    task, sizes = make(), []
    for snr in (30.0, 40.0):
        model = made(task, snr=snr, bias_correction=False, digits=16)
        assert noise(task, model) == pytest.approx(snr, abs=4.0)
        assert all(isinstance(each, Scaled) for each in encodings(model).values())
        sizes.append(fw.pack(model, tmp_path / "model.fwc").stat().st_size)
    assert sizes[0] < sizes[1]


def test_the_search_ends_within_the_drop() -> None:
    task = conv_task()
    model = made(task, max_drop=2.0)
    split: Split = "validate" if task.has("validate") else "calibrate"
    assert task.metric.drop(torch_figure(task, None, split), torch_figure(task, model, split)) <= 2.0


def test_a_drop_that_cannot_be_kept_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.methods.quantize import coded

    monkeypatch.setattr(coded, "LOWEST", 0.0)
    monkeypatch.setattr(coded, "HIGHEST", 1.0)
    task = conv_task()
    with pytest.raises(RecipeError, match="even 1 dB lose more than 0; raise max_drop"):
        made(task, max_drop=0.0)


def test_every_pruned_layer_is_quantized_and_what_is_skipped_stays() -> None:
    """Weights behind masks are made anew whenever they are read: they are told apart by what they are made from."""
    torch.manual_seed(0)
    layers = [module for _ in range(6) for module in (nn.Linear(16, 16), nn.ReLU())]
    inputs = torch.randn(64, 16)
    data = fw.Arrays(inputs, (inputs[:, 0] > 0).long())
    task = fw.Task(name="deep", model=nn.Sequential(*layers, nn.Linear(16, 2)), calibrate=data, test=data)
    recipe = Recipe([{"kind": "prune.weights", "sparsity": 0.5}, {"kind": "quantize.coded", "skip": ["4"]}])
    model, (_, record) = run_recipe(recipe, Context(task, device=CPU))
    assert {left.layer for left in record.left} == {"4"}
    assert set(encodings(model)) == {f"{place}.weight" for place in (0, 2, 6, 8, 10, 12)}
    assert torch.equal(model.get_parameter("4.bias"), task.original.get_parameter("4.bias"))
    kept = model.get_parameter("4.weight")
    assert torch.equal(kept, task.original.get_parameter("4.weight") * (kept != 0))


class Looked(nn.Module):
    """A table that is looked up, and, where `tied`, is the head's weight too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.table(x))).mean(1))


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_are_looked_up_are_quantized_once(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = fw.Arrays(torch.randint(0, 50, (256, 7)), torch.randint(0, 50, (256,)))
    task = fw.Task(name="looked", model=Looked(tied), calibrate=data, test=data)
    model, record = run_step(step("quantize.coded", snr=30.0), task.fresh(), Context(task, device=CPU))
    assert noise(task, model) == pytest.approx(30, abs=4)
    assert set(record.changed) == {"table", "middle", "head"} and not record.left
    assert len(encodings(model)) == (2 if tied else 3)
    assert all(isinstance(each, Scaled) for each in encodings(model).values())
    if not tied:
        return
    assert ("shares the weight of" in record.changed["table"]) != ("shares the weight of" in record.changed["head"])
    _, record = run_step(step("quantize.coded", embeddings=False), task.fresh(), Context(task, device=CPU))
    assert "shares its weight with table" in {left.layer: left.reason for left in record.left}["head"]


def test_what_several_layers_do_with_one_weight_adds_up() -> None:
    matrix = Sensitivity(torch.eye(3)[None] * 2, torch.full((1, 3), 2.0), torch.tensor([0.9, 0.1]))
    table = Sensitivity(None, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5]))
    both = together([matrix, table])
    assert both.hessian is not None
    torch.testing.assert_close(both.hessian[0], torch.diag(torch.tensor([3.0, 4.0, 5.0])))
    torch.testing.assert_close(both.rows, torch.tensor([0.7, 0.3]))
    twice = together([table, table])
    assert twice.hessian is None and torch.equal(twice.columns, 2 * table.columns)
