"""The metrics of the ready-made tasks: a pure function each, and the records that it needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.metric import Metric, Records, same_class
from ..core.outputs import first
from ..core.task import labels


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two series of N numbers, ties with their mean rank; NaN if one is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the receiver operating characteristic: the chance that a positive scores above a negative (ties half).

    `scores` and `positive` (0 or 1) have N entries; NaN if there is but one class. Mann and Whitney 1947.
    """
    from scipy.stats import rankdata

    ones = int(positive.sum())
    pairs = ones * (len(positive) - ones)
    return float((rankdata(scores)[positive > 0].sum() - ones * (ones + 1) / 2) / pairs) if pairs else float("nan")


def signal_to_noise(restored: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each of N images in 0..1, in decibels."""
    error = (restored.astype(np.float64) - clean) ** 2
    return -10 * np.log10(error.reshape(len(error), -1).mean(1).clip(1e-20))


def surprise(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Negative log-likelihood (nats) of `target` under `logits` (... x classes); `target` has the leading shape."""
    shift = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shift, target[..., None], -1)[..., 0]
    return np.log(np.exp(shift).sum(-1)) - chosen


def spearman() -> Metric:
    """Spearman correlation (times 100) between the cosine of two embeddings and the gold score.

    The output holds the embeddings of 2 N sentences, the two of a pair beside each other; the labels N scores.
    """

    def record(output: Any, batch: Any) -> Records:
        embeddings = np.asarray(first(output), dtype=np.float64)
        embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True).clip(1e-12)
        return np.stack([(embeddings[0::2] * embeddings[1::2]).sum(-1), np.asarray(labels(batch), dtype=np.float64)], 1)

    return Metric("spearman", record, lambda records: 100 * rank_correlation(*records.T))


def anomaly_auc(windows: int) -> Metric:
    """Area under the curve of a clip's reconstruction error against its label; a clip is `windows` inputs in a row."""

    def record(output: Any, batch: Any) -> Records:
        error = (np.asarray(first(output), dtype=np.float64) - np.asarray(batch["x"])) ** 2
        return np.stack([error.mean(-1).reshape(-1, windows).mean(-1), np.asarray(labels(batch), dtype=np.float64)], 1)

    return Metric("auc", record, lambda records: area_under_curve(*records.T))


def perplexity() -> Metric:
    """Perplexity of the next token: logits N x T x V against labels N x T, where -100 is padding.

    A record is a text's (nats, tokens).
    """

    def record(output: Any, batch: Any) -> Records:
        target = np.asarray(labels(batch))[:, 1:]
        real = target >= 0
        nats = surprise(np.asarray(first(output))[:, :-1], np.where(real, target, 0)) * real
        return np.stack([nats.sum(-1), real.sum(-1)], 1)

    return Metric("perplexity", record, _exponential, higher_is_better=False, agree=same_class)


def _exponential(records: Records) -> float:
    nats, tokens = records.sum(0)
    return float(np.exp(nats / tokens))


def bits_per_character() -> Metric:
    """Mean bits of the next character: logits N x V against labels N.

    `batch["lengths"]` says how many rows make one text; a record is a text's (bits, characters).
    """

    def record(output: Any, batch: Any) -> Records:
        bits = surprise(np.asarray(first(output)), np.asarray(labels(batch))) / np.log(2)
        lengths = np.asarray(batch["lengths"])
        return np.stack([np.add.reduceat(bits, np.cumsum(lengths) - lengths), lengths], 1)

    return Metric("bits_per_character", record, _ratio, unit="bits", higher_is_better=False, agree=same_class)


def _ratio(records: Records) -> float:
    total, count = records.sum(0)
    return float(total / count)


def denoising_psnr() -> Metric:
    """Mean peak signal-to-noise ratio of images from which the output, the estimated noise, is taken away."""

    def record(output: Any, batch: Any) -> Records:
        restored = (np.asarray(batch["x"]) - np.asarray(first(output))).clip(0, 1)
        return signal_to_noise(restored, np.asarray(labels(batch)))

    return Metric("psnr", record, unit="dB")
