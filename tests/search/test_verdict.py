"""The sentence at the end: gains and losses, what got worse first, and whether the bar is met."""

import pytest

from featherweight.core.metric import Metric, mean_squared_error, top1
from featherweight.core.reading import Reading
from featherweight.core.run import Budget
from featherweight.search.verdict import idle_zeros, judge_bar, not_faster, ratio_words, slower
from featherweight.search.verdict import verdict as sentence


def read(subject: str, axis: str, name: str, value: float, **rest: object) -> Reading:
    return Reading(subject=subject, axis=axis, name=name, value=value, unit="", runtime="tiny", machine="here", **rest)


def readings(
    sizes: tuple[int, int] = (8900, 1000),
    times: tuple[float, float] = (2.6, 1.0),
    accuracies: tuple[float, float] = (98.67, 98.5),
    speedup: tuple[float, float, float] | None = None,
    metric: Metric | None = None,
) -> list[Reading]:
    metric, found = metric or top1(), []
    at = {"batch": 1, "threads": 1}
    for subject, size, time, accuracy in zip(("original", "compressed"), sizes, times, accuracies):
        found.append(read(subject, "latency", "p50_ms", 9 * time, conditions={"batch": 32, "threads": 1}))
        found.append(read(subject, "latency", "p50_ms", time, conditions=at))
        found.append(read(subject, "size", "file_bytes", size))
        found.append(read(subject, "accuracy", metric.name, accuracy, n=600))
    found.append(read("compressed", "accuracy", "drop", metric.drop(*accuracies)))
    if speedup is not None:
        value, low, high = speedup
        found.append(read("compressed", "latency", "speedup", value, low=low, high=high, conditions=at))
    return found


BAR = Budget(max_drop=0.5)


def verdict(found: list[Reading], budget: Budget, metric: Metric, runtime: str, nearest: bool = False) -> str:
    return sentence(found, judge_bar(found, budget, metric), metric, runtime, nearest)


def misses(found: list[Reading], budget: Budget, metric: Metric) -> set[str]:
    return {name for name, limit in judge_bar(found, budget, metric).limits.items() if limit.broken}


def test_the_sentence() -> None:
    assert verdict(readings(), BAR, top1(), "onnxruntime") == (
        "8.9x smaller and 2.6x faster (p50, batch 1, 1 thread) than the original in onnxruntime, "
        "0.17 points of top1 lost (98.67 -> 98.50 %, n=600): meets the bar of at most 0.5 points lost"
    )


def test_what_got_worse_is_said_first() -> None:
    text = verdict(readings(times=(1.0, 1.3)), BAR, top1(), "tiny")
    assert text.startswith("1.30x slower (p50, batch 1, 1 thread) and 8.9x smaller than the original in tiny, ")
    assert verdict(readings(sizes=(10, 11)), Budget(), top1(), "tiny").startswith("1.10x larger and 2.6x faster")
    assert "1.30x slower than the original here" in slower(readings(times=(1.0, 1.3)))
    assert slower(readings()) == "" and slower([]) == ""


def test_a_difference_within_noise_is_none() -> None:
    text = verdict(readings(times=(1.0, 1.02), speedup=(0.98, 0.9, 1.05)), BAR, top1(), "tiny")
    assert text.startswith("8.9x smaller than, and as fast (p50, batch 1, 1 thread) as, the original in tiny, ")
    assert slower(readings(times=(1.0, 1.02), speedup=(0.98, 0.9, 1.05))) == ""


def test_the_paired_ratio_is_taken_where_there_is_one() -> None:
    assert "3.0x faster" in verdict(readings(speedup=(3.0, 2.9, 3.1)), BAR, top1(), "tiny")


