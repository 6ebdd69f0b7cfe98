"""The calibration data as the peers' scripts read them: they run without featherweight, so this imports numpy alone."""

from __future__ import annotations

import numpy as np


def inputs_in(path: str) -> list[dict[str, np.ndarray]]:
    """The batches of an .npz file whose arrays are called "place:input", in order of place."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            place, name = key.split(":", 1)
            batches.setdefault(int(place), {})[name] = arrays[key]
    return [batches[place] for place in sorted(batches)]
