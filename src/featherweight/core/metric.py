"""Metrics: what a model is judged by, as per-input records that are reduced to one figure with an interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import TaskError
from .outputs import first

Records = np.ndarray  # one row per input


def _mean(records: Records) -> float:
    return float(records.mean())


def _labels(batch: Any) -> np.ndarray:
    from .task import labels

    return np.asarray(labels(batch))


def _fitting(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The labels in the shape of what they are compared with; (N, 1) against (N) would silently compare all pairs."""
    if wanted.size != given.size:
        raise TaskError(
            f"labels of shape {wanted.shape} do not fit outputs of shape {given.shape}; give a metric of your own"
        )
    return wanted.reshape(given.shape)


def same_class(one: Any, other: Any) -> np.ndarray:
    """Whether two outputs name the same class (last dimension) for each input."""
    equal = first(one).argmax(-1) == first(other).argmax(-1)
    return equal.reshape(len(equal), -1).mean(1)


SAME_NUMBER = 0.05  # relative difference up to which two numbers are the same answer,
SAME_DIRECTION = 0.95  # cosine from which two vectors are,
SAME_LENGTH = 1 / 3  # if their lengths differ by no more than this share of the first one's


def close(one: Any, other: Any) -> np.ndarray:
    """1 for each input whose two outputs are the same answer, else 0.

    A single number is, within 5 %. A vector (an embedding, a picture, a series) is, if it points the same way (cosine
    at least 0.95) and is of like length (within a third): rounding moves every entry a little, which adds up in the
    norm of the difference over hundreds of entries, but hardly turns the vector.
    """
    a, b = (np.asarray(first(item), dtype=np.float64).reshape(len(first(item)), -1) for item in (one, other))
    long, longer = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    if a.shape[1] == 1:
        return (np.linalg.norm(a - b, axis=1) <= SAME_NUMBER * long + 1e-12).astype(float)
    turned = (a * b).sum(1) < SAME_DIRECTION * long * longer
    return (~turned & (np.abs(longer - long) <= SAME_LENGTH * long + 1e-12)).astype(float)


@dataclass(frozen=True)
class Metric:
    """A figure of merit over a whole split.

    `record(output, batch)` gives one row per input (a number, or a few that `reduce` needs together); `reduce(records)`
    the figure. Outputs are numpy arrays in the layout that the torch model returns. `agree(output, other)` gives, per
    input, how far two outputs agree (0 to 1); by default 1 where they are `close`. Splitting the two lets one pass over
    the artifact serve the figure, its bootstrap interval and the paired difference.
    """

    name: str
    record: Callable[[Any, Any], Records]
    reduce: Callable[[Records], float] = _mean
    unit: str = ""
    higher_is_better: bool = True
    agree: Callable[[Any, Any], np.ndarray] = close

    def drop(self, original: float, compressed: float) -> float:
        """How much worse `compressed` is than `original`, in the metric's unit; negative if it is better."""
        return original - compressed if self.higher_is_better else compressed - original

    def interval(self, records: Records, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95% interval of the figure: percentile bootstrap over inputs (Efron 1979)."""
        return _interval([self.reduce(records[index]) for index in _resamples(len(records), resamples, seed)])

    def drop_interval(
        self, original: Records, compressed: Records, resamples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """95% interval of the drop between two sets of records of the same inputs: paired bootstrap."""
        return _interval(
            [
                self.drop(self.reduce(original[i]), self.reduce(compressed[i]))
                for i in _resamples(len(original), resamples, seed)
            ]
        )


def _resamples(count: int, resamples: int, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return (generator.integers(0, count, count) for _ in range(resamples))


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def top1() -> Metric:
    """Share of inputs whose highest logit is the label's, in percent."""

    def record(output: Any, batch: Any) -> Records:
        classes = first(output).argmax(-1)
        return (classes == _fitting(_labels(batch), classes)) * 100.0

    return Metric("top1", record, unit="%", agree=same_class)


def mean_squared_error() -> Metric:
    """Mean of squared differences between output and label; lower is better."""

    def record(output: Any, batch: Any) -> Records:
        values = np.asarray(first(output), dtype=np.float64)
        difference = values - _fitting(_labels(batch), values)
        return (difference**2).reshape(len(difference), -1).mean(1)

    return Metric("mse", record, unit="", higher_is_better=False)
