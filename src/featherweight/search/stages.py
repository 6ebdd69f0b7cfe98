"""What each step of a recipe did: the artifact after every prefix, measured beside the others; and the weights before
and after.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..core.errors import FeatherweightError, OutputError
from ..core.metric import Records
from ..core.recipe import Recipe
from ..core.run import Layer, Stage
from ..core.soft import fold
from ..core.target import Artifact
from ..measure.statistics import Estimate, speedup
from .judge import ORIGINAL, Judge, p50
from .output import work_folder

SMALLER = 0.01  # share of the file that must go for a step to have made it smaller: headers alone vary by this much


@dataclass(frozen=True)
class Measured:
    """A stage with what is needed to tell a gain from noise."""

    stage: Stage
    records: Records
    faster: Estimate  # than the original


def stages(judge: Judge, recipe: Recipe, final: Artifact) -> tuple[list[Stage], list[str]]:
    """The original and the artifact after each step, on the split where choices are made, and warnings about steps
    that bought nothing.

    `final` is the artifact of the whole recipe. All are timed in one interleaved run. Where a prefix cannot be
    exported by itself, no stages are given, and a warning says why.
    """
    names = [ORIGINAL, *(item.kind for item in recipe.steps)]
    artifacts = [judge.original]
    try:
        for place in range(1, len(recipe.steps)):
            artifacts.append(_prefix(judge, recipe, place))
    except OutputError:
        raise
    except FeatherweightError as error:
        return [], [f"the steps could not be measured one by one: {error}"]
    measured = _measure(judge, names, [*artifacts, final])
    return [item.stage for item in measured], _idle(judge, measured)


def _prefix(judge: Judge, recipe: Recipe, place: int) -> Artifact:
    prefix = Recipe(recipe.steps[:place])
    judge.job.progress.say(f"measuring the recipe up to step {place}")
    model, _ = judge.job.build(prefix)
    return judge.job.export(model, prefix, work_folder(judge.job.out, f"stage{place}"))


def _measure(judge: Judge, names: Sequence[str], artifacts: Sequence[Artifact]) -> list[Measured]:
    keys = [str(place) for place in range(len(artifacts))]
    samples = judge.time(dict(zip(keys, artifacts)))
    found = []
    for key, name, artifact in zip(keys, names, artifacts):
        own = judge.records if key == "0" else judge.validate(artifact)
        stage = Stage(
            after=name,
            accuracy=judge.task.metric.reduce(own),
            bytes=artifact.bytes(),
            latency_ms=p50(samples[key]),
            parameters=artifact.manifest.work.parameters,
            macs=artifact.manifest.work.macs,
        )
        found.append(Measured(stage, own, speedup(samples["0"], samples[key], seed=judge.job.seed)))
    return found


def _idle(judge: Judge, measured: Sequence[Measured]) -> list[str]:
    found = []
    for before, after in itertools.pairwise(measured):
        if not (_smaller(before, after) or _faster(before, after) or _better(judge, before, after)):
            found.append(
                f"{after.stage.after} bought nothing here: "
                "the artifact is no smaller, no faster and no more accurate than without it"
            )
    return found


def _smaller(before: Measured, after: Measured) -> bool:
    return after.stage.bytes < before.stage.bytes * (1 - SMALLER)


def _faster(before: Measured, after: Measured) -> bool:
    """Whether the gain is beyond the two intervals of the speed-ups over the original."""
    return after.faster.low > before.faster.value and before.faster.high < after.faster.value


def _better(judge: Judge, before: Measured, after: Measured) -> bool:
    """Whether the paired 95% interval of the drop lies wholly below zero."""
    return judge.task.metric.drop_interval(before.records, after.records, 400, judge.job.seed)[1] < 0


def layers(original: nn.Module, model: nn.Module, before: Artifact, after: Artifact) -> list[Layer]:
    """Every weight of two or more dimensions before and after: shapes from the models, bytes and forms from what lies
    on the disk.
    """
    old = _shapes(original)
    new = _shapes(fold(model))
    return [
        Layer(
            name=name,
            shape_before=old.get(name),
            shape_after=new.get(name),
            bytes_before=_bytes(before, name, old.get(name)),
            bytes_after=_bytes(after, name, new.get(name)),
            form=_form(after, name) if name in new else "",
        )
        for name in [*old, *(name for name in new if name not in old)]
    ]


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.dim() > 1}


def _form(artifact: Artifact, name: str) -> str:
    """What the artifact says of how it stores a weight; a weight that no output needs is not stored at all."""
    form = artifact.manifest.stored.get(name)
    if form is None:
        return "not stored"
    known = form if bits(form) is not None else f"{form}, bytes not known"
    return f"{known}, zeros stored" if name in artifact.manifest.dense else known


def _bytes(artifact: Artifact, name: str, shape: list[int] | None) -> int:
    """Bytes of a weight of this shape in the form that the artifact stores it in; 0 where it stores none."""
    width = bits(artifact.manifest.stored.get(name, ""))
    return 0 if shape is None or width is None else math.ceil(math.prod(shape) * width / 8)


def bits(form: str) -> int | None:
    """Bits per value of a stored form, by the number behind its first word: int8, uint4, float8_e4m3fn; bool: 8.

    None where the name says none: "2:4", "sparse".
    """
    found = re.match(r"[a-z]+(\d+)", form)
    return int(found[1]) if found else 8 if form == "bool" else None
