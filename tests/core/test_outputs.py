"""When two outputs of torch models are equal within rounding."""

import pytest
import torch

from featherweight.core.outputs import difference

X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    "want, got",
    [
        (X, X * (1 + 1e-5)),
        ({"a": X, "b": None}, {"a": X}),
        (X.half(), X.half() * 1.01),
        (torch.tensor([torch.nan, torch.inf, 1.0]), torch.tensor([torch.nan, torch.inf, 1.0])),
        (torch.arange(3), torch.arange(3)),
        (torch.zeros(0, 2), torch.zeros(0, 2)),
        (torch.zeros(2), torch.zeros(2)),
    ],
)
def test_what_is_equal_within_rounding(want, got):
    assert difference(want, got) == ""


@pytest.mark.parametrize(
    "want, got, reason",
    [
        (X, X * (1 + 1e-3), "differs by 1.0e-03"),
        (X, X.T[:1], r"shape \(1, 2\), not \(2, 2\)"),
        ({"a": X}, {"b": X}, "the outputs are b, not a"),
        (X, torch.where(X > 3, torch.nan, X), "differs by nan"),
        (torch.arange(3), torch.tensor([0, 1, 3]), "differs by"),
        (torch.zeros(2), torch.full((2,), 1e-3), "differs by"),
        ((X, X), (X, -X), "'output_1' differs by 2.0e"),
    ],
)
def test_what_differs_is_said_in_words(want, got, reason):
    import re

    assert re.search(reason, difference(want, got))
