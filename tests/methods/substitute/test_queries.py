"""Shared heads of keys and values: the fit, equal graph semantics, what is left alone and why."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.substitute.heads import balanced, damped, missed_share, outward, pooled, shared
from featherweight.model.attention import Attention, attentions
from featherweight.model.graph import captured
from featherweight.model.grouped import GroupedHeads

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**16)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=SEEDS, width=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_shared_map_misses_what_the_singular_values_behind_it_hold(seed, width):
    maps, inputs = drawn(seed, 3, 5, 6), drawn(seed + 1, 40, 6)
    moment = inputs.T @ inputs / 40
    inner, outer = shared(maps, moment, width)
    values = torch.linalg.svdvals(maps.flatten(0, 1) @ inputs.T).square()
    assert missed_share(maps, moment, inner, outer) == pytest.approx(
        float(values[width:].sum() / values.sum()), abs=1e-4
    )
    assert torch.allclose(outward(maps, moment, inner), outer, atol=1e-6)
    even, back = balanced(inner, outer)
    assert torch.allclose(back @ even, outer @ inner)
    assert torch.allclose(even.square().mean(1).sqrt(), back.square().mean((0, 1)).sqrt())


def test_moments_of_few_tokens_in_single_precision_can_be_inverted():
    inputs, noise = drawn(0, 20, 60), drawn(2, 60, 60)
    exact = inputs.T @ inputs / 20
    moment = exact + 1e-6 * (noise + noise.T)  # what rounding leaves of it
    assert torch.linalg.eigvalsh(moment)[0] < -1e-6 * moment.diagonal().mean()
    assert torch.linalg.cholesky_ex(damped(moment)).info == 0
    maps = drawn(1, 3, 5, 60)
    inner, outer = shared(maps, moment, 15)
    assert missed_share(maps, exact, inner, outer) < 1e-6


def test_neighbouring_heads_are_averaged():
    weight = drawn(0, 4, 2, 3)
    assert torch.allclose(pooled(weight, 2)[1], (weight[2] + weight[3]) / 2)


def test_a_layer_of_shared_heads_gives_each_as_often_as_it_is_shared():
    layer = GroupedHeads(6, 2, 3, 2)
    x = torch.randn(4, 5, 6)
    few, all_heads = layer.heads(x).unflatten(-1, (2, 3)), layer(x).unflatten(-1, (4, 3))
    for head in range(4):
        assert torch.equal(all_heads[..., head, :], few[..., head // 2, :])


@torch.no_grad()
def mixed(task: Task) -> nn.Module:
    """The transformer with heads of keys and values that are, in pairs, the same but for a change of basis."""
    model = copy.deepcopy(task.original)
    for number, layer in enumerate((model.attend.key, model.attend.value)):
        rows = layer.weight.unflatten(0, (4, 8)).clone()
        for head in (1, 3):
            rows[head] = drawn(head + 7 * number, 8, 8).float() @ rows[head - 1]
        layer.weight.copy_(rows.flatten(0, 1))
        layer.bias.copy_(drawn(3 + number, 32).float())
    return model


def task_of(model: nn.Module, task: Task) -> Task:
    splits = {name: getattr(task, name) for name in ("train", "calibrate", "validate", "test")}
    return Task(name="mixed", model=model, batch_size=64, **splits)


def test_heads_that_differ_by_a_basis_are_shared_without_loss_biases_too():
    task = task_of(mixed(transformer_task()), transformer_task())
    ctx = Context(task, device=CPU)
    model, record = run_step(step("substitute.queries"), task.fresh(), ctx)
    images = task.test.tensors[0][:64]
    with torch.no_grad():
        wanted, found = task.original(images), model(images)
        mean = run_step(step("substitute.queries", fit="mean"), task.fresh(), ctx)[0](images)
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert (mean - wanted).abs().max() > 0.05 * wanted.abs().max()
    assert set(record.changed) == {"attend.query", "attend.key", "attend.value", "attend.out"}
    assert isinstance(model.attend.key, GroupedHeads) and model.attend.key.heads.weight.shape == (16, 32)
    assert "4 heads to 2" in record.changed["attend.key"] and {"embed", "norm"} <= {each.layer for each in record.left}


def test_the_fit_is_nearer_than_the_mean():
    task = transformer_task()
    ctx = Context(task, device=CPU)
    images = task.test.tensors[0]
    with torch.no_grad():
        wanted = task.original(images)
        near, mean = (
            (run_step(step("substitute.queries", fit=fit), task.fresh(), ctx)[0](images) - wanted).square().sum()
            for fit in ("least_squares", "mean")
        )
    assert near < mean


def test_what_cannot_be_shared_is_left_by_name():
    task = transformer_task()
    with pytest.raises(NoEffect, match="pool=3 does not divide its 4 heads of keys and values"):
        run_step(step("substitute.queries", pool=3), task.fresh(), Context(task, device=CPU))
    with pytest.raises(NoEffect, match="excluded by skip="):
        run_step(step("substitute.queries", skip=["attend.value"]), task.fresh(), Context(task, device=CPU))
    with pytest.raises(NoEffect, match="makes no keys or values of an attention"):
        run_step(step("substitute.queries"), conv_task().fresh(), Context(conv_task(), device=CPU))


class Packed(nn.Module):
    """Attention whose queries, keys and values come out of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.all(x).chunk(3, -1))
        weights = torch.softmax(query @ key.transpose(-1, -2) / 2, -1)
        return self.head(self.out((weights @ value).transpose(1, 2).flatten(2)).mean(1))


def test_packed_layers_are_refused_by_name():
    task = task_of(Packed(), transformer_task())
    with pytest.raises(NoEffect, match="do not come from a layer each"):
        run_step(step("substitute.queries"), task.fresh(), Context(task, device=CPU))


def test_keys_that_are_rotated_by_position_are_averaged_and_it_is_said():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = {"input_ids": torch.randint(0, 40, (2, 9))}
    graph = captured(model, tokens, {"input_ids": {0: "batch"}})
    (found,) = attentions(graph)
    assert isinstance(found, Attention) and found.turned and (found.heads, found.shared, found.width) == (4, 1, 8)
    assert found.key.endswith("self_attn.k_proj") and found.output.endswith("self_attn.o_proj")
    task = Task(name="llama", model=model, calibrate=[tokens], validate=[tokens], test=[tokens], loss=None)
    made, record = run_step(step("substitute.queries"), task.fresh(), Context(task, device=CPU))
    attention = made.model.layers[0].self_attn
    assert attention.k_proj.heads.out_features == 16 and type(attention.q_proj) is nn.Linear
    assert "means of 2; keys are turned" in record.changed[found.key]
    assert record.changed[found.value].endswith("of what they do missed")  # what is said of keys is said of them alone
