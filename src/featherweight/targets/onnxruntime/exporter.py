"""torch's exporter to ONNX, which is told once in a process, and not in every export, what it can translate."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch
    from onnxscript import ir

REGISTRIES: dict[Any, Any] = {}  # what torch can translate, by the arguments (an opset) that it was listed for


def to_onnx(program: torch.export.ExportedProgram, opset: int, **given: Any) -> ir.Model:
    """The program as ONNX operators, not optimized; `given` goes to `torch.onnx.export`."""
    import torch

    with registry_kept():
        exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=opset, **given)
    assert exported is not None
    return exported.model


@contextlib.contextmanager
def registry_kept() -> Iterator[None]:
    """Let torch list its translations once: it parses the source of five hundred functions for the list, which takes
    longer than all else in the export of a small model. A torch that has no such list within reach does as it always
    does. Each export gets a copy, to which it may add.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        listing = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):
        yield
        return

    def kept(*given: Any, **named: Any) -> Any:
        key = given, tuple(sorted(named.items()))
        if key not in REGISTRIES:
            REGISTRIES[key] = listing(*given, **named)
        found = copy.copy(REGISTRIES[key])
        found.functions = {operator: list(known) for operator, known in found.functions.items()}
        return found

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(kept)):
        yield
