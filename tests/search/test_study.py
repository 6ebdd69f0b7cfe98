"""The database of trials: what is proposed depends on seed and finished trials alone; a killed trial is run again."""

import sqlite3
from pathlib import Path

import optuna
import pytest
from tiny_search import Heal, Narrow, Round, Tiny, registered, task

from featherweight.core.errors import OutputError
from featherweight.core.recipe import Recipe
from featherweight.search.choose import Figures
from featherweight.search.space import Space, space_for
from featherweight.search.study import RESULT, Running, Study, Trial

CONSTRAINTS = {"drop": -0.5}


def ended(running: Running, size: int | None) -> Trial:
    figures = None if size is None else Figures(accuracy=90, drop=0, drop_high=0, bytes=size, latency_ms=1)
    recipe = running.recipe
    return Trial(
        index=running.index,
        recipe=recipe.dump(),
        digest=recipe.digest(),
        state="failed" if size is None else "done",
        reason="" if size else "it broke",
        figures=figures,
    )


def size_of(recipe: Recipe) -> int | None:
    """Stands in for a measurement: fails for some recipes, prefers small ones."""
    keep = next((item.keep for item in recipe.steps if isinstance(item, Narrow)), 1.0)
    return None if 0.4 < keep < 0.5 else int(1000 * keep) - 300 * any(isinstance(item, Round) for item in recipe.steps)


def go_on(study: Study, space: Space, count: int) -> None:
    while len(study.finished()) < count:
        running = study.left_over() or study.ask(space.suggest)
        size = size_of(running.recipe)
        study.tell(running, ended(running, size), size, CONSTRAINTS if size is not None else None)


def test_interrupted_anywhere_the_same_recipes_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.search.study.STARTUP", 3)
    with registered(Narrow, Heal, Round):
        space = space_for(task(), Tiny())
        calm = Study(tmp_path / "calm.db", 3)
        go_on(calm, space, 9)
        path = tmp_path / "broken.db"
        for count in (2, 6):
            go_on(Study(path, 3), space, count)
            Study(path, 3).study.ask()  # killed before it had a recipe
            asked = Study(path, 3)
            assert asked.left_over() is None  # which drops that one
            running = asked.ask(space.suggest)  # killed when it had one
            again = Study(path, 3).left_over()
            assert again is not None and again.recipe == running.recipe and again.index == running.index == count
        broken = Study(path, 3)
        go_on(broken, space, 9)
        other = Study(tmp_path / "other.db", 4)
        go_on(other, space, 4)
    digests = [trial.digest for trial in calm.finished()]
    assert [trial.digest for trial in broken.finished()] == digests
    assert [trial.index for trial in broken.finished()] == list(range(9))
    assert [trial.digest for trial in other.finished()] != digests[:4]


def test_failures_are_kept_with_their_reason_and_never_reach_the_sampler(tmp_path: Path) -> None:
    with registered(Narrow, Heal, Round):
        space = space_for(task(), Tiny())
        study = Study(tmp_path / "study.db", 0)
        running = study.ask(space.suggest)
        study.tell(running, ended(running, None))
    (trial,) = study.finished()
    assert trial.state == "failed" and trial.reason == "it broke"
    (stored,) = study.study.get_trials()
    assert stored.state is optuna.trial.TrialState.FAIL and stored.values is None and RESULT in stored.user_attrs


def test_constraints_are_constraints_and_values_are_values(tmp_path: Path) -> None:
    with registered(Narrow, Heal, Round):
        study = Study(tmp_path / "study.db", 0)
        running = study.ask(space_for(task(), Tiny()).suggest)
        study.tell(running, ended(running, 700), 700, {"drop": 0.25, "size": -0.1})
    (stored,) = study.study.get_trials()
    assert stored.value == 700 and stored.constraints == {"drop": 0.25, "size": -0.1}


def test_given_parameters_are_taken_and_an_interrupted_proposal_is_not_made_twice(tmp_path: Path) -> None:
    with registered(Narrow, Heal, Round):
        space = space_for(task(), Tiny())
        params = space.params({}, {"reshape": "tiny.narrow", "tiny.narrow.keep": 0.21})
        study = Study(tmp_path / "study.db", 0)
        study.study.enqueue_trial(params)  # killed right after this
        running = Study(tmp_path / "study.db", 0).ask(space.suggest, params, "take:tiny.narrow:0.2")
    assert isinstance(running.recipe.steps[0], Narrow) and running.recipe.steps[0].keep == 0.21
    assert len(study.study.get_trials()) == 1 and running.plan == "take:tiny.narrow:0.2"


def test_notes_are_made_once(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", 0)
    assert study.note("epochs", lambda: 2.0) == 2.0
    assert Study(tmp_path / "study.db", 0).note("epochs", lambda: 3.0) == 2.0
    study.keep("spent", 1.0)
    study.keep("spent", 2.0)
    assert Study(tmp_path / "study.db", 0).kept("spent", 0.0) == 2.0 and study.kept("nothing", 5) == 5


def test_a_file_that_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database, but long enough to be taken for one " * 100)
    with pytest.raises(OutputError, match=r"study\.db is not the database of a search"):
        Study(tmp_path / "study.db", 0)


def test_odd_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%20e"
    folder.mkdir()
    Study(folder / "study.db", 0).keep("spent", 1)
    with sqlite3.connect(folder / "study.db") as found:
        assert found.execute("select count(*) from studies").fetchone() == (1,)
    assert [path.name for path in folder.iterdir()] == ["study.db"]
