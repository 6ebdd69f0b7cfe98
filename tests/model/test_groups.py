"""Coupled dimensions: every rule, on a small network; and always: silenced equals removed."""

from __future__ import annotations

import pytest
import torch
from coupled_cases import CASES
from coupled_nets import check, coupling_name, lively, widths
from small_tasks import one_thread  # noqa: F401


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str):
    factory, shape, expected = CASES[name]
    model = lively(factory())
    coupling = check(model, {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))})
    assert widths(coupling) == {coupling_name(model, weight): units for weight, units in expected.items()}
    assert expected or coupling.fixed
