"""The space comes from the methods' own knobs; what cannot work is left out with its reason."""

import itertools
from dataclasses import replace
from typing import Annotated, ClassVar

import optuna
import pytest
from tiny_search import Fails, Heal, Narrow, Round, Tiny, Zeros, registered, task

from featherweight.core import registry
from featherweight.core.recipe import Recipe
from featherweight.core.step import Between, Place, Step
from featherweight.core.target import target
from featherweight.search.space import at, space_for, strength, tidy


class Float16(Step):
    """A form that nobody carries."""

    kind: ClassVar[str] = "tiny.float16"
    place: ClassVar[Place | None] = Place.ENCODE
    makes: ClassVar[frozenset[str]] = frozenset({"float16"})


class Layers(Step):
    """Counts in whole numbers, on a logarithmic scale."""

    kind: ClassVar[str] = "tiny.layers"
    place: ClassVar[Place | None] = Place.RESHAPE
    count: Annotated[int, Between(1, 64, log=True)] = 8


def drawn(count: int, *kinds: type[Step], **settings: float) -> list[Recipe]:
    with registered(*kinds):
        space = space_for(task(), Tiny(), **settings)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        return [space.suggest(study.ask()) for _ in range(count)]


def test_recipes_keep_the_order_of_places_and_the_ranges_of_knobs() -> None:
    recipes = drawn(60, Narrow, Heal, Round)
    for recipe in recipes:
        assert recipe.steps
        recipe.check(Tiny())
        for one, other in itertools.pairwise(recipe.steps):
            assert type(one).place < type(other).place
        for item in recipe.steps:
            if isinstance(item, Narrow):
                assert 0.05 <= item.keep <= 0.95 and item.keep == tidy(item.keep)
    assert len({str(recipe) for recipe in recipes}) > 20


def test_nothing_is_healed_that_was_not_hurt() -> None:
    for recipe in drawn(60, Narrow, Heal, Round):
        if any(isinstance(item, Heal) for item in recipe.steps):
            assert isinstance(recipe.steps[0], Narrow)
    assert any(isinstance(recipe.steps[0], Heal) for recipe in drawn(60, Narrow, Heal, Round, objective="accuracy"))


def test_training_is_capped_by_the_time_and_stretched_for_small_data() -> None:
    epochs = [
        item.epochs
        for recipe in drawn(60, Narrow, Heal, Round, epochs=0.7)
        for item in recipe.steps
        if isinstance(item, Heal)
    ]
    assert epochs and max(epochs) <= 0.7
    epochs = [
        item.epochs
        for recipe in drawn(60, Narrow, Heal, Round, longest=50.0)
        for item in recipe.steps
        if isinstance(item, Heal)
    ]
    assert max(epochs) > 4


def test_whole_numbers_stay_whole() -> None:
    counts = {recipe.steps[0].count for recipe in drawn(30, Layers)}  # type: ignore[attr-defined]
    assert len(counts) > 5 and all(isinstance(count, int) and 1 <= count <= 64 for count in counts)


def test_what_gains_nothing_in_the_objective_is_left_out() -> None:
    registry.load("methods")
    runtime = target("onnxruntime")
    assert "nothing better in latency" in space_for(task(), runtime, "latency").left_out["quantize.weights"]
    for objective in ("size", "accuracy"):
        assert "quantize.weights" not in space_for(task(), runtime, objective).left_out


def test_what_cannot_work_is_left_out_with_its_reason() -> None:
    with registered(Narrow, Heal, Round, Zeros, Float16):
        left = space_for(task(), Tiny()).left_out
        untrained = space_for(replace(task(), train=None, calibrate=task().validate), Tiny()).left_out
        hurried = space_for(task(), Tiny(), epochs=0.01).left_out
    assert set(left) == {"tiny.zeros", "tiny.float16"}
    assert "float16" in left["tiny.float16"] and "zeros as plain numbers" in left["tiny.zeros"]
    assert "no training data" in untrained["tiny.heal"] and "no time" in hurried["tiny.heal"]


def test_parameters_by_rule_give_the_recipe_that_is_meant() -> None:
    with registered(Narrow, Heal, Round, Fails):
        space = space_for(task(), Tiny())
        study = optuna.create_study()
        for kinds, settings in [
            ({Place.ENCODE: Round}, {}),
            ({Place.RESHAPE: Narrow, Place.ENCODE: Round}, {"tiny.narrow.keep": 0.3}),
            ({Place.RESHAPE: Narrow, Place.HEAL: Heal}, {}),
        ]:
            study.enqueue_trial(space.params(kinds, settings))
            recipe = space.suggest(study.ask())
            assert [type(item) for item in recipe.steps] == list(kinds.values())
            for item in recipe.steps:
                expected = {
                    key.rpartition(".")[2]: value for key, value in settings.items() if key.startswith(item.kind)
                }
                assert item == type(item)(**expected)


def test_the_registered_methods_make_a_space_for_onnxruntime() -> None:
    registry.load("methods")
    space = space_for(task(), target("onnxruntime"))
    assert {"quantize.static", "quantize.dynamic"} <= {kind.kind for kind in space.kinds[Place.ENCODE]}
    assert all(Step.kinds[kind].place is not None for kind in space.left_out)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (0.12345, 0.12), (123.0, 120.0), (-0.0567, -0.057)])
def test_tidy(value: float, expected: float) -> None:
    assert tidy(value) == pytest.approx(expected)


def test_shares_of_a_range() -> None:
    found = strength(Narrow)
    assert found is not None and found[0] == "keep"
    assert at(found[1], 0.0) == 0.05 and at(found[1], 1.0) == 0.95 and at(Between(1, 100, log=True), 0.5) == 10
    assert strength(Round) is None
