"""quantize.float16: what it stores, what it leaves, and that it follows the other steps of quantization."""

import copy

import pytest
import torch
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, fingerprint, run_recipe, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.fit import Training
from featherweight.core.half import Half, Halved
from featherweight.core.recipe import Recipe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def run(task, *steps):
    return run_recipe(Recipe(list(steps)), Context(task, device=CPU))


def test_matrices_lie_in_half_the_bytes_and_the_outputs_stay(tmp_path):
    task = transformer_task()
    model, (record,) = run(task, step("quantize.float16"))
    wide = {name for name, tensor in task.original.named_parameters() if tensor.dim() > 1}
    stored = encodings(model)
    assert set(stored) == wide and {each.form for each in stored.values()} == {"float16"}
    assert {left.layer for left in record.left} == {"norm", "last"}
    for name in wide:
        assert torch.equal(stored[name].decode(), dict(task.original.named_parameters())[name].detach().half().float())
    x = task.test.tensors[0]
    sizes = {}
    for each, made in (("float16", model), ("float32", task.fresh())):
        for kind in ("onnxruntime", "torch"):
            artifact = target(kind).export(made, task.example, tmp_path / each / kind)
            sizes[kind, each] = artifact.manifest.work.weight_bytes
            with torch.no_grad():
                want = made(x)
            assert (torch.as_tensor(artifact.open()(x)) - want).norm() < 1e-5 * want.norm()
            if each == "float16":
                assert {artifact.manifest.stored[name] for name in wide} == {"float16"}
    assert all(sizes[kind, "float16"] < 0.6 * sizes[kind, "float32"] for kind in ("onnxruntime", "torch"))


@pytest.mark.parametrize("first", ["quantize.static", "quantize.dynamic", "quantize.weights"])
def test_it_stores_what_another_step_has_left(first, tmp_path):
    task = conv_task()
    model, records = run(task, step(first, skip=["hidden"]), step("quantize.float16"))
    forms = {name: each.form for name, each in encodings(model).items()}
    assert forms["hidden.weight"] == "float16" and "float16" not in forms["head.weight"]
    assert "already stored as" in {left.layer: left.reason for left in records[1].left}["head"]
    save(model, tmp_path / "model")
    found = load(tmp_path / "model", task.original)
    assert fingerprint(found) == fingerprint(model)
    kernels = {}
    for name, steps in (("one", records[:1]), ("both", records)):
        made, _ = run(task, *[step(**record.step) for record in steps])
        artifact = target("onnxruntime").export(made, task.example, tmp_path / name)
        kernels[name] = artifact.manifest.evidence["integer_kernels"]
        assert artifact.manifest.stored["hidden.weight"] == ("float16" if name == "both" else "float32")
    assert kernels["one"] == kernels["both"]


def test_gradients_pass_and_the_weight_stays_on_the_grid():
    task = conv_task()
    model, _ = run(task, step("quantize.float16"))
    before = copy.deepcopy(model.state_dict())
    Context(task, device=CPU).fit(model, Training(epochs=1, lr=1e-2))
    assert not torch.equal(before["head.parametrizations.weight.original"], model.head.parametrizations.weight.original)
    assert torch.equal(model.head.weight, model.head.weight.half().float())


def test_the_link_gives_what_it_encodes():
    weight = torch.randn(3, 4, requires_grad=True)
    link = Halved()
    assert torch.equal(link.encode(weight).decode(), link(weight).detach())
    link(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))
    assert link.encode(weight).bits_per_weight() == 16 and isinstance(link.encode(weight), Half)


def test_what_cannot_be_stored_so_is_named():
    task = conv_task()
    model = task.fresh()
    with torch.no_grad():
        model.hidden.weight[0, 0] = 1e6
    model.head = nn.Linear(32, 10).to(torch.bfloat16).float()
    model.twin = nn.Linear(32, 10)
    model.twin.weight = model.head.weight
    _, record = run_step(step("quantize.float16", only="hidden,head,twin,conv"), model, Context(task, device=CPU))
    reasons = {left.layer: left.reason for left in record.left}
    assert set(record.changed) == {"conv"}
    assert reasons["hidden"] == "its weight holds values beyond 65504, the largest of 16 bits"
    assert reasons["head"].endswith("is shared with another layer, and would be stored twice")
    assert reasons["stem"].startswith("not chosen")


def test_nothing_left_is_an_error():
    task = conv_task()
    with pytest.raises(NoEffect, match="already stored as int8"):
        run(task, step("quantize.static"), step("quantize.float16"))
