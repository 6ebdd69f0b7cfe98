"""Mixed precision: the choice is the best there is, the budget holds on what is stored, and it is worth it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401

from featherweight.core.context import Context, run_step
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import torch_figure
from featherweight.core.knapsack import choose
from featherweight.core.soft import encodings
from featherweight.core.step import step


@given(seed=st.integers(0, 10_000), layers=st.integers(1, 4), budget=st.floats(0.2, 1.0))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_loses_less(seed: int, layers: int, budget: float):
    random = np.random.default_rng(seed)
    costs = random.integers(1, 64, (layers, 3)).astype(float)
    losses = random.random((layers, 3))
    limit = math.floor(budget * costs.max(1).sum())
    best = min(
        (
            sum(losses[layer, option] for layer, option in enumerate(options))
            for options in itertools.product(range(3), repeat=layers)
            if sum(costs[layer, option] for layer, option in enumerate(options)) <= limit
        ),
        default=math.inf,
    )
    # whole costs in whole steps: nothing is rounded
    found = choose(costs, losses, 4096.0)
    if best == math.inf:
        with pytest.raises(ValueError, match="cost more than"):
            found.options(limit)
        return
    options = found.options(limit)
    assert sum(losses[layer, option] for layer, option in enumerate(options)) == pytest.approx(best)
    assert sum(costs[layer, option] for layer, option in enumerate(options)) <= limit * (1 + 1e-9)


def test_what_costs_infinity_is_not_taken():
    found = choose([[1.0, math.inf], [1.0, 3.0]], [[5.0, 0.0], [5.0, 0.0]], 4.0)
    assert found.options(4.0) == [0, 1] and found.losses[-1] == 5
    with pytest.raises(ValueError, match="cost more than"):
        choose([[math.inf]], [[0.0]], 4.0).options(4.0)


def quantized(task: Any, **settings: Any) -> Any:
    return run_step(step("quantize.mixed", **settings), task.fresh(), Context(task, device=torch.device("cpu")))


def average_bits(model: torch.nn.Module) -> float:
    stored = encodings(model)
    count = sum(math.prod(each.shape) for each in stored.values())
    return sum(each.bits_per_weight() * math.prod(each.shape) for each in stored.values()) / count


def test_average_bits_are_those_of_what_is_stored():
    task = transformer_task()
    model, record = quantized(task, limit=4.2, group=16, method="rtn", leave=False)
    assert len({each.bits for each in encodings(model).values()}) > 1
    assert 3.5 < average_bits(model) <= 4.2
    assert set(record.changed) == {name.rpartition(".")[0] for name in encodings(model)}


def test_it_beats_equal_bits_for_all():
    task = transformer_task()
    context = Context(task, device=torch.device("cpu"))
    equal, _ = run_step(step("quantize.weights", bits=3, group=8, method="rtn"), task.fresh(), context)
    mixed, _ = quantized(task, limit=average_bits(equal), group=8, method="rtn", leave=False, inputs=64)

    def noise(model: torch.nn.Module) -> float:
        with torch.no_grad():
            images = task.test.tensors[0]
            return float((model(images) - task.original(images)).square().mean())

    assert average_bits(mixed) <= average_bits(equal) + 1e-6
    assert noise(mixed) < 0.8 * noise(equal)


def test_what_stays_in_floats_is_limited_by_its_multiply_accumulates():
    task = conv_task()
    model, record = quantized(task, budget="float_macs", limit=0.2, activations="int8", bits=(4,))
    left = {item.layer for item in record.left if "worth more" in item.reason}
    assert left and left & {"stem", "conv", "depth", "hidden", "head"} == left
    macs = {"stem": 16 * 9 * 64, "conv": 16 * 16 * 9 * 64, "depth": 16 * 9 * 16, "hidden": 64 * 32, "head": 320}
    assert sum(macs[layer] for layer in left) <= 0.2 * sum(macs.values())
    assert {name.rpartition(".")[0] for name in encodings(model)} == set(macs) - left


def test_the_smallest_model_within_the_drop():
    task = transformer_task()
    model, _ = quantized(task, budget="drop", limit=3.0, group=8, method="rtn")
    assert torch_figure(task, split="validate") - torch_figure(task, model, split="validate") <= 3.0
    assert average_bits(model) < 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "hqq", "symmetric": True}, "with 8 bits value=.*hqq finds zero points"),
        ({"method": "hqq", "bits": (4, 1)}, "with 1 bit value=.*hqq finds zero points"),
        ({"bits": (7, 4)}, "with 7 bits bits=7: input should be 8, 6, 5"),
        ({"bits": (4, 1), "activations": "int8"}, "with 1 bit bits=1: input should be greater than or equal to 2"),
    ],
)
def test_what_the_inner_step_refuses_is_refused_when_the_step_is_made(given: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        step("quantize.mixed", **given)


def test_a_layer_without_some_number_of_bits_chooses_among_the_others():
    task = transformer_task()
    context = Context(task, device=torch.device("cpu"))
    pruned, _ = run_step(step("prune.weights", sparsity=0.5, only="wide"), task.fresh(), context)
    item = step("quantize.mixed", bits=(4, 1), method="rtn", group=8, limit=5.0, leave=False, inputs=64)
    model, record = run_step(item, pruned, context)
    assert {each.bits for each in encodings(model).values()} == {1, 4}, "a grid of 1 bit has no 0, others may have it"
    assert encodings(model)["wide.weight"].bits == 4 and average_bits(model) <= 5
    assert [left.reason for left in record.left if left.layer == "wide (1 bit)"] == [
        "it is pruned, and this grid has no 0"
    ]


def test_awq_measures_layers_against_the_model_as_it_was():
    """Its scales change the norm before a layer, too, which switching the layer off does not undo."""
    task = transformer_task()
    item = step("quantize.mixed", bits=(3,), method="awq", group=8, inputs=64)
    found = item._measure(task.fresh(), Context(task, device=torch.device("cpu")))
    images, outputs = task.example, {}
    for layer in found.losses:
        plain = step("quantize.weights", bits=3, method="rtn", group=8, only=layer)
        outputs[layer], _ = run_step(plain, task.fresh(), Context(task, device=torch.device("cpu")))
        with torch.no_grad():
            want = task.original(**images)
            loss = float((outputs[layer](**images) - want).square().sum() / want.square().sum())
        assert 0.25 < found.losses[layer][3] / loss < 4, "of 64 inputs, of two"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"limit": 1.0}, "bits cannot come down to 1 with 2 bits, 3 bits, 4 bits, 8 bits, floats; raise the limit"),
        ({"budget": "float_macs"}, "set activations: int8"),
        ({"bits": (9,)}, "less than or equal to 8"),
        ({"bits": ()}, "at least one number of bits"),
        ({"budget": "drop", "limit": 0.0, "leave": False, "bits": (1,)}, "even with 1 bit; raise limit .0., or set"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        quantized(transformer_task(), group=8, method="rtn", **given)
