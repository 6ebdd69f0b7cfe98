"""Text, comparison and geometry: the pure parts of the report."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import sample_runs
from hypothesis import given
from hypothesis import strategies as st

from featherweight.core.run import Candidate, Run
from featherweight.report import compare, layers, plot, stages, text, view

finite = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)


def spaced(value: str) -> str:
    return value.replace(text.THIN, " ").replace(text.MINUS, "-")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1_155_492, "bytes", "1.16 MB"), (999, "bytes", "999 B"), (999_950, "bytes", "1.00 MB"), (0, "bytes", "0 B"),
        (87.818, "%", "87.82 %"), (-0.333, "points", "-0.33 points"), (8.9357, "x", "8.94x"), (26.04, "x", "26.0x"),
        (1.37411, "ms", "1.37 ms"), (0.0311, "mJ", "0.0311 mJ"), (1155.492, "ms", "1,155 ms"), (269_722, "", "269,722"),
        (40_551_040, "", "40.6 M"), (2.5e-7, "", "2.50e-07"), (7.0, "", "7"),
    ],
)  # fmt: skip
def test_amounts(value: float, unit: str, shown: str) -> None:
    assert spaced(text.amount(value, unit)) == shown


def test_differences_and_durations() -> None:
    assert spaced(text.signed(-0.333, "%")) == "-0.33 points"
    assert spaced(text.signed(0.001, "%")) == "±0 points"
    assert spaced(text.signed(0.27, "")) == "+0.27"
    assert [spaced(text.percent(*pair)) for pair in ((200, 100), (100, 150), (100, 100.1), (0, 5), (0, 0))] == [
        "-50%",
        "+50%",
        "±0%",
        "",
        "±0%",
    ]
    assert [spaced(text.duration(value)) for value in (0.4, 7.9, 603.2, 9000)] == [
        "400 ms",
        "7.9 s",
        "10 min",
        "2 h 30 min",
    ]
    assert spaced(text.interval(86.83, 88.13, "%")) == "86.83 to 88.13 %"
    assert spaced(text.interval(900, 1200, "bytes")) == "900 B to 1.20 kB"
    assert text.moment("2025-01-31T12:00:00Z") == "2025-01-31 12:00 UTC"
    assert text.moment("yesterday") == "yesterday"


@given(finite, st.sampled_from(["", "%", "ms", "bytes", "points", "x", "mJ"]))
def test_an_amount_is_near_its_value(value: float, unit: str) -> None:
    shown = spaced(text.amount(value, unit)).rstrip("x")
    figure, _, suffix = shown.partition(" ")
    power = {"kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9}.get(suffix.split(" ")[0], 1.0)
    assert math.isclose(
        float(figure.replace(",", "")) * power, value, rel_tol=0.006, abs_tol=0.51 if unit == "bytes" else 0.0051
    )


def test_recipes_in_one_line() -> None:
    made = {
        "steps": [
            {"kind": "prune.structured", "keep": 0.41999999, "retrain": {"epochs": 1.0}, "skip": ["a", "b"]},
            {"kind": "quantize.static"},
        ]
    }
    assert text.recipe(made) == "prune.structured(keep=0.42, retrain=(epochs=1), skip=[a, b]) + quantize.static"
    assert text.recipe({}) == "no step"


# -- comparison ---------------------------------------------------------------------------------------------------
def one(name: str, conditions: str = "", run: Run | None = None) -> compare.Row:
    found = compare.rows((run or sample_runs.full()).readings, "top1", True)
    (row,) = [row for row in found if row.name == name and row.conditions == conditions]
    return row


def test_rows_hold_every_reading_once() -> None:
    run = sample_runs.full()
    found = compare.rows(run.readings, "top1", True)
    held = [reading for row in found for reading in row.readings]
    assert sorted(held, key=repr) == sorted(run.readings, key=repr)
    grouped = [row for _, rows in compare.by_axis(found) for row in rows]
    assert sorted(map(repr, grouped)) == sorted(map(repr, found))
    assert len({axis for axis, _ in compare.by_axis(found)}) == len(compare.by_axis(found))


def test_changes_say_the_right_direction() -> None:
    assert (one("file_bytes").change, one("file_bytes").direction) == ("8.94x smaller", "better")
    assert (one("throughput", "batch 1, 1 thread").change, one("throughput", "batch 1, 1 thread").direction) == (
        "2.59x more",
        "better",
    )
    assert one("top1", "batch 64").direction == "worse"
    assert one("integer_macs").change == ""
    worse = one("p50_ms", "batch 1, 1 thread", sample_runs.gained_nothing())
    assert (worse.change, worse.direction) == ("1.20x slower", "worse")
    lower = compare.rows(sample_runs.lower_is_better().readings, "perplexity", False)
    assert [(row.change, row.direction) for row in lower if row.name == "perplexity"] == [("+0.27", "worse")]


def test_what_noise_may_explain_is_no_change() -> None:
    assert one("peak_bytes").change == "no clear change"
    found = []
    for reading in sample_runs.readings():
        if reading.name == "speedup":
            reading = reading.model_copy(update={"low": 0.97, "high": 2.7})
        if reading.name == "drop":
            reading = reading.model_copy(update={"low": -0.1})
        found.append(reading)
    run = sample_runs.full().model_copy(update={"readings": found})
    assert one("p50_ms", "batch 1, 1 thread", run).change == "no clear change"
    assert one("top1", "batch 64", run).direction == "same"
    assert [tile.figure for tile in compare.tiles(run)][:2] == ["8.94x", "≈ 1x"]


def test_headline_figures() -> None:
    tiles = compare.tiles(sample_runs.full())
    assert [(tile.figure, tile.caption) for tile in tiles[:4]] == [
        ("8.94x", "smaller"),
        ("2.61x", "faster"),
        ("0.33", "of top1 lost"),
        ("95.31", "same answers as the original"),
    ]
    assert "batch 1, 1 thread" in tiles[1].detail
    assert [tile.direction for tile in compare.tiles(sample_runs.gained_nothing())] == ["worse", "worse", "same"]
    assert compare.tiles(sample_runs.empty()) == []
    assert compare.tiles(sample_runs.lower_is_better())[2].caption == "higher perplexity"


def test_the_smallest_batch_makes_the_headline() -> None:
    run = sample_runs.full()
    turned = run.model_copy(update={"readings": run.readings[::-1]})
    assert compare.tiles(turned)[1].figure == compare.tiles(run)[1].figure == "2.61x"


def test_parts_of_the_bar() -> None:
    assert [limit.met for limit in compare.limits(sample_runs.infeasible())] == [True, False, False]
    assert [limit.met for limit in compare.limits(sample_runs.empty())] == [None]
    assert compare.limits(sample_runs.applied()) == []
    assert view.state(sample_runs.infeasible())[0] == "missed"


# -- stages and layers --------------------------------------------------------------------------------------------
def test_steps_that_bought_nothing_are_those_that_the_run_names() -> None:
    run = sample_runs.full()
    assert [line.nothing for line in stages.lines(run)] == [False, False, False, True, False]
    quiet = run.model_copy(update={"warnings": []})
    assert not any(line.nothing for line in stages.lines(quiet))
    twice = [
        stage.model_copy(update={"after": "prune.weights"}) if place in (1, 3) else stage
        for place, stage in enumerate(run.stages)
    ]
    assert [line.nothing for line in stages.lines(run.model_copy(update={"stages": twice}))] == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_stage_changes_against_the_step_before() -> None:
    lines = stages.lines(sample_runs.full())
    assert [spaced(cell.delta) for cell in lines[1].cells] == ["-2.06 points", "-57%", "-36%", "-58%", "-57%"]
    assert [cell.direction for cell in lines[1].cells] == ["worse", "better", "better", "better", "better"]
    assert [cell.direction for cell in lines[3].cells] == ["worse", "same", "same", "same", "same"]
    lower = stages.lines(sample_runs.lower_is_better())
    assert [lower[1].cells[0].direction, lower[2].cells[0].direction] == ["worse", "better"]


def test_small_charts_start_at_zero_except_the_metric() -> None:
    charts = stages.charts(sample_runs.full())
    assert [chart.dots for chart in charts] == [True, False, False, False, False]
    heights = [bar.height for bar in charts[1].bars]
    sizes = [stage.bytes for stage in sample_runs.full().stages]
    assert [height / heights[0] for height in heights] == pytest.approx([size / sizes[0] for size in sizes])
    assert stages.charts(sample_runs.gained_nothing()) == []


def test_layers_keep_their_order_and_the_largest_are_shown() -> None:
    few = layers.lines(sample_runs.layers())
    assert [line.layer.name for line in few] == [layer.name for layer in sample_runs.layers()]
    assert max(line.bar_before for line in few) == 100.0
    many = sample_runs.layers() * 20
    shown = layers.lines(many)
    assert len(shown) == layers.MOST
    assert (
        min(line.layer.bytes_before for line in shown)
        >= sorted((layer.bytes_before for layer in many), reverse=True)[layers.MOST]
    )
    assert [line.place for line in shown] == sorted(line.place for line in shown)


# -- the plot -----------------------------------------------------------------------------------------------------
def drawn(run: Run) -> plot.Plot:
    found = plot.plot(run)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["full", "lower_is_better", "gained_nothing"])
def test_marks_lie_inside_and_areas_are_sizes(name: str) -> None:
    found = drawn(sample_runs.ALL[name]())
    largest = max(found.marks, key=lambda mark: mark.point.bytes)
    for mark in found.marks:
        assert found.left <= mark.x <= found.right and found.top <= mark.y <= found.bottom
        if mark.r > plot.SMALLEST and not mark.beyond and not largest.beyond:
            assert (mark.r / largest.r) ** 2 == pytest.approx(mark.point.bytes / largest.point.bytes)
    assert sum(mark.beyond for mark in found.marks) == found.beyond


def test_better_is_up_and_faster_is_left_in_both_directions() -> None:
    for run in (sample_runs.full(), sample_runs.lower_is_better()):
        marks = {mark.point.number: mark for mark in drawn(run).marks}
        assert marks[2].y < marks[3].y < marks[4].y
        assert marks[4].x < marks[3].x < marks[2].x
        bar = drawn(run).bar
        assert bar is not None and marks[3].y < bar < marks[4].y


def test_a_ruined_model_stands_at_the_edge() -> None:
    (mark,) = [mark for mark in drawn(sample_runs.full()).marks if mark.point.number == 9]
    assert mark.beyond and mark.y == drawn(sample_runs.full()).bottom
    assert "outside the drawing" in dict(mark.point.facts)["note"]


def test_the_line_joins_the_front_in_accuracy_against_latency() -> None:
    corners = [tuple(map(float, pair.split(","))) for pair in drawn(sample_runs.full()).front.split()]
    assert len(corners) == 5  # five of the six: number 0 is on the front, but number 2 is better and faster
    for (x1, y1), (x2, y2) in pairwise(corners):
        assert x1 <= x2 and y1 >= y2


def test_labels_do_not_cover_each_other() -> None:
    for name in ("full", "lower_is_better"):
        found = drawn(sample_runs.ALL[name]()).labels
        assert {label.text for label in found} >= {"original", "chosen"}
        boxes = []
        for label in found:
            wide = 6.8 * len(label.text)
            left = label.x - {"start": 0.0, "middle": wide / 2, "end": wide}[label.anchor]
            boxes.append((left, label.y - 11, left + wide, label.y + 2))
        for place, a in enumerate(boxes):
            for b in boxes[place + 1 :]:
                assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_a_plot_of_points_in_one_place_or_without_figures() -> None:
    run = sample_runs.full()
    same = [
        Candidate(number=n, recipe={}, state="done", accuracy=87.98, bytes=1_155_492, latency_ms=1.374, front=True)
        for n in range(50)
    ]
    assert len(drawn(run.model_copy(update={"candidates": same})).marks) == 51
    zero = [Candidate(number=0, recipe={}, state="done", accuracy=0.0, bytes=0, latency_ms=0.0)]
    alone = {"candidates": zero, "stages": [], "readings": []}
    assert len(drawn(run.model_copy(update=alone)).marks) == 1
    broken = [Candidate(number=0, recipe={}, state="done", accuracy=math.nan, bytes=1, latency_ms=1.0)]
    assert plot.plot(run.model_copy(update={"candidates": broken})) is None
    many = [
        Candidate(number=n, recipe={}, state="done", accuracy=80 + n / 1000, bytes=10, latency_ms=1.0)
        for n in range(700)
    ]
    found = drawn(run.model_copy(update={"candidates": many}))
    assert found.hidden == 300 and len(found.marks) == 401


@given(finite, st.floats(min_value=1e-6, max_value=1e6), st.integers(2, 12))
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    if high <= low or span < 1e-9 * abs(low):
        return
    found = plot.ticks(low, high, most)
    assert len(found) <= most + 1
    slack = 1e-6 * span + 1e-12
    assert all(low - slack <= value <= high + slack for value in found)
    gaps = {round((after - before) / span, 5) for before, after in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) < 1e-3
