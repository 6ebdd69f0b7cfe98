"""A layer switched on alone in a model that was quantized as a whole costs what quantizing it alone costs."""

import pytest
import torch
from small_tasks import one_thread, transformer_task  # noqa: F401

from featherweight.core.context import Context, run_step
from featherweight.core.step import step
from featherweight.model.parts import Replay, parts, weights_before

CPU = torch.device("cpu")


def noise(output: torch.Tensor, want: torch.Tensor) -> float:
    return float((output - want).square().sum() / want.square().sum())


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("quantize.weights", {"bits": 3, "group": 8, "beam": 1}),
        ("quantize.weights", {"bits": 3, "group": 8, "beam": 1, "scaling": True}),
        ("quantize.weights", {"bits": 3, "group": 8, "method": "rtn"}),
        ("quantize.static", {"bits": 4, "ends": 4, "rounding": "adaptive", "iterations": 100}),
    ],
)
def test_a_layer_switched_on_alone_loses_what_it_loses_alone(kind, given):
    task = transformer_task()
    context, inputs = Context(task, device=CPU), {"x": task.test.tensors[0][:128]}
    item = step(kind, **given).alone()
    model, record = run_step(item, task.fresh(), context)
    owned = {layer: each for layer, each in parts(model).items() if layer in record.changed}
    replay = Replay(model, owned, weights_before(model, task.original))
    with torch.no_grad():
        want = task.original(**inputs)
    assert noise(replay.start(inputs), want) < 1e-6, "all off is the original"
    # one port of quantize.static feeds three layers: what it loses outweighs what query and key themselves lose
    for layer in owned.keys() - {"attend.query", "attend.key"} if kind == "quantize.static" else owned:
        alone, _ = run_step(item.model_copy(update={"only": layer, "skip": ()}), task.fresh(), context)
        with torch.no_grad():
            ratio = noise(replay.run([layer]), want) / noise(alone(**inputs), want)
        assert 0.6 < ratio < 1.6, layer


def test_no_layer_alone_learns_to_make_up_for_others():
    item = step("quantize.static", rounding="block", clipping="learned").alone()
    assert (item.rounding, item.clipping, item.bias_correction) == ("nearest", "calibrated", False)
    assert step("quantize.weights", method="rtn").alone() == step("quantize.weights", method="rtn")
