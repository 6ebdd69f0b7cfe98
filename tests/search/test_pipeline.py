"""From a recipe, or from a search, to a folder that holds everything."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from tiny_search import Fails, Heal, Narrow, Round, Tiny, registered, task

from featherweight.core.errors import (
    ArtifactError,
    Infeasible,
    NoEffect,
    NotCarried,
    OutputError,
    RecipeError,
    TaskError,
)
from featherweight.core.progress import Progress
from featherweight.core.recipe import Recipe
from featherweight.core.run import Budget, Run
from featherweight.core.target import Artifact
from featherweight.model import skeleton
from featherweight.search import allowance, finish
from featherweight.search.judge import Judge
from featherweight.search.pipeline import apply, compress, measure, read_run

AXES = ["accuracy", "size"]
RECIPE = Recipe([Narrow(keep=0.4), Heal(epochs=1.0), Round()])
EVERYTHING = {"artifact", "original", "model", "recipe.yaml", "readings.json", "run.json", "job.json"}


def visible(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not path.name.startswith(".")}


def applied(out: Path, recipe: Recipe = RECIPE, **rest: Any) -> Run:
    with registered(Narrow, Heal, Round, Fails):
        return apply(task(), recipe, Tiny(), out, axes=AXES, **rest)


def test_apply_writes_everything(out: Path) -> None:
    run = applied(out)
    assert visible(out) == EVERYTHING
    artifact, original = Artifact(out / "artifact"), Artifact(out / "original")
    artifact.verify()
    assert artifact.manifest.stored["0.weight"] == "int8" and original.manifest.stored["0.weight"] == "float32"
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == RECIPE.dump() == artifact.manifest.recipe
    assert json.loads((out / "readings.json").read_text()) == run.answer()
    assert read_run(out) == run and run.feasible and run.task == "tiny_search:task"
    assert [record.step["kind"] for record in run.steps] == ["tiny.narrow", "tiny.heal", "tiny.round"]


def test_the_saved_model_is_the_one_in_the_artifact(out: Path) -> None:
    applied(out)
    model = skeleton.load(out / "model")
    images = task().test.tensors[0]
    with torch.no_grad():
        expected = model(images).numpy()
    with registered():
        given = Artifact(out / "artifact").open()(images)
    assert np.allclose(given, expected, atol=1e-5)
    assert model[0].out_features == 26


def test_what_each_step_did(out: Path) -> None:
    run = applied(out, Recipe([Narrow(keep=0.4), Heal(epochs=1.0, lr=1e-3), Round()]))
    assert [stage.after for stage in run.stages] == ["original", "tiny.narrow", "tiny.heal", "tiny.round"]
    sizes = [stage.bytes for stage in run.stages]
    assert sizes[0] > sizes[1] and sizes[1] == sizes[2] > sizes[3]
    assert run.stages[0].parameters > run.stages[1].parameters
    layers = {layer.name: layer for layer in run.layers}
    assert layers["0.weight"].shape_before == [64, 64] and layers["0.weight"].shape_after == [26, 64]
    assert layers["0.weight"].bytes_before == 64 * 64 * 4 and layers["0.weight"].bytes_after == 26 * 64
    assert layers["0.weight"].form == "int8"


def test_a_step_that_bought_nothing_is_named(out: Path) -> None:
    run = applied(out, Recipe([Heal(epochs=0.5, lr=1e-3), Round()]))
    idle = [warning for warning in run.warnings if "bought nothing here" in warning]
    assert len(idle) == 1 and idle[0].startswith("tiny.heal")


def test_same_seed_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place, seed in enumerate((5, 5, 6)):
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / f"cache{place}"))
        applied(tmp_path / str(place), seed=seed)
        digests.append(Artifact(tmp_path / str(place) / "artifact").manifest.digests["model.npz"])
    assert digests[0] == digests[1] != digests[2]


def test_the_users_model_is_not_modified(out: Path) -> None:
    before = {name: tensor.clone() for name, tensor in task().original.state_dict().items()}
    applied(out)
    assert all(torch.equal(before[name], tensor) for name, tensor in task().original.state_dict().items())


def test_a_finished_run_is_read_not_repeated(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = applied(out)
    monkeypatch.setattr(Judge, "__init__", lambda *_: pytest.fail("it was done again"))
    assert applied(out) == run


def test_another_recipe_may_not_overwrite(out: Path) -> None:
    applied(out)
    with pytest.raises(OutputError, match=r"another run .*recipe"):
        applied(out, Recipe([Round()]))


def test_an_impossible_recipe_is_refused_before_any_work(out: Path) -> None:
    with registered(Narrow, Round), pytest.raises(RecipeError, match=r"put tiny\.narrow before it"):
        apply(task(), Recipe([Round(), Narrow()]), Tiny(), out)
    with registered(Narrow, Round), pytest.raises(NotCarried, match="int8"):
        apply(task(), Recipe([Round()]), _Floats(), out)
    assert not out.exists()


class _Floats(Tiny):
    """Carries plain floats alone."""

    carries = frozenset()  # type: ignore[misc]


def test_a_step_that_fails_leaves_no_folder(out: Path) -> None:
    with pytest.raises(RuntimeError, match="never works"):
        applied(out, Recipe([Fails()]))
    with registered(Narrow), pytest.raises(NoEffect):
        apply(task(), Recipe([Narrow(keep=0.999)]), Tiny(), out)
    assert not out.exists()


def test_measure_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = applied(out)
    assert not any(reading.axis == "latency" for reading in run.readings)
    with registered(Narrow, Heal, Round):
        again = measure(out, ["latency", "size"], task=task())
    assert {reading.axis for reading in again.readings} == {"accuracy", "size", "latency"}
    assert "p50, batch 1, 1 thread" in again.verdict and read_run(out) == again
    assert json.loads((out / "readings.json").read_text()) == again.answer()
    sizes = [[reading for reading in found.readings if reading.axis == "size"] for found in (run, again)]
    assert sizes[0] == sizes[1]


def test_measure_needs_a_finished_run_and_its_task(tmp_path: Path, out: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no finished run"):
        measure(tmp_path)
    with registered(Narrow, Heal, Round):
        apply(replace(task(), source=""), RECIPE, Tiny(), out, axes=AXES)
        with pytest.raises(TaskError, match="give task="):
            measure(out)
    (out / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        measure(out)


def test_a_task_without_test_data_says_so(out: Path) -> None:
    with registered(Round):
        run = apply(replace(task(), test=None), Recipe([Round()]), Tiny(), out, axes=AXES)
    assert any("no test data" in warning for warning in run.warnings)
    assert {reading.split for reading in run.readings if reading.axis == "accuracy"} == {"validate"}


# -- the search ------------------------------------------------------------------------------------------------------
def searched(out: Path, budget: Budget | None = None, trials: int | None = 5, **rest: Any) -> Run:
    budget = budget or Budget(objective="size", max_drop=3.0)
    rest = {"axes": AXES, **rest}
    with registered(Narrow, Heal, Round, Fails):
        return compress(task(), Tiny(), budget, out, trials=trials, **rest)


@pytest.fixture(autouse=True)
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "LONGEST_STEPS", 50)


def test_a_search(out: Path) -> None:
    run = searched(out, Budget(objective="size", max_drop=20.0))
    assert visible(out) == EVERYTHING | {"study.db"}
    assert run.feasible and [candidate.number for candidate in run.candidates] == [0, 1, 2, 3, 4]
    failed, *_ = run.candidates
    assert failed.state == "failed" and failed.reason == "RuntimeError: this method never works"
    (chosen,) = [candidate for candidate in run.candidates if candidate.chosen]
    assert chosen.recipe == run.recipe and chosen.feasible and chosen.front
    feasible = [candidate for candidate in run.candidates if candidate.feasible]
    assert chosen.bytes == min(candidate.bytes or 0 for candidate in feasible)
    drop = next(reading for reading in run.readings if reading.name == "drop")
    assert drop.split == "test" and drop.n == 300


def test_a_finished_search_goes_on_only_for_more(out: Path) -> None:
    first = searched(out, trials=3)
    assert searched(out, trials=3) == first
    more = searched(out, trials=5)
    assert [item.model_dump(exclude={"front", "chosen"}) for item in more.candidates[:3]] == [
        item.model_dump(exclude={"front", "chosen"}) for item in first.candidates
    ]
    assert len(more.candidates) == 5 and visible(out) == EVERYTHING | {"study.db"}


def test_a_bar_that_nothing_meets(out: Path) -> None:
    run = searched(out, Budget(objective="size", max_drop=0.0, max_size=10), trials=3)
    assert not run.feasible and "came nearest" in run.verdict and "misses the bar" in run.verdict
    assert visible(out) == EVERYTHING | {"study.db"}
    assert sum(candidate.chosen for candidate in run.candidates) == 1


def test_where_nothing_runs_at_all(out: Path) -> None:
    with registered(Fails), pytest.raises(Infeasible, match=r"none of 1 recipes could be run .*never works"):
        compress(task(), Tiny(), Budget(), out, trials=2, axes=AXES)
    with registered(), pytest.raises(Infeasible, match="none was proposed"):
        compress(task(), Tiny(), Budget(), out.with_name("other"), trials=2, axes=AXES)


def test_the_search_chooses_on_validation_data(out: Path) -> None:
    with pytest.raises(TaskError, match="no 'validate' data"):
        compress(replace(task(), validate=None), Tiny(), Budget(), out)


def test_where_the_time_is_up_at_once_one_recipe_is_still_measured(out: Path) -> None:
    run = searched(out, trials=None, time=0.01)
    assert [candidate.state for candidate in run.candidates] == ["failed", "done"]
    assert run.feasible and (out / "run.json").exists()


@pytest.mark.slow
def test_time_bounds_the_whole_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "AXES_SECONDS", 0.5)
    monkeypatch.setattr(allowance, "launch_seconds", lambda: 0.05)
    run = searched(out, trials=None, time=20.0)
    assert run.seconds < 24 and any("tiny.heal" in str(candidate.recipe) for candidate in run.candidates)


def test_no_training_is_begun_that_cannot_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "AXES_SECONDS", 0.5)
    monkeypatch.setattr(allowance, "launch_seconds", lambda: 0.05)
    monkeypatch.setattr(allowance, "seconds_per_epoch", lambda *_: 1e4)
    run = searched(out, trials=6, time=60.0)
    assert run.candidates and not any("tiny.heal" in str(candidate.recipe) for candidate in run.candidates)


def test_where_latency_counts_the_fastest_are_timed_side_by_side(out: Path) -> None:
    said = Said()
    with patch("featherweight.search.choose.MOST_NOISE", 9.0):
        run = searched(out, Budget(objective="latency", max_drop=20.0), trials=4, progress=said)
    assert "the 3 fastest side by side" in said.lines
    done = [candidate for candidate in run.candidates if candidate.state == "done"]
    assert len(done) == 3 and all(candidate.latency_ms for candidate in done) and not list(out.glob(".work*"))


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_energy_as_the_objective(out: Path) -> None:
    run = searched(out, Budget(objective="energy", max_drop=5.0), trials=3)
    figures = {candidate.number: candidate.energy_mj for candidate in run.candidates if candidate.state == "done"}
    assert all(value is not None and value > 0 for value in figures.values())


# -- a full disk -----------------------------------------------------------------------------------------------------
def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_at_the_end_loses_no_trial(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(finish.skeleton, "save", full)
        patched.setattr("featherweight.search.store.Store.put", lambda *_: None)
        with pytest.raises(OutputError, match="no space left on device"):
            searched(out, trials=3)
    assert not (out / "run.json").exists() and (out / "study.db").exists()
    monkeypatch.setattr("featherweight.search.judge.Judge.judge", lambda *_: pytest.fail("a trial was repeated"))
    assert searched(out, trials=3).feasible


def test_a_disk_that_fills_up_in_a_trial_is_no_fault_of_the_recipe(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("featherweight.search.judge.Judge.judge", full)
        with pytest.raises(OutputError, match="no space left on device"):
            searched(out, trials=3)
    run = searched(out, trials=3)
    assert [candidate.state for candidate in run.candidates] == ["failed", "done", "done"]
