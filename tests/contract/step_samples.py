"""Samples of every step and small tasks for them: what the contract of steps is tested on."""

import functools
import itertools
from typing import Any

import torch
from small_tasks import blocks_task, conv_task, experts_task, pooled_task, tokens_task, transformer_task
from torch import nn

from featherweight.core import registry
from featherweight.core.context import Context, run_step
from featherweight.core.errors import RecipeError
from featherweight.core.recipe import Recipe
from featherweight.core.record import StepRecord
from featherweight.core.step import Between, Step, knobs, step
from featherweight.core.task import Task

registry.load("methods")
KINDS = sorted(Step.kinds)
TASKS = {
    "conv": conv_task,
    "transformer": transformer_task,
    "blocks": blocks_task,
    "experts": experts_task,
    "tokens": tokens_task,
    "pooled": pooled_task,
}
# what needs rows of blocks: tried there, and only there
ROWS = frozenset({"distill.student", "prune.blocks", "share.layers", "sparse.layerdrop", "sparse.stochastic_depth"})
# what needs experts: tried there, and only there
MIXED = frozenset({"experts.route", "experts.prune", "experts.merge"})
PROMPTED = frozenset({"adapt.prompt", "adapt.prefix"})  # what needs token ids: tried there, and only there
ANY_SIZE = frozenset({"substitute.resolution"})  # what needs images of any size: tried there, and only there
OWN = {"blocks": ROWS, "experts": MIXED, "tokens": PROMPTED, "pooled": ANY_SIZE}  # tasks for kinds that need them
# a nonlinearity stands between all of its layers, or there is no convolution
NOTHING_IN = frozenset(
    {
        ("quantize.rotate", "conv"),
        ("quantize.rotate", "blocks"),
        ("factor.tucker", "transformer"),
        ("factor.cp", "transformer"),
        ("substitute.separable", "transformer"),
        ("substitute.separable", "tokens"),
        # rectifiers are as cheap as it gets
        ("substitute.activations", "conv"),
        ("substitute.activations", "blocks"),
        ("substitute.activations", "tokens"),  # which calls them as functions
        *(("substitute.fused", task) for task in ("transformer", "experts", "tokens")),
        *((kind, "tokens") for kind in ("factor.tucker", "factor.cp", "substitute.separable")),
        ("experts.split", "tokens"),  # which calls its activation as a function
        ("experts.copy", "tokens"),
        ("substitute.queries", "conv"),
        ("substitute.queries", "blocks"),
        # as in the network that it is made from
        *((kind, "pooled") for kind in ("quantize.rotate", "substitute.activations", "substitute.queries")),
        *((kind, "pooled") for kind in ("experts.split", "experts.copy")),
        ("experts.split", "conv"),
        ("experts.split", "blocks"),
        ("experts.copy", "conv"),
        ("experts.copy", "blocks"),
        *((kind, "experts") for kind in ("factor.tucker", "factor.cp", "substitute.separable")),
    }
)


# pointwise and depthwise convolutions have no kernel between channels any more
KERNELS = frozenset({"factor.tucker", "factor.cp", "substitute.separable"})
SEPARATE = frozenset({"factor.cp", "substitute.separable"})


# so that what prunes behind them finds weights
MILD = {"sparse.rigl": {"sparsity": 0.4}, "sparse.set": {"sparsity": 0.4}}


ONCE = ("substitute.activations", "substitute.queries", "substitute.fused")
SPLITS = ("split", "copy")  # experts made of dense feed-forwards


