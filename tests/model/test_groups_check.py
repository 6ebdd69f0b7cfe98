"""What is refused and why, what the check is worth, and that silenced equals removed in any network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coupled_cases import CASES, IMAGE, TOKENS, X
from coupled_nets import Net, every_other, lively, mlp, tied
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import one_thread  # noqa: F401
from torch import Tensor, nn

from featherweight.core.errors import TaskError
from featherweight.model.cost import macs
from featherweight.model.cut import agreeing, disagreement, remove, silence
from featherweight.model.groups import couple
from featherweight.model.rules.labels import Labels, free
from featherweight.model.rules.reshape import runs


# -- what is refused, and what the check is worth ----------------------------------------------------------------------
def refused_reason(model: nn.Module, shape: tuple[int, ...] = X) -> str:
    coupling = couple(lively(model), {"x": torch.randn(shape)})
    assert coupling.free() == []
    return next(iter(coupling.refused.values()))


def test_a_group_whose_removal_changes_the_result_is_refused_by_name():
    assert "not the same as silencing it" in refused_reason(mlp(lambda s, y: y * y.shape[-1]))


def test_a_group_whose_removal_breaks_the_code_is_refused_by_name():
    def run(self: Any, y: Tensor) -> Tensor:
        assert y.shape[-1] == 8, "eight or nothing"
        return y

    assert "breaks the model (eight or nothing)" in refused_reason(mlp(run))


def test_what_has_no_rule_is_fixed_and_the_operator_is_named():
    coupling = couple(lively(mlp(lambda s, y: torch.fft.fft(y).real)), {"x": torch.randn(X)})
    assert coupling.fixed["a.weight", 0] == "the operator fft_fft has no rule"
    assert coupling.fixed["b.weight", 0] == "it is an output of the model"
    assert coupling.fixed["a.weight", 1] == "it is an input of the model"


def test_a_wrong_group_would_be_caught():
    """The check itself: labels that were told wrong things must not pass it."""
    model, example = lively(mlp(lambda s, y: y)), {"x": torch.randn(X)}
    coupling = couple(model, example)
    cut = {0: np.array([2])}
    assert disagreement(model, coupling, cut, example) == ""
    coupling.dims["b.weight", 1] = np.roll(coupling.dims["b.weight", 1], 1)
    assert "not the same" in disagreement(model, coupling, cut, example)
    good, failed = agreeing(coupling, model, example, cut)
    assert good == {} and list(failed) == [0]


def test_one_wrong_group_does_not_stop_the_others():
    model = lively(Net(lambda s, x: s.c(s.b(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 10), c=nn.Linear(10, 3)))
    example = {"x": torch.randn(X)}
    coupling = couple(model, example)
    coupling.dims["c.weight", 1] = np.roll(coupling.dims["c.weight", 1], 1)
    names = [coupling.groups[place].name for place in coupling.free()]
    good, failed = agreeing(coupling, model, example, {0: np.array([1, 5]), 1: np.array([4])})
    assert names == ["a.weight", "b.weight"] and list(good) == [0] and list(failed) == [1]


def test_a_model_that_cannot_be_traced_is_one_clear_line():
    model = Net(lambda s, x: s.a(x) if float(x.sum()) > 0 else -s.a(x), a=nn.Linear(6, 3))
    with pytest.raises(
        TaskError, match=r"torch\.export cannot trace Net .*prune\.weights works without that"
    ) as caught:
        couple(model, {"x": torch.randn(X)})
    assert "\n" not in str(caught.value)


def test_removal_keeps_the_layers_own_sizes_in_step():
    model = lively(CASES["groups as wholes"][0]())
    coupling = couple(model, {"x": torch.randn(IMAGE)})
    smaller: Any = remove(copy.deepcopy(model), coupling, {0: np.array([1])})
    assert (smaller.a.out_channels, smaller.g.in_channels, smaller.g.out_channels, smaller.g.groups) == (9, 9, 6, 3)
    assert smaller.b.in_channels == 6 and isinstance(smaller, Net)
    smaller.train()
    smaller(torch.randn(IMAGE)).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_recurrent_layers_lose_hidden_units():
    for name, gates in (("lstm", 4), ("two layers of gru, both ways", 3), ("a first state of its own", 1)):
        model: Any = lively(CASES[name][0]())
        coupling = couple(model, {"x": torch.randn(TOKENS)})
        place = next(number for number in coupling.free() if ("r.weight_hh_l0", 1) in coupling.groups[number].places)
        assert len(coupling.groups[place]) == 6
        smaller: Any = remove(model, coupling, {place: np.array([0, 4])})
        assert smaller.r.hidden_size == 4 and smaller.r.weight_hh_l0.shape == (gates * 4, 4)
        assert all(one is other for one, other in zip(smaller.r._flat_weights, smaller.r.parameters(), strict=True))


def test_a_recurrent_layer_with_projections_is_refused_by_name():
    coupling = couple(lively(CASES["a recurrent layer with projections"][0]()), {"x": torch.randn(TOKENS)})
    assert coupling.fixed["r.weight_hh_l0", 0] == "there is no rule for lstm of packed sequences or with projections"


def test_tied_weights_stay_tied():
    model = lively(tied())
    coupling = couple(model, {"x": torch.randn(X)})
    smaller: Any = remove(model, coupling, {0: np.array([0, 3])})
    assert smaller.a.weight is smaller.c.weight and smaller.a.weight.shape == (6, 6)


def test_frozen_parameters_stay_frozen():
    model = lively(mlp(lambda s, y: y))
    model.a.weight.requires_grad_(False)  # type: ignore[union-attr]
    smaller = remove(model, couple(model, {"x": torch.randn(X)}), {0: np.array([0])})
    assert [parameter.requires_grad for parameter in smaller.parameters()] == [False, True, True, True]


def test_multiply_accumulates_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for name in (
        "convolution, norm, pool",
        "groups as wholes",
        "transposed convolution",
        "inside of heads, which is left open",
    ):
        model, shape = lively(CASES[name][0]()), CASES[name][1]
        coupling = couple(model, {"x": torch.randn(shape)})
        cut = every_other(coupling)
        for net, kept in (
            (model, [len(group) for group in coupling.groups]),
            (
                remove(copy.deepcopy(model), coupling, cut),
                [len(group) - len(cut.get(place, ())) for place, group in enumerate(coupling.groups)],
            ),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(torch.randn(shape))
            assert macs(coupling)(kept) == counter.get_total_flops() / 2, name


def test_attention_counts_both_of_its_products():
    """q, k, v and o: 8 x 12, 8 x 6, 8 x 6, 12 x 8 at 10 places; scores and their use: 4 heads of 3, 5 x 5, twice, for
    2 inputs.
    """
    model = lively(CASES["grouped queries"][0]())
    coupling = couple(model, {"x": torch.randn(TOKENS)})
    linear_layers = 10 * (8 * 12 + 8 * 6 + 8 * 6 + 12 * 8)
    assert macs(coupling)([2]) == linear_layers + 2 * 2 * 4 * 3 * 5 * 5
    assert macs(coupling)([1]) == macs(coupling)([2]) / 2


# -- any network -------------------------------------------------------------------------------------------------------
@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A random convolutional network: widths, groups, shortcuts, concatenations, pooling, one or two linear layers."""
    width = draw(st.sampled_from([4, 6, 8]))
    plan: list[tuple[str, int]] = []
    parts: dict[str, nn.Module] = {"stem": nn.Conv2d(3, width, 3, padding=1)}
    now = width
    for place in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["plain", "shortcut", "dense", "depthwise", "grouped", "halves", "steps"]))
        if kind in ("halves", "steps") and now % 2:
            kind = "plain"
        out = draw(st.sampled_from([4, 6, 8, 12])) if kind in ("plain", "dense", "grouped") else now
        groups = {"depthwise": now, "grouped": 2 if now % 2 == 0 else 1}.get(kind, 1)
        into = now // 2 if kind in ("halves", "steps") else now
        outs = now // 2 if kind in ("halves", "steps") else out
        parts[f"c{place}"] = nn.Conv2d(into, outs, 3, padding=1, groups=groups, bias=draw(st.booleans()))
        parts[f"n{place}"] = nn.BatchNorm2d(outs) if draw(st.booleans()) else nn.Identity()
        plan.append((kind, place))
        now = now + out if kind == "dense" else out
    parts["head"] = nn.Linear(now * 4, 5)

    def run(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, place in plan:
            layer = nn.Sequential(getattr(self, f"c{place}"), getattr(self, f"n{place}"), nn.ReLU())
            if kind == "shortcut":
                x = x + layer(x)
            elif kind == "dense":
                x = torch.cat([x, layer(x)], 1)
            elif kind == "halves":
                one, other = x.chunk(2, 1)
                x = torch.cat([one, layer(other)], 1)
            elif kind == "steps":
                x = torch.cat([x[:, 0::2], layer(x[:, 1::2])], 1)
            else:
                x = layer(x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

    return Net(run, **parts)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 2**31))
