"""What a model returns, as named tensors: one form for torch models and for artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["single", "tuple", "dict"]


def named_outputs(output: Any) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a model's output and its tensors by name; None entries are dropped, nested ones get dotted
    names.
    """
    from torch import Tensor

    if isinstance(output, Tensor):
        return "single", {"output": output}
    if isinstance(output, Mapping):
        return "dict", dict(_flatten("", output))
    if isinstance(output, tuple | list):
        return "tuple", {f"output_{name}": tensor for name, tensor in _flatten("", dict(enumerate(output)))}
    raise TaskError(
        f"the model returns {type(output).__name__}; it must return a tensor, or a tuple or dict of tensors"
    )


def _flatten(prefix: str, items: Mapping[Any, Any]) -> list[tuple[str, Tensor]]:
    from torch import Tensor

    found: list[tuple[str, Tensor]] = []
    for key, value in items.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, Mapping):
            found += _flatten(f"{name}.", value)
        elif isinstance(value, tuple | list):
            found += _flatten(f"{name}.", dict(enumerate(value)))
        elif value is not None:
            raise TaskError(
                f"the model's output {name!r} is {type(value).__name__}; outputs must be tensors "
                "(for a Hugging Face model set use_cache=False)"
            )
    return found


def rebuild(layout: str, named: Mapping[str, np.ndarray]) -> Any:
    """The arrays in the layout that the torch model returns them in."""
    if layout == "single":
        return next(iter(named.values()))
    return tuple(named.values()) if layout == "tuple" else dict(named)


def as_arrays(output: Any) -> Any:
    """A torch model's output as numpy arrays in the same layout as an artifact gives them."""
    layout, named = named_outputs(output)
    return rebuild(
        layout,
        {
            name: tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
            for name, tensor in named.items()
        },
    )


def first(output: Any) -> Any:
    """The first tensor or array of an output in any layout: the logits of most models."""
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else next(iter(output.values()))
    return output[0] if isinstance(output, tuple | list) else output


def difference(want: Any, got: Any) -> str:
    """How two outputs of torch models differ beyond rounding, in words; empty if they do not.

    Compared by root mean square of the difference over that of `want`; the bound is the square root of the epsilon of
    the output's type (3.5e-4 for float32), that is, half of the digits.
    """
    import torch

    wanted, found = named_outputs(want)[1], named_outputs(got)[1]
    if list(wanted) != list(found):
        return f"the outputs are {', '.join(found)}, not {', '.join(wanted)}"
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            return f"{name!r} has the shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        bound = torch.finfo(tensor.dtype).eps ** 0.5 if tensor.is_floating_point() else 0.0
        relative = relative_difference(tensor, found[name])
        if not relative <= bound:
            return f"{name!r} differs by {relative:.1e} (relative)"
    return ""


def relative_difference(want: Tensor, got: Tensor) -> float:
    """Root mean square of the difference of two tensors of one shape over that of `want`; equal infinities, and NaN at
    both sides, are equal.
    """
    want, got = want.detach().double(), got.detach().double()
    if not want.numel():
        return 0.0
    off = (got - want).masked_fill((got == want) | (got.isnan() & want.isnan()), 0.0)
    scale = want[want.isfinite()].square().mean().sqrt().nan_to_num(0.0)
    return float(off.square().mean().sqrt() / scale.clamp_min(1e-12))
