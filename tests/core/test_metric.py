"""Metrics: figures, intervals that cover, paired drops, and agreement."""

import numpy as np
import pytest

from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.evaluate import records
from featherweight.core.metric import Metric, close, mean_squared_error, same_class, top1
from featherweight.core.task import Task


def test_top1_counts_in_percent():
    logits, labels = np.array([[0.1, 2.0], [3.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([1, 0, 0, 0])
    metric = top1()
    rows = metric.record({"logits": logits}, (None, labels))
    assert rows.tolist() == [100.0, 100.0, 0.0, 100.0] and metric.reduce(rows) == 75.0


def test_squared_error_is_per_input_and_lower_is_better():
    metric = mean_squared_error()
    rows = metric.record((np.ones((2, 3, 2)),), (None, np.stack([np.ones((3, 2)), np.full((3, 2), 3.0)])))
    assert rows.tolist() == [0.0, 4.0] and metric.reduce(rows) == 2.0
    assert metric.drop(1.0, 3.0) == 2.0 and top1().drop(90.0, 89.5) == 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = top1().interval((generator.random(300) < 0.9) * 100.0, resamples=200, seed=trial)
        assert low <= high
        hits += low <= 90 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_an_interval_is_the_same_every_time_and_shrinks_with_n():
    rows = (np.random.default_rng(1).random(4000) < 0.8) * 100.0
    metric = top1()
    assert metric.interval(rows) == metric.interval(rows)
    wide, narrow = (np.ptp(metric.interval(part)) for part in (rows[:100], rows))
    assert narrow < wide / 3


def test_a_paired_drop_is_tighter_than_two_intervals():
    generator = np.random.default_rng(2)
    before = (generator.random(1000) < 0.9) * 100.0
    after = before.copy()
    after[generator.choice(1000, 8, replace=False)] = 0.0
    low, high = top1().drop_interval(before, after)
    assert 0 <= low <= top1().drop(before.mean(), after.mean()) <= high
    assert high - low < 0.5 * np.ptp(top1().interval(before))
    assert top1().drop_interval(before, before) == (0.0, 0.0)


def test_a_figure_may_need_several_numbers_per_input():
    metric = Metric(
        "ratio", record=lambda out, batch: out, reduce=lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum())
    )
    rows = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert metric.reduce(rows) == 1.0 and metric.interval(rows)[0] >= 0.5


def test_agreement_by_class_and_by_value():
    one, other = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 1.0], [3.0, 1.0]])
    assert same_class(one, other).tolist() == [1.0, 0.0]
    sequence = np.eye(4)[None].repeat(2, 0)
    changed = sequence.copy()
    changed[1, 0] = [0, 0, 0, 9]
    assert same_class(sequence, changed).tolist() == [1.0, 0.75]


def test_numbers_agree_within_five_percent():
    for numbers in (np.array([2.0, -3.0]), np.array([[2.0], [-3.0]])):
        assert close(numbers, numbers * 1.04).tolist() == [1.0, 1.0]
        assert close(numbers, numbers * 1.06).tolist() == close(numbers, -numbers).tolist() == [0.0, 0.0]


def test_vectors_agree_by_their_direction_and_roughly_their_length():
    one = np.array([[3.0, 0.0]])
    for cosine, same in ((0.96, 1.0), (0.94, 0.0), (-1.0, 0.0)):
        assert close(one, 3 * np.array([[cosine, np.sqrt(1 - cosine**2)]])).tolist() == [same]
    assert [close(one, one * factor).item() for factor in (0.6, 0.7, 1.3, 1.4)] == [0.0, 1.0, 1.0, 0.0]
    nought = np.zeros((1, 2))
    assert close(nought, nought).item() == 1.0 and close(one, nought).item() == close(nought, one).item() == 0.0


def test_an_embedding_in_eight_bits_is_the_same_answer():
    """A tenth of the norm off, as activations in 8 bits leave it, turns an embedding by six degrees."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(200, 384))
    noise = rng.normal(size=embeddings.shape)
    assert close(embeddings, embeddings + 0.1 * noise).mean() == 1.0
    assert close(embeddings, embeddings + 0.5 * noise).mean() == 0.0


def test_records_of_a_split_keep_their_order_and_refuse_nan():
    import torch

    batches = [(torch.eye(2), torch.tensor([0, 0])), (torch.eye(2)[:1], torch.tensor([0]))]
    task = Task(name="eye", model=torch.nn.Identity(), test=batches)
    assert records(task, lambda batch: batch[0].numpy()).tolist() == [100.0, 0.0, 100.0]
    broken = Metric("bad", record=lambda out, batch: np.array([1.0, np.nan]))
    with pytest.raises(NotFinite, match="split 'test': the metric bad became NaN"):
        records(Task(name="eye", model=torch.nn.Identity(), test=batches, metric=broken), lambda batch: batch[0])
    with pytest.raises(TaskError, match="the split 'test' is empty"):
        records(Task(name="eye", model=torch.nn.Identity(), test=[]), lambda batch: batch[0])
