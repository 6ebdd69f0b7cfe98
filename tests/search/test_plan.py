"""What is tried first, and how the strength of a method is bracketed."""

from typing import Any

from tiny_search import Heal, Narrow, Round, registered

from featherweight.core.run import Budget
from featherweight.core.step import Place
from featherweight.search.choose import Figures
from featherweight.search.plan import Try, next_share, plan
from featherweight.search.space import Space
from featherweight.search.study import Trial

BAR = Budget(objective="size", max_drop=0.5)


def tried(index: int, label: str, size: int | None, drop: float = 0.0, **rest: Any) -> Trial:
    figures = None if size is None else Figures(accuracy=90, drop=drop, drop_high=drop, bytes=size, latency_ms=1.0)
    state = "failed" if size is None else "done"
    facts = {"recipe": {"steps": []}, "digest": str(index), "state": state, "figures": figures, "plan": label}
    return Trial.model_validate({"index": index, **facts, **rest})


def space(**rest: float) -> Space:
    return Space({Place.RESHAPE: (Narrow,), Place.HEAL: (Heal,), Place.ENCODE: (Round,)}, {}, **rest)


def test_storage_without_training_comes_first_then_the_middle_of_the_range() -> None:
    with registered(Narrow, Heal, Round):
        first = plan(space(), [], BAR)
        assert first is not None and first.label == "store:tiny.round"
        assert first.params["encode"] == "tiny.round" if "encode" in first.params else first.params["encode_alone"]
        second = plan(space(), [tried(0, first.label, 1000)], BAR)
    assert second is not None and second.label == "take:tiny.narrow:0.5"
    assert second.params["tiny.narrow.keep"] == 0.5 and second.params["heal"] == "tiny.heal"
    assert second.params["encode"] == "tiny.round"


def test_a_storage_that_failed_is_not_built_upon() -> None:
    with registered(Narrow, Heal, Round):
        second = plan(space(), [tried(0, "store:tiny.round", None)], BAR)
    assert second is not None and second.params["encode"] == "none"


def test_a_storage_that_loses_too_much_is_tried_without_the_worst_layers_and_then_built_upon() -> None:
    with registered(Narrow, Heal, Round):
        stored = [tried(0, "store:tiny.round", 1000, drop=9.0)]
        again = plan(space(), stored, BAR, skips={"tiny.round": ("stem", "head")})
        assert again is not None and again.label == "store:tiny.round:skip"
        assert again.skips == {"tiny.round": ("stem", "head")}
        recipe = {"steps": [{"kind": "tiny.round", "skip": ["stem", "head"]}]}
        stored += [tried(1, again.label, 1200, recipe=recipe)]
        third = plan(space(), stored, BAR, skips=again.skips)
    assert third is not None and third.label == "take:tiny.narrow:0.5"
    assert third.params["encode"] == "tiny.round" and dict(third.skips) == dict(again.skips)


def test_healing_lasts_as_long_as_the_time_allows_or_the_data_need() -> None:
    with registered(Narrow, Heal, Round):
        stored = [tried(0, "store:tiny.round", 1000)]
        limited, free = plan(space(epochs=1.37), stored, BAR), plan(space(longest=100.0), stored, BAR)
    assert limited is not None and limited.params["tiny.heal.epochs"] == 1.4
    assert free is not None and free.params["tiny.heal.epochs"] == 30.0


def test_the_rules_end() -> None:
    done = [tried(0, "store:tiny.round", 1000), tried(1, "take:tiny.narrow:0.5", None)]
    with registered(Narrow, Heal, Round):
        assert plan(space(), done, BAR) is None


def test_another_time_limit_is_planned_anew_but_for_storage_without_training() -> None:
    healed = {"steps": [{"kind": "tiny.narrow"}, {"kind": "tiny.heal", "epochs": 0.5}]}
    trials = [
        tried(0, "store:tiny.round", 1000, limit=60.0),
        tried(1, "take:tiny.narrow:0.5", 500, limit=60.0, recipe=healed),
    ]
    with registered(Narrow, Heal, Round):
        same, longer = (plan(space(epochs=2.0), trials, BAR, limit) for limit in (60.0, 600.0))
    assert same is not None and same.label == "take:tiny.narrow:0.25"
    assert longer is not None and longer.label == "take:tiny.narrow:0.5" and longer.params["tiny.heal.epochs"] == 2.0
    assert longer.params["encode"] == "tiny.round"


def test_what_was_refused_for_lack_of_time_is_planned_again_when_there_is_more() -> None:
    healed = {"steps": [{"kind": "tiny.narrow"}, {"kind": "tiny.heal", "epochs": 0.5}]}
    refused = {"state": "refused", "figures": None, "recipe": healed, "limit": 60.0}
    for label in ("store:tiny.round", "take:tiny.narrow:0.5"):
        trials = [tried(0, "store:tiny.round", 1000, limit=60.0)] if label.startswith("take") else []
        trials.append(tried(1, label, None, **refused))
        with registered(Narrow, Heal, Round):
            same, longer = (plan(space(epochs=2.0), trials, BAR, limit) for limit in (60.0, 600.0))
        assert longer is not None and longer.label == label
        assert same is None or same.label != label


def follow(met: object, size: object, guess: bool) -> list[float]:
    """The shares that are tried where `met(share)` and `size(share)` are what would be found."""
    tries: list[Try] = []
    while (share := next_share(tries, guess)) is not None:
        tries.append(Try(share, size(share), met(share)))  # type: ignore[operator]
    return [item.share for item in tries]


def test_the_bracket_closes_on_the_strongest_that_meets_the_bar() -> None:
    for guess in (True, False):  # a wrong guess of the direction costs one try
        shares = follow(lambda share: share >= 0.3, lambda share: int(1000 * share), guess)
        assert min(abs(share - 0.3) for share in shares) < 0.1
        assert any(share >= 0.3 for share in shares) and len(shares) <= 5


def test_the_bracket_goes_on_towards_the_strong_end_while_the_bar_is_met() -> None:
    assert follow(lambda share: True, lambda share: int(1000 * share), False) == [0.5, 0.25, 0.125, 0.062]
    assert follow(lambda share: True, lambda share: int(1000 * (1 - share)), True) == [0.5, 0.75, 0.875, 0.938]


def test_the_bracket_goes_towards_the_weak_end_while_it_is_missed() -> None:
    assert follow(lambda share: False, lambda share: int(1000 * share), False) == [0.5, 0.75, 0.875, 0.938]


def test_a_failure_ends_the_bracket() -> None:
    assert next_share([Try(0.5, None, False)]) is None
