"""featherweight: the recipes of one quantization step, as they come, through the same call that a user makes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from featherweight import api
from featherweight.core.errors import FeatherweightError
from featherweight.core.evaluate import records
from featherweight.core.recipe import Recipe

from ..compare import ORIGINAL, race, runner
from ..contender import Material, contender
from ..record import CHOSEN

STEPS: dict[str, dict[str, Any]] = {
    "static": {"kind": "quantize.static"},
    "static mse": {"kind": "quantize.static", "calibration": "mse"},
    "static percentile": {"kind": "quantize.static", "calibration": "percentile"},
    "static plain": {"kind": "quantize.static", "weights": "max", "bias_correction": False},
    "static equalized": {"kind": "quantize.static", "equalize": True},
    "static smoothed": {"kind": "quantize.static", "smooth": 0.5},
    "dynamic": {"kind": "quantize.dynamic"},
}
SLOWER = 1.1  # up to which a file counts as being as fast as the fastest
_made: dict[tuple[Path, str], Path] = {}


def applied(material: Material, name: str) -> Path:
    """The file of one of our recipes; made once for each network."""
    key = (material.original.file, name)
    if key not in _made:
        out, runtime = material.folder / name.replace(" ", "-"), material.original.target
        result = api.apply(material.task, Recipe([STEPS[name]]), runtime, out=out, seed=material.seed, axes=["size"])
        _made[key] = Path(result.artifact.file)
    return _made[key]


@contender("featherweight static", package="featherweight")
def static(material: Material) -> Path:
    """quantize.static with its default settings: scales of weights by mean-squared error, biases corrected."""
    return applied(material, "static")


@contender("featherweight static mse", package="featherweight")
def static_mse(material: Material) -> Path:
    """quantize.static with ranges of activations by mean-squared error."""
    return applied(material, "static mse")


@contender("featherweight dynamic", package="featherweight")
def dynamic(material: Material) -> Path:
    """quantize.dynamic with its default settings."""
    return applied(material, "dynamic")


@contender(CHOSEN, package="featherweight")
def chosen(material: Material) -> Path:
    """One of our recipes, picked without the test split: of those that lose no more than the bar on the VALIDATION
    split and run within a tenth of the fastest (batch 1), the best there; if none keeps the bar, the best there.
    """
    files = {}
    for name in STEPS:
        try:
            files[name] = applied(material, name)
        except FeatherweightError as error:
            material.notes.append(f"{name} is out: {error}")
    before, *after = validation_figures(material, [material.original.file, *files.values()])
    lost = {name: material.task.metric.drop(before, now) for name, now in zip(files, after)}
    bar = material.max_drop / 100 * abs(before)
    keen = {name: path for name, path in files.items() if lost[name] <= bar} or files
    timings = race(material.task, material, {ORIGINAL: material.original.file, **keen}, 1, 1.0)
    fastest = min(timings[name].p50_ms.value for name in keen)
    quick = [name for name in keen if timings[name].p50_ms.value <= SLOWER * fastest or keen is files]
    best = min(quick, key=lambda name: lost[name])
    tried = ", ".join(f"{name} {drop:+.2f}" for name, drop in lost.items())
    material.notes.append(f"{best} (lost on the validation split: {tried})")
    return files[best]


def validation_figures(material: Material, files: list[Path]) -> list[float]:
    """The metric of each file over the validation split."""
    task, original = material.task, material.original
    calls = (partial(task.call, runner(original, path)) for path in files)
    return [task.metric.reduce(records(task, call, "validate")) for call in calls]