def test_gains_in_accuracy_and_other_metrics() -> None:
    assert "0.33 points of top1 gained (98.00 -> 98.33 %" in verdict(
        readings(accuracies=(98.0, 98.33)), BAR, top1(), "t"
    )
    assert "nothing lost (top1 98.00 -> 98.00 %, n=600)" in verdict(readings(accuracies=(98.0, 98.0)), BAR, top1(), "t")
    mse = mean_squared_error()
    text = verdict(readings(accuracies=(0.1, 0.103), metric=mse), Budget(max_drop=0.001), mse, "t")
    assert (
        "0.003 of mse lost (0.1 -> 0.103, n=600): misses the bar (0.003 of mse lost where at most 0.001 may be)" in text
    )


def test_every_limit_is_judged() -> None:
    budget = Budget(max_drop=0.1, max_size=999, max_latency=0.5)
    assert misses(readings(), budget, top1()) == {"drop", "size", "latency"}
    judged = judge_bar(readings(), Budget(max_drop=0.2, max_size=1000, max_latency=1.0), top1())
    assert judged.met and str(judged) == (
        "meets the bar of at most 0.2 points lost, at most 1,000 bytes, at most 1 ms (p50, batch 1, 1 thread)"
    )


def test_the_latency_is_judged_under_the_conditions_of_the_bar_alone() -> None:
    large = [reading for reading in readings() if reading.conditions.get("batch") != 1]
    many = [
        reading.model_copy(update={"conditions": {"batch": 1, "threads": 8}}) if reading.conditions else reading
        for reading in readings()
    ]
    for found in (large, many):
        judged = judge_bar(found, Budget(max_latency=99.0), top1())
        assert not judged.met and str(judged) == "not measured: at most 99 ms (p50, batch 1, 1 thread)"
    fixed = judge_bar(large, Budget(max_latency=8.0), top1(), batch=32)
    assert str(fixed) == "misses the bar (9 ms (p50, batch 32, 1 thread) where at most 8 may be)"


def test_a_bar_is_not_met_by_what_was_not_measured() -> None:
    only_size = [reading for reading in readings() if reading.axis == "size"]
    judged = judge_bar(only_size, Budget(max_drop=0.2, max_size=1000), top1())
    assert (
        not judged.met and str(judged) == "meets the bar of at most 1,000 bytes; not measured: at most 0.2 points lost"
    )
    assert judge_bar([], Budget(), top1()).met and str(judge_bar([], Budget(), top1())) == ""


def test_the_nearest_is_said_to_be_the_nearest() -> None:
    text = verdict(readings(), Budget(max_drop=0.1), top1(), "tiny", nearest=True)
    assert text.endswith("; no recipe that was tried met it, this one came nearest")
    assert "misses the bar (0.17 points of top1 lost where at most 0.1 may be)" in text


def test_what_was_not_measured_is_not_spoken_of() -> None:
    only_size = [reading for reading in readings() if reading.axis == "size"]
    assert verdict(only_size, BAR, top1(), "tiny").startswith("8.9x smaller than the original in tiny")
    assert "lost" not in verdict(only_size, Budget(), top1(), "tiny")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (8.94, "8.9x smaller"),
        (1.234, "1.23x smaller"),
        (0.5, "2.0x larger"),
        (1.001, "as large"),
        (123.4, "123.4x smaller"),
    ],
)
def test_ratios(ratio: float, words: str) -> None:
    assert ratio_words(ratio, "smaller", "larger", "as large") == words


def test_weights_that_are_small_but_computed_as_floats_are_said():
    stored = {"a.weight": "uint3", "b.weight": "codebook4", "c.weight": "float32", "d.weight": "int8"}
    evidence = {"float_layers": ["a.weight", "b.weight", "c.weight"], "integer_layers": ["d.weight"]}
    said = "stored as codebook4, uint3 but computed as floats, so smaller and no faster: a.weight and 1 more"
    assert not_faster(stored, evidence) == said
    assert not_faster(stored, {"float_layers": ["c.weight"]}) == "" == not_faster(stored, {})


def test_zeros_that_a_runtime_stores_and_computes_with_are_said():
    assert idle_zeros([], "torch") == ""
    said = idle_zeros(["a.weight", "b.weight"], "onnxruntime")
    assert said.startswith("onnxruntime stores the zeros") and said.endswith("smaller or faster: a.weight and 1 more")
