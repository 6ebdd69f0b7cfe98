"""The metrics of the zoo against scipy, scikit-learn, torch, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from featherweight.zoo import metrics

SERIES = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40)


@settings(deadline=None)
@given(SERIES)
def test_rank_correlation_is_scipys(pairs):
    one, other = np.array(pairs, dtype=float).T
    ours = metrics.rank_correlation(one, other)
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert ours == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    else:
        assert np.isnan(ours)


@settings(deadline=None)
@given(SERIES)
def test_area_under_curve_is_scikit_learns(pairs):
    scores, positive = np.array(pairs, dtype=float).T
    positive = (positive > 0).astype(float)
    ours = metrics.area_under_curve(scores, positive)
    if 0 < positive.sum() < len(positive):
        assert ours == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    else:
        assert np.isnan(ours)


def test_surprise_is_torchs_cross_entropy():
    logits, target = torch.randn(5, 7, 11) * 30, torch.randint(0, 11, (5, 7))
    want = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), target.flatten(), reduction="none")
    assert metrics.surprise(logits.numpy(), target.numpy()).ravel() == pytest.approx(want.numpy(), rel=1e-6, abs=1e-6)


def test_signal_to_noise_of_known_errors():
    clean = np.zeros((3, 1, 4, 4))
    restored = np.stack([np.full((1, 4, 4), error) for error in (0.1, 0.01, 1.0)])
    assert metrics.signal_to_noise(restored, clean) == pytest.approx([20, 40, 0])


def test_perplexity_of_equal_chances_is_the_number_of_tokens_and_padding_does_not_count():
    labels = torch.tensor([[1, 2, 3, -100], [1, 4, -100, -100]])
    metric, output = metrics.perplexity(), {"logits": np.zeros((2, 4, 8), dtype=np.float32)}
    records = metric.record(output, {"input_ids": labels.clamp_min(0), "labels": labels})
    assert records[:, 1].tolist() == [2, 1]
    assert metric.reduce(records) == pytest.approx(8)
    assert not metric.higher_is_better


def test_the_next_token_is_what_counts():
    labels = torch.tensor([[0, 1, 2]])
    sure = np.full((1, 3, 4), -50.0)
    sure[0, 0, 1] = sure[0, 1, 2] = 50.0  # the last position predicts nothing that is known
    assert metrics.perplexity().reduce(metrics.perplexity().record(sure, {"labels": labels})) == pytest.approx(1)


def test_bits_per_character_weighs_texts_by_their_length():
    logits = np.zeros((5, 16), dtype=np.float32)
    logits[:2, 3] = 100.0  # the first text, of two characters, is certain
    batch = {"labels": torch.full((5,), 3), "lengths": torch.tensor([2, 3])}
    metric = metrics.bits_per_character()
    records = metric.record(logits, batch)
    assert records == pytest.approx(np.array([[0, 2], [12, 3]]), abs=1e-6)
    assert metric.reduce(records) == pytest.approx(12 / 5)


def test_spearman_takes_neighbouring_rows_as_pairs():
    angles = np.array([0.1, 0.9, 0.5])
    rows = np.stack([np.array([np.cos(a), np.sin(a)]) for angle in angles for a in (0.0, angle)]) * 7
    records = metrics.spearman().record(rows, {"labels": torch.tensor([5.0, 1.0, 3.0])})
    assert records[:, 0] == pytest.approx(np.cos(angles))
    assert metrics.spearman().reduce(records) == pytest.approx(100)


def test_anomaly_scores_are_means_over_a_clips_inputs():
    x = torch.zeros(6, 4)
    output = np.repeat([1.0, 3.0, 0.0, 0.0, 2.0, 2.0], 4).reshape(6, 4)
    metric = metrics.anomaly_auc(2)
    records = metric.record(output, {"x": x, "labels": torch.tensor([1, 0, 0])})
    assert records[:, 0].tolist() == [5.0, 0.0, 4.0]
    assert metric.reduce(records) == 1.0


def test_denoising_takes_the_output_away():
    clean = torch.rand(2, 1, 8, 8)
    batch = {"x": clean + 0.1, "labels": clean}
    perfect, nothing = np.full((2, 1, 8, 8), 0.1), np.zeros((2, 1, 8, 8))
    metric = metrics.denoising_psnr()
    assert metric.reduce(metric.record(perfect, batch)) > 100
    assert 20 <= metric.reduce(metric.record(nothing, batch)) < 21
