"""Steps and recipes: parsing, errors in one line, digests, and the order that traits allow."""

from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from featherweight.core import registry
from featherweight.core.errors import NotCarried, RecipeError
from featherweight.core.recipe import Recipe
from featherweight.core.step import Between, OneOf, Step, Trait, knobs, step
from featherweight.core.target import Target


@pytest.fixture(autouse=True)
def _own_kinds(monkeypatch):
    """Steps of these tests, gone again afterwards."""
    registry.load("methods")  # once for the whole process: what it finds must not go with these
    monkeypatch.setattr(Step, "kinds", dict(Step.kinds))

    class Slim(Step, kind="test.slim"):
        """Make it slim."""

        needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
        keep: Annotated[float, Field(gt=0, lt=1), Between(0.3, 0.95)] = 0.5
        score: Annotated[str, OneOf("l1", "l2")] = "l1"
        rounds: Annotated[int, Between(1, 4)] | None = None

    class Coarse(Step, kind="test.coarse"):
        """Make it coarse."""

        takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
        makes: ClassVar[frozenset[str]] = frozenset({"int3"})


class Carrier:
    """Stands for a target: all that `check` reads of one."""

    name, carries = "shelf", frozenset({"int8"})
    refuses = classmethod(Target.refuses.__func__)


def parse(text: str) -> Recipe:
    return Recipe.parse(yaml.safe_load(text), "mine.yaml")


# -- settings ----------------------------------------------------------------------------------------------------------
def test_a_step_is_made_by_its_kind_and_dumps_what_was_set():
    item = step("test.slim", keep=0.7)
    assert item.dump() == {"kind": "test.slim", "keep": 0.7}
    assert item.full() == {"kind": "test.slim", "keep": 0.7, "score": "l1", "rounds": None}


def test_the_ranges_of_the_search_stand_beside_the_settings():
    assert knobs(Step.kinds["test.slim"]) == {
        "keep": Between(0.3, 0.95),
        "score": OneOf("l1", "l2"),
        "rounds": Between(1, 4),
    }


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("test.sleek", {}, r"there is no method 'test\.sleek'; the methods are: .*test\.slim"),
        ("test.slim", {"keep": 1.2}, r"test\.slim: keep=1\.2: input should be less than 1"),
        ("test.slim", {"keep": "much"}, r"test\.slim: keep='much': input should be a valid number"),
        ("test.slim", {"keep": float("nan")}, r"test\.slim: keep=nan"),
        ("test.slim", {"keeps": 0.5}, r"test\.slim: there is no setting 'keeps'"),
        ("test.slim", {"keep": 2, "colour": 1}, r"keep=2.*; there is no setting 'colour'"),
    ],
)
def test_what_is_wrong_with_a_step_is_said_in_one_line(kind, settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        step(kind, **settings)
    assert "\n" not in str(caught.value)


# -- recipes -----------------------------------------------------------------------------------------------------------
def test_a_recipe_is_read_and_written(tmp_path):
    text = "name: slim\nnotes: by hand\nsteps:\n- {kind: test.slim, keep: 0.6}\n- {kind: test.coarse}\n"
    recipe = parse(text)
    assert [item.kind for item in recipe.steps] == ["test.slim", "test.coarse"]
    assert (recipe.name, recipe.notes, str(recipe)) == ("slim", "by hand", "test.slim(keep=0.6) + test.coarse")
    recipe.write(tmp_path / "again.yaml")
    again = Recipe.read(tmp_path / "again.yaml")
    assert again == recipe and again.dump() == recipe.dump() and again.name == "slim"


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4))
def test_equal_recipes_have_equal_digests_whatever_their_names(keeps):
    steps = [{"kind": "test.slim", "keep": keep} for keep in keeps]
    one, other = Recipe(steps, name="a"), Recipe.parse({"steps": steps, "name": "b", "notes": "c"})
    assert one == other and hash(one) == hash(other) and one.digest() == other.digest()
    assert one.digest() == Recipe([{**item, "score": "l1"} for item in steps]).digest()
    assert one.digest() != Recipe([*steps, {"kind": "test.coarse"}]).digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {kind: test.slim}", "a recipe is a mapping with 'steps', this is list"),
        ("", "a recipe is a mapping with 'steps', this is NoneType"),
        ("name: empty", "'steps' must be a list of at least one step"),
        ("steps: []", "'steps' must be a list of at least one step"),
        ("steps: [{kind: test.slim}]\nauthor: me", "there is no entry 'author' in a recipe"),
        ("steps: [test.slim]", "step 1 must be a mapping with a 'kind'.*it is 'test.slim'"),
        ("steps: [{kind: test.coarse}, {keep: 0.5}]", "step 2 must be a mapping with a 'kind'"),
        ("steps: [{kind: test.slim, keep: -1}]", r"step 1: test\.slim: keep=-1"),
        ("steps: [{kind: test.slim, 3: 4}]", "step 1: .*there is no setting '3'"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe file nowhere\.yaml"):
        Recipe.read("nowhere.yaml")
    for content in (b"steps: [", b"\xff\xfe\x00"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(RecipeError, match="is not YAML") as caught:
            Recipe.read(tmp_path / "bad.yaml")
        assert "\n" not in str(caught.value)


def test_code_in_yaml_is_not_run(tmp_path):
    path = Path(tmp_path / "bad.yaml")
    path.write_text(f"steps: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]")
    with pytest.raises(RecipeError):
        Recipe.read(path)
    assert not (tmp_path / "made").exists()


def test_an_order_that_cannot_work_is_refused_with_the_reason():
    Recipe([step("test.slim"), step("test.slim"), step("test.coarse")]).check()
    with pytest.raises(RecipeError, match=r"step 3 \(test\.slim\) .* but step 2 \(test\.coarse\) ended that; put"):
        Recipe([step("test.slim"), step("test.coarse"), step("test.slim")]).check()


def test_a_form_that_the_target_does_not_carry_is_refused_before_any_work():
    recipe = Recipe([step("test.slim"), step("test.coarse")])
    message = r"step 2 \(test\.coarse\) stores weights as int3, which the target shelf does not carry; it carries: int8"
    with pytest.raises(NotCarried, match=message):
        recipe.check(Carrier())
    Recipe([step("test.slim")]).check(Carrier())