# in which of the small tasks a step leaves nothing for another behind it
NOTHING_BEHIND = {
    # a second prompt or prefix is refused: tests/methods/adapt/test_prompts.py
    **{pair: frozenset(TASKS) for pair in itertools.product(("adapt.prefix", "adapt.prompt"), repeat=2)},
    # layers that got ranks of their own are not alike any more
    ("factor.svd", "share.layers"): frozenset(TASKS),
    # the reshapes of tensor trains bind every channel
    ("factor.train", "prune.structured"): frozenset({"conv"}),
    ("factor.train", "sparse.structured_dropout"): frozenset(TASKS),
    # the second factors of keys have fewer inputs than a head has entries
    ("factor.svd", "substitute.queries"): frozenset(TASKS),
    # adapters and cores stand between the layers of a feed-forward
    **{(one, f"experts.{other}"): frozenset(TASKS) for one in ("adapt.bottleneck", "factor.train") for other in SPLITS},
    # no four experts divide what is left of the neurons
    ("prune.structured", "experts.split"): frozenset(TASKS),
    # the layers of keys and values stand within those of shared heads, by another name
    ("substitute.queries", "adapt.prefix"): frozenset(TASKS),
    # rectifiers, shared heads and layers that became one leave nothing to do again
    **{(kind, kind): frozenset(TASKS) for kind in ONCE},
    # no dense feed-forward is left
    **{(f"experts.{one}", f"experts.{other}"): frozenset(TASKS) for one in SPLITS for other in SPLITS},
    # nothing is left to open, and as many are chosen as before
    ("experts.route", "experts.route"): frozenset(TASKS),
}


def works(kind: str, name: str) -> bool:
    """Whether a step of this kind is tried on the task called so."""
    alone = all((name == task) == (kind in kinds) for task, kinds in OWN.items())
    return alone and (kind, name) not in NOTHING_IN


CASES = [(kind, name) for name in TASKS for kind in KINDS if works(kind, name)]
CPU = torch.device("cpu")
GIVEN: dict[str, dict[str, Any]] = {
    "distill.student": {"student": "small_tasks:student"},  # what the user must give
    "adapt.lora": {"rank": 4},  # layers in factors have a rank of 6
}


def sample(kind: str, **settings) -> Step:
    """A step of this kind that works on a small task.

    It has its default settings, with one epoch where it trains; a method that cannot run with its
    defaults gives others by a class method `sample()`, a mapping of settings.
    """
    cls = Step.kinds[kind]
    given = cls.sample() if hasattr(cls, "sample") else GIVEN.get(kind, {})
    short = {"epochs": 1} if "epochs" in cls.model_fields else {}
    return step(kind, **{**short, **given, **settings})


def leading(kind: str, **settings) -> Step:
    """A step of this kind that leaves something to do for any other behind it."""
    return sample(kind, **{**MILD.get(kind, {}), **settings})


def stronger(kind: str) -> Step:
    """The sample once more, with every number that the search may vary half way to the end that compresses more."""
    item, other = sample(kind), {}
    for name, knob in knobs(Step.kinds[kind]).items():
        value = getattr(item, name)
        if isinstance(knob, Between) and isinstance(value, float) and name != "epochs":
            other[name] = (value + (knob.low if name == "keep" else knob.high)) / 2
    return sample(kind, **other)


@functools.cache
def done(kind: str, name: str, seed: int = 0) -> tuple[nn.Module, StepRecord, Task]:
    """The sample of this kind, applied to a small task; the model must not be changed by tests."""
    task = TASKS[name]()
    model, record = run_step(sample(kind), task.fresh(), Context(task, seed=seed, device=CPU))
    return model, record, task


def _finds_work(kind: str, name: str) -> bool:
    return (kind, name) not in NOTHING_IN and all(kind not in kinds or name == task for task, kinds in OWN.items())


def _tasks(kinds: tuple[str, ...]) -> list[str]:
    """The small tasks in which all of these, one after the other, find something to do."""
    if kinds[0] in SEPARATE and set(kinds[1:]) & KERNELS:
        return []
    bound = NOTHING_BEHIND.get((kinds[0], kinds[-1]), ()) if len(kinds) > 1 else ()
    return [name for name in TASKS if name not in bound and all(_finds_work(kind, name) for kind in kinds)]


def small_task(*kinds: str) -> Task:
    """The first of the small tasks in which all of these, one after the other, find something to do."""
    return TASKS[_tasks(kinds)[0]]()


def share_a_task(*kinds: str) -> bool:
    """Whether there is such a task."""
    return bool(_tasks(kinds))


def allowed(one: str, other: str) -> bool:
    try:
        Recipe([sample(one), stronger(other)]).check()
    except RecipeError:
        return False
    return True
