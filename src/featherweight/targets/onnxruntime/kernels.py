"""Weights of fewer than 8 bits for kernels that take bytes: packed in the file, bytes once it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from featherweight.core.encoding import Affine, Encoding

from .edit import Editor, array, quantized_activation
from .restore import restore
from .weights import weights_in

if TYPE_CHECKING:
    from onnxscript import ir

INT8 = 3  # ONNX's number for the type
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose")


def byte_weights(edit: Editor, narrow: Mapping[str, Encoding]) -> dict[str, Affine]:
    """Those of the weights below 8 bits that an operation multiplies with quantized activations: signed, around zero,
    with a scale for all or one per channel. To an integer kernel they are 8-bit weights.
    """
    return {
        name: found
        for name, found in narrow.items()
        if isinstance(found, Affine) and _is_symmetric(found) and _meets_integers(edit, name)
    }


def _is_symmetric(encoding: Affine) -> bool:
    if encoding.group is not None:
        return False
    return encoding.values.dtype.is_signed and not bool(encoding.zero.any()) and not encoding.zero.is_floating_point()


def _meets_integers(edit: Editor, name: str) -> bool:
    users = [usage.node for usage in edit.graph.initializers[name].uses()]
    while any(user.op_type == "Transpose" for user in users):
        users = [usage.node for user in users if user.op_type == "Transpose" for usage in user.outputs[0].uses()] + [
            user for user in users if user.op_type != "Transpose"
        ]
    return bool(users) and all(
        user.op_type in PRODUCTS and quantized_activation(user.inputs[0]) is not None for user in users
    )


def pack(model: ir.Model, edit: Editor, packed: Mapping[str, Affine], opset: int) -> None:
    """Store the initializers of these weights in as many bits as they need; the graph makes the bytes of them again,
    which the runtime does once, when it loads, before it chooses its kernels.
    """
    import torch

    forms: dict[str, Encoding] = {}
    for name, old in list(edit.graph.initializers.items()):
        held, names = array(old), weights_in(name)
        if held is None or held.dtype != np.int8 or not set(names) <= set(packed) or not old.uses():
            continue
        one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
        bits = max(packed[each].bits for each in names)
        forms[name] = Affine(values=torch.from_numpy(held.copy()), scale=one, zero=zero, bits=bits)
        floats = edit.initializer(name, held.astype(np.float32))
        edit.take_over(old, edit.insert(edit.graph[0], "Cast", [floats], to=INT8))
    restore(model, edit, forms, opset)
