"""From a recipe, or from a search, to a folder that holds everything."""

import copy
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from tiny_search import Fails, Heal, Narrow, Round, Tiny, registered, task
from torch import nn

from featherweight.core.context import Context
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
from featherweight.measure.latency import Latency
from featherweight.model import skeleton
from featherweight.search import allowance, finish
from featherweight.search.judge import Judge
from featherweight.search.output import claim
from featherweight.search.pipeline import apply, compress, measure, read_run
from featherweight.search.stages import bits, layers

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


def test_a_finished_run_is_measured_on_the_axes_that_it_lacks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = applied(out)
    (out / "report.html").write_text("the figures of before")
    monkeypatch.setattr(Judge, "__init__", lambda *_: pytest.fail("it was done again"))
    with registered(Narrow, Heal, Round):
        more = apply(task(), RECIPE, Tiny(), out, axes=["size", Latency(batches=(2,), seconds=0.1)])
        again = apply(task(), RECIPE, Tiny(), out, axes=["accuracy", Latency(batches=(3,), seconds=0.1)])
    assert {reading.axis for reading in more.readings} == {"accuracy", "size", "latency"}
    assert {reading.conditions["batch"] for reading in more.readings if reading.axis == "latency"} == {2}
    assert {reading.conditions["batch"] for reading in again.readings if reading.axis == "latency"} == {3}
    assert [item for item in run.readings if item.axis == "size"] == [
        item for item in more.readings if item.axis == "size"
    ]
    assert read_run(out) == again and not (out / "report.html").exists()


def test_measuring_again_holds_the_folder(out: Path) -> None:
    applied(out)
    job = json.loads((out / "job.json").read_text())
    with registered(Narrow, Heal, Round), claim(out, job), pytest.raises(OutputError, match="another run is working"):
        measure(out, ["size"], task=task())


def test_measuring_again_says_no_more_than_was_found(out: Path) -> None:
    searched(out, Budget(objective="size", max_drop=0.0, max_size=10, max_latency=1e3), trials=3)
    with registered(Narrow, Heal, Round, Fails):
        again = measure(out, ["size"], task=task())
        assert "came nearest" in again.verdict and "not measured: at most 1000 ms (p50, batch 1" in again.verdict
        again = measure(out, [Latency(batches=(4,), seconds=0.1)], task=task())
        assert "not measured: at most 1000 ms" in again.verdict and not again.feasible
        again = measure(out, [Latency(batches=(1,), seconds=0.1)], task=task())
    assert "not measured" not in again.verdict and "came nearest" in again.verdict


def test_outputs_that_are_not_finite_are_no_candidate(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Tiny.load

    def spoiled(self: Tiny, path: Path, threads: int = 1) -> Any:
        session = load(self, path, threads)

        def run(**inputs: np.ndarray) -> list[np.ndarray]:
            (found,) = session(**inputs)
            bad = len(found) > 2 and self.stored(path)["0.weight"] == "int8"
            return [np.where(np.arange(10) == 9, -np.inf, found) if bad else found]

        return run

    monkeypatch.setattr(Tiny, "load", spoiled)
    run = searched(out, trials=4)
    failed = [candidate for candidate in run.candidates if "tiny.round" in str(candidate.recipe)]
    assert failed and all("gives NaN or infinite outputs" in candidate.reason for candidate in failed)


def test_a_weight_that_is_not_stored_has_no_size(out: Path) -> None:
    class Spare(nn.Sequential):
        """A network with a layer that no output needs."""

        def __init__(self) -> None:
            super().__init__(*copy.deepcopy(task().original))
            self.spare = nn.Linear(8, 8)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](input)))

    class Used(Tiny):
        """Stores what the outputs need."""

        def write(self, plain: nn.Module, stored: Any, example: Any, free: Any, path: Path) -> None:
            del plain.spare
            super().write(plain, stored, example, free, path)

    Used.name = "tiny"
    before = Used().export(Spare(), task().example, out / "before")
    found = {layer.name: layer for layer in layers(Spare(), Spare(), before, before)}
    spare, first = found["spare.weight"], found["0.weight"]
    assert (spare.form, spare.bytes_before, spare.bytes_after) == ("not stored", 0, 0)
    assert (first.form, first.bytes_before) == ("float32", 64 * 64 * 4)


