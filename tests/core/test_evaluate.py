"""One pass over a split: records in order, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.core.data import Arrays
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.evaluate import records, torch_figure, torch_run
from featherweight.core.metric import Metric
from featherweight.core.task import Task


def task(count: int = 10, wrong: int = 3) -> Task:
    """The identity on one-hot vectors; `wrong` of `count` labels are not what the vector says."""
    labels = torch.arange(count) % 4
    said = labels.clone()
    said[:wrong] = (said[:wrong] + 1) % 4
    inputs = nn.functional.one_hot(said, 4).float()
    return Task(name="identity", model=nn.Identity(), test=Arrays(inputs, labels), batch_size=4)


def test_one_record_per_input_in_order_over_uneven_batches():
    made = task()
    found = records(made, torch_run(made, made.original))
    assert found.tolist() == [0.0] * 3 + [100.0] * 7
    assert torch_figure(made) == 70.0


def test_the_model_runs_in_evaluation_mode_without_gradients():
    made, seen = task(), []

    class Spy(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    records(made, torch_run(made, Spy().train()))
    assert set(seen) == {(False, False)}


def test_progress_counts_every_batch():
    from featherweight.core.progress import Progress

    seen = []

    class Count(Progress):
        def track(self, items, text, total=None):
            for item in items:
                seen.append(text)
                yield item

    records(task(), torch_run(task(), nn.Identity()), progress=Count())
    assert seen == ["evaluating test"] * 3


def test_what_is_not_finite_or_empty_is_refused():
    made = task()
    bad = replace(made, metric=Metric("log", lambda output, batch: np.full(len(output), np.nan)))
    with pytest.raises(NotFinite, match="split 'test': the metric log became NaN"):
        records(bad, torch_run(bad, bad.original))
    with pytest.raises(TaskError, match="the split 'test' is empty"):
        records(replace(made, test=[]), torch_run(made, made.original))
    with pytest.raises(TaskError, match="no 'validate' data"):
        records(made, torch_run(made, made.original), "validate")
