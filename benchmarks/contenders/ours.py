"""featherweight: the recipes of one quantization step, as they come, through the same call that a user makes."""

from __future__ import annotations

from pathlib import Path

from featherweight import api
from featherweight.core.recipe import Recipe

from ..contender import Material, contender


def applied(material: Material, recipe: Recipe) -> Path:
    out, runtime = material.folder / "run", material.original.target
    result = api.apply(material.task, recipe, runtime, out=out, seed=material.seed, axes=["size"])
    return Path(result.artifact.file)


@contender("featherweight static", package="featherweight")
def static(material: Material) -> Path:
    """quantize.static with its default settings."""
    return applied(material, Recipe([{"kind": "quantize.static"}]))


@contender("featherweight static mse", package="featherweight")
def static_mse(material: Material) -> Path:
    """quantize.static with ranges of weights and activations by mean-squared error."""
    return applied(material, Recipe([{"kind": "quantize.static", "calibration": "mse", "weights": "mse"}]))


@contender("featherweight dynamic", package="featherweight")
def dynamic(material: Material) -> Path:
    """quantize.dynamic with its default settings."""
    return applied(material, Recipe([{"kind": "quantize.dynamic"}]))