def test_silenced_equals_removed_in_any_network(model: nn.Module, seed: int):
    lively(model)
    example = {"x": torch.randn(2, 3, 6, 6)}
    coupling = couple(model, example)
    assert coupling.refused == {}
    generator = np.random.default_rng(seed)
    cut = {}
    for place, group in enumerate(coupling.groups):
        cut[place] = np.flatnonzero(generator.random(len(group)) < 0.4)[: len(group) - 1]
    with torch.no_grad():
        silent = silence(copy.deepcopy(model), coupling, cut)(**example)
        smaller = remove(copy.deepcopy(model), coupling, cut)(**example)
    torch.testing.assert_close(silent, smaller, rtol=1e-4, atol=1e-5)


# -- the pure parts ----------------------------------------------------------------------------------------------------
def test_labels_that_meet_are_one_component():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(2)
    labels.unite(a, b)
    assert a.labels is not None and c.labels is not None
    labels.couple(c.labels, a.labels[:1])
    component, frozen = labels.components()
    assert component[a.labels[0]] == component[c.labels[0]] == component[c.labels[1]]
    assert len(set(component.tolist())) == 3 and frozen == {}


def test_what_is_coupled_to_something_frozen_is_frozen_with_its_reason():
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    labels.unite(a, b)
    assert b.labels is not None and a.labels is not None
    labels.freeze(free(b.labels[1:2]), "for a reason")
    component, frozen = labels.components()
    assert frozen == {int(component[a.labels[1]]): "for a reason"}


def test_a_dimension_of_one_index_is_fixed():
    assert not Labels().fresh(1).free


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([2, 12], (2, 3, 4), [([0], [0]), ([1], [1, 2])]),
        ([2, 3, 4], (2, 12), [([0], [0]), ([1, 2], [1])]),
        ([2, 3, 4], (6, 4), [([0, 1], [0]), ([2], [1])]),
        ([4, 6], (6, 4), [([0, 1], [0, 1])]),
        ([2, 1, 5], (2, 5, 1), [([0], [0]), ([2], [1])]),
        ([1], (1, 1), []),
    ],
)
def test_runs_of_a_reshape(before: list[int], after: tuple[int, ...], expected: list[tuple[list[int], list[int]]]):
    assert runs(before, after) == expected
