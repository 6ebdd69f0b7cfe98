"""The selector: type, glob, skip; and what it says of the layers that it does not give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featherweight.core.context import Context
from featherweight.core.task import Task
from featherweight.model.select import LayerStep, excluded, left_out, select, unused


def net() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)),
    )


def names(*args: object, **settings: object) -> list[str]:
    return [name for name, _ in select(net(), *args, **settings)]  # type: ignore[arg-type]


def test_types_decide_which_modules_are_layers():
    assert names((nn.Conv2d,)) == ["0.0", "1.0"]
    assert names((nn.Conv2d, nn.Linear)) == ["0.0", "1.0", "1.2"]


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ("*", (), ["0.0", "1.0", "1.2"]),
        ("0.*", (), ["0.0"]),
        ("0.*, 1.2", (), ["0.0", "1.2"]),
        ("*", ("1.*",), ["0.0"]),
        ("1.*", ("1.0",), ["1.2"]),
        ("[01].0", (), ["0.0", "1.0"]),
        ("nothing", (), []),
    ],
)
def test_globs_on_full_names(only: str, skip: tuple[str, ...], expected: list[str]):
    assert names((nn.Conv2d, nn.Linear), only, skip) == expected


def test_skip_wins_over_only():
    assert excluded("a.b", "a.*", ("*.b",)) == "excluded by skip='*.b'"
    assert excluded("a.b", "c", ()) == "not chosen by only='c'"
    assert excluded("a.b", "a.*", ()) is None


def test_selected_and_left_out_are_all_layers_of_the_types():
    both = names((nn.Conv2d, nn.Linear), "1.*", ("1.0",)) + [
        name for name, _ in left_out(net(), (nn.Conv2d, nn.Linear), "1.*", ("1.0",))
    ]
    assert sorted(both) == ["0.0", "1.0", "1.2"]


def test_a_shared_module_is_given_once():
    layer = nn.Linear(3, 3)
    assert [name for name, _ in select(nn.Sequential(layer, layer), (nn.Linear,))] == ["0"]


def test_globs_that_match_nothing_are_named():
    assert list(unused(net(), (nn.Conv2d,), "0.*,9.*", ("1.2",))) == ["9.*", "1.2"]


def test_layer_step_reports_what_it_leaves_and_what_matches_nothing():
    class Touch(LayerStep):
        """Does nothing; not registered."""

    ctx = Context(Task(name="t", model=net(), test=[(torch.zeros(2, 3, 5, 5), torch.zeros(2))]))
    chosen = Touch(only="0.*", skip=("9.*",)).layers(net(), ctx, (nn.Conv2d,))
    assert [name for name, _ in chosen] == ["0.0"]
    assert [(left.layer, left.reason) for left in ctx.record.left] == [("1.0", "not chosen by only='0.*'")]
    assert len(ctx.record.warnings) == 1
    assert "'9.*'" in ctx.record.warnings[0]
