"""What every test shares: one thread (small tensors gain nothing from more), fixed seeds, visible skips."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = os.environ.get("FEATHERWEIGHT_DATA", "")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it to 80 for its workers; tables are tested at their own width


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DATA and Path(DATA).is_dir():
        return
    reason = f"FEATHERWEIGHT_DATA is {f'{DATA}, which is no folder' if DATA else 'not set'}"
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
