"""Scores of whole units: the Fisher information of masks against a slow reference, and attention heads as units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_tasks import conv_task, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.core.context import Context, run_step
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.prune.changes import loss_changes
from featherweight.model.groups import Coupling, couple, tensors

CPU = torch.device("cpu")


def masked(model: nn.Module, coupling: Coupling, place: int, mask: Tensor) -> dict[str, Tensor]:
    """All parameters, those of one group times a mask of its units, wherever they are coupled."""
    found = {name: tensor.detach() for name, tensor in tensors(model).items()}
    for (name, dim), positions in coupling.groups[place].places.items():
        if name in coupling.parameters:
            whole = torch.ones(found[name].shape[dim])
            for unit, indices in enumerate(positions):
                whole = whole.index_put((torch.as_tensor(indices),), mask[unit])
            shape = [-1 if other == dim else 1 for other in range(found[name].dim())]
            found[name] = found[name] * whole.reshape(shape)
    return found


def test_fisher_is_the_mean_square_of_the_gradient_of_masks_input_by_input():
    task = conv_task()
    small = Task(name="few", model=task.original, train=task.train, test=task.test, calibration_limit=6)
    model, ctx = small.fresh(), Context(small, device=CPU)
    coupling = couple(model, ctx.example)
    found = loss_changes(model, ctx, coupling, {place: coupling.groups[place] for place in coupling.free()}, "fisher")
    assert len(found) >= 2
    for place, scores in found.items():
        want = torch.zeros(len(coupling.groups[place]))
        batches = list(small.batches("calibrate", batch_size=1))
        assert len(batches) == 6
        for batch in batches:
            mask = torch.ones(len(want), requires_grad=True)
            output = functional_call(model, masked(model, coupling, place, mask), batch[0])
            (gradient,) = torch.autograd.grad(small.loss(output, batch), mask)
            want += gradient.square() / len(batches)
        torch.testing.assert_close(scores, want, rtol=1e-3, atol=1e-9)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sentences(model: nn.Module) -> Task:
    tokens = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": tokens, "labels": tokens}]
    return Task(name="sentences", model=model, train=data, calibrate=data, test=data, loss=next_token)


def next_token(output: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("score", ["l2", "taylor", "fisher"])
def test_heads_with_grouped_queries_go_as_wholes_and_the_least_go_first(score: str):
    model = llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():  # the second group of queries hardly does anything: two heads of queries, one of keys
        for layer, rows in (
            (attention.q_proj, slice(8, 16)),
            (attention.k_proj, slice(4, 8)),
            (attention.v_proj, slice(4, 8)),
        ):
            layer.weight[rows] *= 1e-3
        attention.o_proj.weight[:, 8:16] *= 1e-3
    task = sentences(model)
    ctx = Context(task, device=CPU)
    settings = {"score": score, "of": "parameters", "keep": 0.96, "scope": "global", "multiple": 1}
    only = "model.layers.0.self_attn.*"
    smaller, _ = run_step(step("prune.structured", only=only, **settings), task.fresh(), ctx)
    left = smaller.model.layers[0].self_attn
    kept = [*range(8), *range(16, 32)]
    assert torch.equal(left.q_proj.weight, attention.q_proj.weight[kept])
    assert torch.equal(left.k_proj.weight, attention.k_proj.weight[[*range(4), *range(8, 16)]])
    assert torch.equal(left.o_proj.weight, attention.o_proj.weight[:, kept])
    assert smaller.model.layers[1].self_attn.q_proj.weight.shape == (32, 32)
    with torch.no_grad():
        want, got = (each(**task.example).logits for each in (model, smaller))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-2)


def test_a_share_of_the_heads_is_kept_in_each_layer():
    """`keep` counts in heads: each layer gives up the same number of wholes, give or take the one that fits back in."""
    task = sentences(llama())
    ctx = Context(task, device=CPU)
    settings = {"of": "parameters", "scope": "layer", "multiple": 1, "only": "*self_attn*"}
    smaller, _ = run_step(step("prune.structured", keep=0.85, **settings), task.fresh(), ctx)
    attentions = [layer.self_attn for layer in smaller.model.layers]
    rows = [attention.q_proj.weight.shape[0] for attention in attentions]
    assert max(rows) < 32 and max(rows) - min(rows) <= 8
    assert all(count % 8 == 0 for count in rows)
    assert [attention.k_proj.weight.shape[0] for attention in attentions] == [count // 2 for count in rows]
    assert [attention.o_proj.weight.shape[1] for attention in attentions] == rows
