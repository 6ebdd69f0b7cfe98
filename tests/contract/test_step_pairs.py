"""Every step in sequence with every other: saved, loaded, exported, compared. By default most steps
come first and second a few times, and go to both targets; the other pairs are slow, those of steps
that search too, and go to one target, in turn: exporting takes most of the time. Pairs of the newest
families with others than one step of each mechanism are tried on request: pytest -m exhaustive.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from small_tasks import one_thread  # noqa: F401
from step_samples import CPU, KINDS, TASKS, allowed, leading, sample, share_a_task, small_task, stronger
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.encoding import Sparse
from featherweight.core.outputs import as_arrays
from featherweight.core.recipe import Recipe
from featherweight.core.soft import copied, encodings
from featherweight.core.step import Step
from featherweight.core.target import target
from featherweight.model.skeleton import load, save

TARGETS = ("onnxruntime", "torch")
TAKES_THE_REST = frozenset({"quantize.float16"})  # stores what other steps left: in a pair something must be left
SHIFTS = (5, 17)  # of kinds in the order of their names: to other families
SEARCHING = frozenset({"quantize.coded", "quantize.mixed", "quantize.trellis"})  # take tens of seconds after another
# one step of each mechanism: with these the steps of the newest families are tried in CI, too
REPRESENTATIVES = frozenset(
    {
        "adapt.lora",
        "distill.logits",
        "experts.split",
        "factor.svd",
        "prune.structured",
        "quantize.static",
        "quantize.weights",
    }
)
NEWEST = ("adapt.", "experts.", *(f"substitute.{each}" for each in ("activations", "fused", "queries", "resolution")))
ALLOWED = [pair for pair in itertools.product(KINDS, repeat=2) if allowed(*pair)]
PAIRS = [pair for pair in ALLOWED if share_a_task(*pair)]


def often(one: str, other: str) -> bool:
    """Whether a pair is tried by default."""
    return (KINDS.index(other) - KINDS.index(one)) % len(KINDS) in SHIFTS and not SEARCHING & {one, other}


def targets_of(one: str, other: str) -> tuple[str, ...]:
    """Both targets, or one of them so that every step comes first and second with each."""
    return TARGETS if often(one, other) else (TARGETS[(KINDS.index(one) + KINDS.index(other)) % 2],)


def pair(one: str, other: str):
    new = any(kind.startswith(NEWEST) for kind in (one, other)) and not REPRESENTATIVES & {one, other}
    mark = pytest.mark.exhaustive if new else pytest.mark.slow
    return pytest.param(one, other, marks=() if often(one, other) else mark, id=f"{one}-{other}")


@functools.cache
def begun(kind: str, name: str, skip: tuple[str, ...]) -> nn.Module:
    """The model of the small task called so after a sample of one step; it must not be changed."""
    task, settings = TASKS[name](), {"skip": list(skip)} if skip else {}
    return run_step(leading(kind, **settings), task.fresh(), Context(task, device=CPU))[0]


@pytest.mark.parametrize(("one", "other"), [pair(*each) for each in PAIRS])
def test_every_pair_saves_exports_and_agrees(one, other, tmp_path):
    task = small_task(one, other)
    skip = ("head",) if other in TAKES_THE_REST and sample(one).forms() else ()
    second = stronger(other) if one == other else sample(other)
    recipe = Recipe([leading(one, **({"skip": list(skip)} if skip else {})), second])
    name = next(name for name in TASKS if TASKS[name]() is task)
    model, record = run_step(second, copied(begun(one, name, skip)), Context(task, device=CPU))
    assert record.step["kind"] == other
    save(model, tmp_path / "model")
    model = load(tmp_path / "model", like=task.original)
    allowed_forms = {form for item in recipe.steps for form in item.forms()}
    integers = {each.form for each in encodings(model).values() if not isinstance(each, Sparse)}
    assert integers <= allowed_forms and bool(integers) == bool(allowed_forms)
    images = task.test.tensors[0][:100]
    with torch.no_grad():
        wanted = as_arrays(model(images))
    for name in targets_of(one, other):
        runtime = target(name)
        recipe.check(runtime)
        artifact = runtime.export(model, task.example, tmp_path / name, recipe=recipe.dump())
        assert integers <= set(artifact.manifest.stored.values())
        got = artifact.open()(images)
        assert got.shape == wanted.shape
        # integer kernels may round a value on the edge between two steps the other way; floats agree to rounding
        size, bound = np.sqrt(np.mean(wanted**2)), 0.05 if integers else 1e-4
        assert np.sqrt(np.mean((got - wanted) ** 2)) < bound * size
        clear = np.diff(np.sort(wanted, axis=1)[:, -2:])[:, 0] > bound * size  # not a tie to within that error
        assert (got.argmax(1) == wanted.argmax(1))[clear].mean() >= (0.95 if integers else 1.0)


def test_every_step_comes_first_and_second_with_every_target():
    for place in (0, 1):
        met = {(pair[place], name) for pair in PAIRS for name in targets_of(*pair)}
        assert met == set(itertools.product({pair[place] for pair in PAIRS}, TARGETS))


def test_an_order_that_cannot_work_is_refused_before_anything_runs():
    refused = set(itertools.product(KINDS, repeat=2)) - set(ALLOWED)
    unexplained = {(one, other) for one, other in refused if not Step.kinds[one].takes & Step.kinds[other].needs}
    assert unexplained == {(one, other) for one, other in unexplained if Step.kinds[other].begins}
    assert not [(one, other) for one, other in ALLOWED if Step.kinds[other].begins]
    assert ("quantize.dynamic", "quantize.dynamic") in refused
