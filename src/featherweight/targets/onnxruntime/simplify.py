"""An exported graph without what the exporter leaves behind: computed constants, operations that do nothing, batch
norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxscript import ir

# Rewritings by the operator that must be in the graph for them to apply; none of them renames a weight.
RULES = {
    "BatchNormalization": (
        "fuse_batchnorm_into_conv",
        "fuse_batchnorm_into_conv_transpose",
        "fuse_batchnorm_into_gemm",
    ),
    "Pad": ("normalize_pad_format_conv", "fuse_pad_into_conv"),
    "Conv": ("remove_optional_bias_from_conv",),
    "ConvTranspose": ("remove_optional_bias_from_conv_transpose",),
    "Gemm": ("remove_optional_bias_from_gemm",),
    "Slice": ("collapse_slice", "collapse_slice2", "slice_split"),
    "Transpose": ("transpose_transpose", "no_op_transpose"),
    "Reshape": ("materialize_reshape_shape", "reshape_reshape", "squeeze_reshape_1d"),
    "Unsqueeze": ("unsqueeze_unsqueeze",),
    "Cast": ("cast_cast", "no_op_cast"),
    "Expand": ("no_op_expand",),
    "Clip": ("successive_clip", "successive_clip_relu", "successive_relu_clip"),
    "Mul": ("mul_by_1",),
    "Add": ("add_0",),
}


def simplify(model: ir.Model, may_fold: Callable[[ir.Node], bool | None]) -> None:
    """Compute what follows from constants and rewrite what can be said shorter; `may_fold` can forbid that a node is
    computed.

    Unlike the exporter's own optimizer this never joins two weights that happen to be equal, and tries only rules that
    can apply.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass

    common.InlinePass()(model)
    for _ in range(2):
        fold_constants(model, should_fold=may_fold, onnx_shape_inference=True)
        rules = _rules(model)
        changed = RewritePass(rules)(model).modified if rules else False
        common.RemoveUnusedNodesPass()(model)
        if not changed:
            break
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _rules(model: ir.Model) -> list[Any]:
    from onnxscript.rewriter.rules import common as rules

    present = {node.op_type for node in model.graph}
    return [getattr(rules, f"{name}_rule") for kind, names in RULES.items() if kind in present for name in names]
