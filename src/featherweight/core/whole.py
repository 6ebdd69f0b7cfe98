"""Modules that compute only some of their parts for an input, and how all parts are made to see all inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


class Selective(nn.Module):
    """A module that sends each input to some of its parts only.

    While `observed_whole` is set, every part computes for all inputs, and what is not chosen is thrown away: the
    output is the same, but hooks on the parts see every input. No part is then calibrated on nothing.
    """

    observed_whole: bool = False


@contextlib.contextmanager
def observed_whole(model: nn.Module) -> Iterator[None]:
    """Within this block all parts of selective modules in `model` see all inputs."""
    chosen = [(module, module.observed_whole) for module in model.modules() if isinstance(module, Selective)]
    for module, _ in chosen:
        module.observed_whole = True
    try:
        yield
    finally:
        for module, before in chosen:
            module.observed_whole = before
