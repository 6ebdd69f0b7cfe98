"""From an ONNX graph of floats to the one that is deployed: integers where they are stored, and in the form that
integer kernels need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.core.encoding import Encoding
from featherweight.core.storage import whole_bytes

from .activations import drop_clipping, make_signed, merge_slices, move_behind, pool_means
from .attention import turn_keys
from .biases import quantize_biases
from .convolution import absorb_padding, pad_channels
from .edit import Editor
from .kernels import byte_weights, pack
from .linear import look_up, multiply_dynamic, multiply_rows, multiply_static, restore_floats
from .narrow import use_blocks
from .recurrent import recur_dynamic
from .restore import restore
from .shrink import shrink
from .weights import check_read, place, weights_in

if TYPE_CHECKING:
    from onnxscript import ir


def lower(
    model: ir.Model,
    stored: dict[str, Encoding],
    parameters: set[str],
    signed: bool = False,
    multiply: bool = True,
    opset: int = 21,
) -> None:
    """Store the weights named in `stored` as asked, arrange quantized activations for integer kernels, and drop what
    the file does not need.

    `parameters` are the torch names of all weights; they stay the names of their initializers. `signed` asks for int8
    activations; `multiply` lets products compute on weights in blocks (MatMulNBits).
    """
    edit = Editor(model.graph)
    turn_keys(edit)
    check_read(edit, stored)
    narrow = {name: encoding for name, encoding in stored.items() if not whole_bytes(encoding)}
    in_bytes = byte_weights(edit, narrow)
    in_blocks = use_blocks(edit, {name: narrow[name] for name in narrow if name not in in_bytes}, multiply)
    others = {name: encoding for name, encoding in narrow.items() if name not in in_blocks and name not in in_bytes}
    restore(model, edit, others, opset)
    whole = {name: stored[name] for name in stored if name not in narrow or name in in_bytes}
    place(edit, whole, parameters - (set(narrow) - set(in_bytes)))
    if signed:
        make_signed(edit)
    pool_means(edit)
    move_behind(edit)
    drop_clipping(edit)
    merge_slices(edit)
    absorb_padding(edit)
    multiply_dynamic(edit)
    multiply_rows(edit)
    recur_dynamic(edit)
    multiply_static(edit)
    look_up(edit)
    quantize_biases(edit)
    if not signed:
        pad_channels(edit)
    restore_floats(edit, multiply)
    pack(model, edit, in_bytes, opset)
    edit.sweep()
    shrink(model, {name for name in model.graph.initializers if set(weights_in(name)) & parameters})
    model.metadata_props.update({name: note for name, note in edit.notes.items() if name in model.graph.initializers})
