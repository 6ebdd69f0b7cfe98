"""How the time of a run is shared out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_search import Heal, Narrow, Round, registered, task

from featherweight.core.recipe import Recipe
from featherweight.search import allowance
from featherweight.search.allowance import Allowance, shared_epochs
from featherweight.search.choose import Figures
from featherweight.search.clock import Clock, epochs_of, seconds_per_epoch
from featherweight.search.study import Trial

FIGURES = Figures(accuracy=90, drop=0, drop_high=0, bytes=1, latency_ms=1)


class Notes:
    """A study of trials that are given, and of notes that are made once."""

    def __init__(self, *trials: Trial) -> None:
        self.trials, self.notes = list(trials), {"seconds_per_epoch": 10.0, "steps_per_epoch": 100}

    def finished(self) -> list[Trial]:
        return self.trials

    def note(self, name: str, make: Any) -> Any:
        return self.notes.setdefault(name, make() if name not in self.notes else None)


def trial(index: int, seconds: float, *steps: dict[str, Any], state: str = "done") -> Trial:
    figures = FIGURES if state == "done" else None
    return Trial(
        index=index, recipe={"steps": list(steps)}, digest=str(index), state=state, figures=figures, seconds=seconds
    )


def an_allowance(left: float | None, *trials: Trial) -> Allowance:
    judge = SimpleNamespace(
        task=task(), job=SimpleNamespace(seed=0), seconds=4.0, validation_seconds=0.0, latency_ms=0.0
    )
    clock = SimpleNamespace(limit=left, left=math.inf if left is None else left)
    return Allowance(judge, Notes(*trials), clock)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _only_trials_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "AXES_SECONDS", 0.0)
    monkeypatch.setattr(allowance, "launch_seconds", lambda: 0.0)


def test_the_end_is_set_aside() -> None:
    found = an_allowance(100.0)
    assert found.left() == 100 - (3 + allowance.HEAT) * 4.0
    assert an_allowance(None).left() == math.inf and not an_allowance(None).limited


def test_a_trial_costs_what_trials_without_training_took() -> None:
    with registered(Narrow, Heal, Round):
        rounded, healed = {"kind": "tiny.round"}, {"kind": "tiny.heal"}
        found = an_allowance(
            100.0, trial(0, 6.0, rounded), trial(1, 60.0, healed), trial(2, 0.1, rounded, state="failed")
        )
        assert found.overhead() == 6.0
    assert an_allowance(100.0).overhead() == 4.0


def test_it_is_over_when_not_even_a_cheap_trial_fits() -> None:
    with registered(Round):
        done = trial(0, 4.0, {"kind": "tiny.round"})
        assert an_allowance(20.0, done).over() and not an_allowance(30.0, done).over()
    assert not an_allowance(None, done).over()


def test_until_something_is_done_a_few_are_tried_whatever_the_time() -> None:
    failed = [trial(index, 1.0, state="failed") for index in range(4)]
    assert not an_allowance(-1.0).over() and not an_allowance(-1.0, *failed[:3]).over()
    assert an_allowance(-1.0, *failed).over() and not an_allowance(1.0, *failed).over()


def test_training_is_planned_once_and_never_longer_than_what_is_left() -> None:
    found = an_allowance(400.0)
    planned = found.epochs()
    assert planned == pytest.approx((found.left() / 4 - 4) / 10)
    found.clock = SimpleNamespace(limit=400.0, left=60.0)  # type: ignore[assignment]
    assert found.epochs() == pytest.approx((found.left() - 4) / 10) and found.epochs() < planned
    found.clock = SimpleNamespace(limit=400.0, left=1.0)  # type: ignore[assignment]
    assert found.epochs() == 0.0


def test_another_time_limit_is_shared_out_anew() -> None:
    found = an_allowance(100.0)
    planned = found.epochs()
    found.clock = SimpleNamespace(limit=1000.0, left=940.0)  # type: ignore[assignment]
    assert found.epochs() == pytest.approx((found.left() / 4 - 4) / 10) and found.epochs() > 5 * planned
    found.clock = SimpleNamespace(limit=100.0, left=90.0)  # type: ignore[assignment]
    assert found.epochs() == planned


def test_time_is_shared_among_as_many_trials_as_can_train_enough() -> None:
    assert shared_epochs(left=400, overhead=0, per_epoch=10, enough=5) == 10
    assert shared_epochs(left=400, overhead=0, per_epoch=10, enough=15) == 20
    assert shared_epochs(left=400, overhead=0, per_epoch=10, enough=99) == 40
    assert shared_epochs(left=10, overhead=20, per_epoch=10, enough=5) == 0


def test_what_cannot_end_in_time_is_refused() -> None:
    found = an_allowance(100.0)
    with registered(Narrow, Heal, Round):
        assert found.refusal(Recipe([Heal(epochs=7.0)])) == ""
        assert found.refusal(Recipe([Heal(epochs=9.0)])) == "it would take about 94 s, and 82 s are left"
        assert found.refusal(Recipe([Round()])) == "" and an_allowance(None).refusal(Recipe([Heal(epochs=9.0)])) == ""


def test_the_longest_training_is_counted_in_steps() -> None:
    assert an_allowance(None).longest() == allowance.LONGEST_STEPS / 100


def test_an_epoch_is_timed() -> None:
    assert 0 < seconds_per_epoch(task()) < 60


def test_epochs_of_a_step_and_of_its_retraining() -> None:
    assert epochs_of(Heal(epochs=1.5)) == 1.5 and epochs_of(Narrow()) == 0
    retrained = SimpleNamespace(trains=False, retrain=SimpleNamespace(epochs=2.0), rounds=3)
    assert epochs_of(retrained) == 6  # type: ignore[arg-type]


def test_the_clock_counts_what_earlier_parts_used() -> None:
    clock = Clock(10.0, spent=8.0)
    assert 8.0 <= clock.used < 8.5 and 1.5 < clock.left <= 2.0
    assert Clock(None).left == math.inf
