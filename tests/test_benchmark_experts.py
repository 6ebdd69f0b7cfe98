"""The benchmark of experts: its rows are steps that can be, and its page shows what was measured."""

from benchmarks import experts
from benchmarks.experts_page import Ledger, Row, page
from benchmarks.record import Figure, Timing
from featherweight.core.recipe import Recipe


def rows() -> list[Row]:
    return list(experts.rows_of(experts.arguments(["--date", "2026-01-31"])))


def test_every_row_is_a_recipe_that_can_be() -> None:
    made = rows()
    for row in made:
        if row.part != "time":
            Recipe([each for each in row.steps if each["kind"] != experts.NEURONS["kind"]]).check()
    assert {row.part for row in made} == set(experts.PARTS)
    assert len({(row.part, str(row.steps)) for row in made}) == len({(row.part, row.name) for row in made}) == len(made)
    assert {"2 of 64, 1 tokens", "2 of 64, 128 tokens"} <= {row.name for row in made}


def test_the_page_shows_every_row() -> None:
    figure = Figure(value=2.0, low=1.5, high=2.5, n=9)
    found = []
    for row in rows():
        timing = Timing(batch=1, threads=1, p50_ms=figure, faster=figure)
        changes = {"metric": figure, "macs": 50, "dense_macs": 200, "timing": timing, "coverage": {"layer": "8 tokens"}}
        found.append(row.model_copy(update=changes))
    ledger = Ledger(
        date="2026-01-31", command="c", machine="m", versions={"torch": "2"}, seed=0, clock="wall", task="zoo:t",
        metric="perplexity", higher_is_better=False, notes="n", original=figure, macs=400, bytes=9, rows=found,
    )  # fmt: skip
    text = page([ledger])
    assert all(f"| {row.name} |" in text for row in found) and "* layer: 8 tokens" in text and "25.0%" in text
