"""What every method promises, tested for each that is registered: a new file in methods/ from its first day."""

import inspect
import re

import pytest
import torch
import yaml
from pydantic import ValidationError
from small_tasks import conv_task, one_thread  # noqa: F401
from step_samples import CASES, CPU, KINDS, NOTHING_IN, TASKS, allowed, done, sample, small_task, stronger, works
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context, fingerprint, run_step
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.outputs import first
from featherweight.core.recipe import Recipe
from featherweight.core.step import Between, OneOf, Step, Trait, knobs, step
from featherweight.model.skeleton import load, save


def weighted_layers(model: nn.Module) -> set[str]:
    """The names of the convolutions and linear layers."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)}


of_each_kind_on_each_task = pytest.mark.parametrize(("kind", "name"), CASES)
of_each_kind = pytest.mark.parametrize("kind", KINDS)


# -- what it says of itself --------------------------------------------------------------------------------------------
@of_each_kind
def test_it_says_what_it_does_and_where_it_comes_from(kind):
    cls = Step.kinds[kind]
    sentence = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    assert "__doc__" in vars(cls) and sentence.endswith(".") and len(sentence.split()) >= 5, sentence
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https?://|doi:", cls.paper), cls.paper
    assert isinstance(cls.needs, Trait) and isinstance(cls.takes, Trait)
    assert (inspect.getmodule(cls).__doc__ or "").strip()


@of_each_kind
def test_what_the_search_may_try_is_valid(kind):
    for name, knob in knobs(Step.kinds[kind]).items():
        values = knob.values if isinstance(knob, OneOf) else (knob.low, knob.high)
        for value in values:
            assert getattr(sample(kind, **{name: value}), name) == value
        if isinstance(knob, Between):
            assert knob.low < knob.high and (knob.low > 0 or not knob.log)
            assert knob.low <= getattr(step(kind), name) <= knob.high, f"the default of {name} lies outside the search"


@of_each_kind
def test_settings_are_frozen_and_survive_yaml(kind):
    item = stronger(kind)
    again = Recipe.parse(yaml.safe_load(yaml.safe_dump(Recipe([item]).dump()))).steps[0]
    assert again == item and again.full() == item.full() and type(again) is type(item)
    assert step(**item.full()) == item
    for name in type(item).model_fields:
        with pytest.raises(ValidationError):
            setattr(item, name, getattr(item, name))
    with pytest.raises(RecipeError, match="there is no setting 'nonsense'"):
        step(kind, nonsense=1)


# -- what it does ------------------------------------------------------------------------------------------------------
@of_each_kind_on_each_task
def test_the_users_model_is_never_modified(kind, name):
    task = TASKS[name]()
    before, types = fingerprint(task.original), [type(module) for module in task.original.modules()]
    with torch.no_grad():
        outputs = task.original(**task.example)
    model, _, _ = done(kind, name)
    assert fingerprint(task.original) == before
    assert [type(module) for module in task.original.modules()] == types
    assert not any(parametrize.is_parametrized(module) for module in task.original.modules())
    assert all(parameter.grad is None for parameter in task.original.parameters())
    with torch.no_grad():
        assert torch.equal(task.original(**task.example), outputs)
    theirs = {parameter.data_ptr() for parameter in task.original.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in model.parameters()}


@of_each_kind_on_each_task
def test_same_seed_same_model(kind, name):
    model, record, task = done(kind, name)
    again, record_again = run_step(sample(kind), task.fresh(), Context(task, device=CPU))
    assert fingerprint(again) == fingerprint(model)
    assert record_again.model_copy(update={"seconds": record.seconds}) == record


@of_each_kind_on_each_task
def test_it_changes_something_and_all_stays_finite(kind, name):
    model, record, task = done(kind, name)
    assert fingerprint(model) != fingerprint(task.original)
    assert record.step == sample(kind).full() and record.seconds > 0 and record.changed
    for batch in task.batches("test"):
        with torch.no_grad():
            output, wanted = first(task.call(model, batch)), first(task.call(task.original, batch))
        assert torch.isfinite(output).all() and output.shape == wanted.shape
    assert not any(module.training for module in model.modules())


@of_each_kind_on_each_task
def test_every_layer_is_changed_or_left_with_a_reason(kind, name):
    _, record, task = done(kind, name)
    told = set(record.changed) | {left.layer for left in record.left}
    if "*" not in record.changed:
        assert weighted_layers(task.original) <= told
    assert all(left.reason.strip() for left in record.left)
    assert all(how.strip() for how in record.changed.values())


@of_each_kind
def test_a_layer_that_is_skipped_is_reported(kind):
    if "skip" not in Step.kinds[kind].model_fields:
        assert "*" in done(kind, next(name for name in TASKS if works(kind, name)))[1].changed
        return
    task = small_task(kind)
    _, record = run_step(sample(kind, skip=["head"]), task.fresh(), Context(task, device=CPU))
    assert [left.reason for left in record.left if left.layer == "head"]


@pytest.mark.parametrize(("kind", "name"), sorted(NOTHING_IN))
def test_a_network_that_it_can_do_nothing_for_is_an_error_with_the_reasons(kind, name):
    task = TASKS[name]()
    with pytest.raises(NoEffect, match=rf"{re.escape(kind)} changed nothing: [\w.]+: \w+"):
        run_step(sample(kind), task.fresh(), Context(task, device=CPU))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "only" in Step.kinds[kind].model_fields])
def test_nothing_to_do_is_an_error(kind):
    task = conv_task()
    with pytest.raises(NoEffect, match=re.escape(kind)):
        run_step(sample(kind, only="nothing.*"), task.fresh(), Context(task, device=CPU))


@of_each_kind_on_each_task
def test_it_saves_loads_and_goes_on(kind, name, tmp_path):
    model, _, task = done(kind, name)
    save(model, tmp_path / "model")
    found = load(tmp_path / "model", like=task.original)
    assert fingerprint(found) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(first(found(**task.example)), first(model(**task.example)))
    following = [other for other in ("finetune", "quantize.dynamic") if allowed(kind, other)]
    assert following, f"after {kind} nothing is possible any more"
    for other in following:
        ctx = Context(task, device=CPU)
        kept = run_step(sample(other), load(tmp_path / "model", like=task.original), ctx)[0]
        save(kept, tmp_path / other)
        assert fingerprint(load(tmp_path / other, like=task.original)) == fingerprint(kept)