def test_bits_of_a_form() -> None:
    found = {form: bits(form) for form in ("int8", "uint4", "float32", "float8_e4m3fn", "bool", "sparse", "2:4")}
    assert list(found.values()) == [8, 4, 32, 8, 8, None, None]


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
    assert visible(out) == EVERYTHING | {"study.db", "failures"}
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
    assert [item.model_dump(exclude={"front", "chosen"}) for item in more.candidates[1:3]] == [
        item.model_dump(exclude={"front", "chosen"}) for item in first.candidates[1:]
    ]
    assert [item.number for item in more.candidates] == [0, 1, 2, 3, 4] and more.candidates[0].state == "failed"
    assert visible(out) == EVERYTHING | {"study.db", "failures"}


def test_a_bar_that_nothing_meets(out: Path) -> None:
    run = searched(out, Budget(objective="size", max_drop=0.0, max_size=10), trials=3)
    assert not run.feasible and "came nearest" in run.verdict and "misses the bar" in run.verdict
    assert visible(out) == EVERYTHING | {"study.db", "failures"}
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


def test_more_time_is_planned_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "seconds_per_epoch", lambda *_: 1e4)
    first = searched(out, trials=5, time=60.0)
    judged: list[str] = []
    judge = Judge.judge
    monkeypatch.setattr(Judge, "judge", lambda self, recipe, energy: judged.append(str(recipe)) or judge(self, recipe))
    more = searched(out, trials=8, time=1e6)
    assert not any("tiny.heal" in str(candidate.recipe) for candidate in first.candidates)
    planned = [recipe for recipe in judged if "tiny.heal" in recipe]
    assert "tiny.narrow" in planned[0] and all("epochs" in recipe for recipe in planned)
    with registered(Narrow, Heal, Round):
        known = {str(Recipe.parse(item.recipe)) for item in first.candidates if item.state == "done"}
    assert known and not known & set(judged)
    assert [item.number for item in more.candidates][:5] == [0, 1, 2, 3, 4]


class Forgets(Fails):
    """Run out of memory once, or whatever else `error` is, then store weights as 8-bit integers."""

    kind: ClassVar[str] = "tiny.forgets"
    error: ClassVar[Exception | None] = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.error is not None:
            raise self.error
        return Round().apply(model, ctx)


def forgetful(out: Path, trials: int, error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(Forgets, "error", error)
    with registered(Narrow, Forgets):
        return compress(task(), Tiny(), Budget(objective="size"), out, trials=trials, axes=AXES)


@pytest.mark.parametrize("error", [MemoryError("12 GB"), OSError(errno.EMFILE, "Too many open files"), TypeError("+")])
def test_a_failure_that_may_be_gone_is_told_kept_and_tried_again(
    out: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = forgetful(out, 2, error, monkeypatch)
    assert [candidate.state for candidate in first.candidates] == ["failed", "done"]
    (warning,) = [line for line in first.warnings if "unexpectedly" in line]
    text = (out / "failures" / "trial-1.txt").read_text()
    assert f"{out / 'failures' / 'trial-1.txt'}" in warning and type(error).__name__ in warning
    assert "tiny.forgets" in text and "Traceback (most recent call last)" in text and "in apply" in text
    again = forgetful(out, 3, None, monkeypatch)
    assert [candidate.state for candidate in again.candidates] == ["done"] * 3
    assert [candidate.number for candidate in again.candidates] == [0, 1, 2]
    assert not any("unexpectedly" in line for line in again.warnings) and not list((out / "failures").iterdir())


def test_a_failure_of_the_recipe_itself_is_final(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = forgetful(out, 2, NoEffect("it changed nothing"), monkeypatch)
    assert first.candidates[0].state == "failed" and first.candidates[0].reason == "it changed nothing"
    assert not any("unexpectedly" in line for line in first.warnings) and not (out / "failures").exists()
    again = forgetful(out, 3, None, monkeypatch)
    assert again.candidates[0].state == "failed"


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
