"""From an ONNX graph of floats to the one that is deployed: integers where they are stored, and in the form that
integer kernels need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.core.encoding import Encoding

from .activations import drop_clipping, make_signed, merge_slices, move_behind, pool_means
from .attention import turn_keys
from .biases import quantize_biases
from .convolution import absorb_padding, pad_channels
from .edit import Editor
from .linear import look_up, multiply_dynamic, multiply_static, restore_floats
from .shrink import shrink
from .weights import place, weights_in

if TYPE_CHECKING:
    from onnxscript import ir


def lower(model: ir.Model, stored: dict[str, Encoding], parameters: set[str], signed: bool = False) -> None:
    """Store the weights named in `stored` as asked, arrange quantized activations for integer kernels, and drop what
    the file does not need.

    `parameters` are the torch names of all weights; they stay the names of their initializers. `signed` asks for int8
    activations.
    """
    edit = Editor(model.graph)
    turn_keys(edit)
    place(edit, stored, parameters)
    if signed:
        make_signed(edit)
    pool_means(edit)
    move_behind(edit)
    drop_clipping(edit)
    merge_slices(edit)
    absorb_padding(edit)
    multiply_dynamic(edit)
    multiply_static(edit)
    look_up(edit)
    quantize_biases(edit)
    if not signed:
        pad_channels(edit)
    restore_floats(edit)
    edit.sweep()
    shrink(model, {name for name in model.graph.initializers if set(weights_in(name)) & parameters})
