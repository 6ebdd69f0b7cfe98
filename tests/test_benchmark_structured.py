"""The benchmark of structured pruning: its page, a budget that is kept, a network put together by its state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_tasks import blocks_task, conv_task, one_thread  # noqa: F401

from benchmarks import budget, structured
from benchmarks.record import Figure, Timing
from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.fit import Training, steps_per_epoch
from featherweight.core.step import step

CPU = torch.device("cpu")
LEDGERS = Path(__file__).parent.parent / "benchmarks" / "ledger"


def figure(value: float) -> Figure:
    return Figure(value=value, low=value - 0.1, high=value + 0.1, n=100)


def timing(times: float) -> Timing:
    return Timing(batch=1, threads=1, p50_ms=figure(1.0), faster=figure(times))


def row(name: str, form: str, accuracy: float, macs: int, times: float) -> structured.Row:
    than = [timing(times / 2)] if form == "int8" else []
    found = {"accuracy": figure(accuracy), "drop": figure(90 - accuracy), "macs": macs, "parameters": 10, "bytes": 40}
    about = "how" if name != structured.START else ""
    return structured.Row(name=name, form=form, about=about, **found, timings=[timing(times)], than_int8=than)


def test_the_page_holds_every_row_with_its_ratios():
    rows = [row("original", "float32", 90, 250, 1.0), row("ours", "float32", 89, 100, 2.2)]
    rows.append(row("ours", "int8", 88.9, 100, 4.4))
    given = structured.arguments(["--date", "2026-01-31", "--seconds", "30"])
    ledger = structured.Ledger(
        date="2026-01-31",
        command=structured.command(given),
        machine="some",
        versions={"torch": "2"},
        seed=0,
        task=structured.TASK,
        notes="",
        fewer=2.5,
        budget_seconds=30,
        threads=2,
        training={},
        clock="wall",
        rows=rows,
    )
    found = structured.page(ledger)
    assert "| ours | float32 | 89.00 [88.90, 89.10] | 2.50x | 10 | 40 |  | 2.20 [2.10, 2.30] |  |" in found
    assert (
        "| ours | int8 | 88.90 [88.80, 89.00] | 2.50x | 10 | 40 |  | 4.40 [4.30, 4.50] | 2.20 [2.10, 2.30] |" in found
    )
    assert found.count("* ours: how") == 1
    assert "--seconds 30 " in found and "FOLDER" in found
    assert structured.Ledger.model_validate_json(ledger.model_dump_json()) == ledger


def test_training_lasts_as_long_as_the_budget_and_trains():
    task = conv_task()
    ctx, model = Context(task, device=CPU), task.fresh()
    training = Training(lr=1e-3, batch_size=32)
    before = budget.busy_seconds()
    epochs = budget.train_for(2.0, model, ctx, training)
    took = budget.busy_seconds() - before
    assert epochs > 1 and 0.5 < took < 6
    assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), task.original.parameters()))
    assert budget.step_seconds(model, ctx, training) * steps_per_epoch(ctx, 32) * epochs < 6


def test_a_peer_that_prunes_in_a_process_of_its_own_pays_for_it():
    before = budget.busy_seconds()
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert budget.busy_seconds() - before > 0.45 / torch.get_num_threads()  # counted in hundredths


def test_a_network_of_other_widths_is_put_together_by_its_state():
    task = blocks_task()
    ctx = Context(task, device=CPU)
    smaller, _ = run_step(step("prune.structured", keep=0.6, multiple=1), task.fresh(), ctx)
    made = structured.resized(task.fresh(), smaller.state_dict())
    assert count_parameters(made) < count_parameters(task.original)
    with torch.no_grad():
        assert torch.equal(made(**task.example), smaller(**task.example))


@pytest.mark.parametrize("name", ["structured", "architectures"])
def test_the_page_of_the_repository_is_that_of_its_newest_ledger(name: str):
    from benchmarks import architectures

    module = {"structured": structured, "architectures": architectures}[name]
    ledgers = sorted(LEDGERS.glob(f"{name}-*.json"))
    if not ledgers:
        pytest.skip(f"no ledger of {name} is in the repository")
    ledger = module.Ledger.model_validate(json.loads(ledgers[-1].read_text("utf-8")))
    page = LEDGERS.parent.parent / "docs" / f"benchmarks-{name}.md"
    assert page.read_text("utf-8") == module.page(ledger)
