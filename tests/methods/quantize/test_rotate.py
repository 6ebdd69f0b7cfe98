"""quantize.rotate: what can turn is found in the graph, turns, and the network computes what it did."""

import copy

import pytest
import torch
from small_tasks import one_thread, transformer_task  # noqa: F401
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import featherweight as fw
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import NoEffect, RecipeError
from featherweight.core.outputs import first, relative_difference
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task
from featherweight.methods.quantize.hadamard import peak
from featherweight.methods.quantize.rotate import agreeing
from featherweight.model.rotations import Basis, free_bases
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 24, 32  # no power of two: 8 x 3


class Logits(nn.Module):
    """The first output of a Hugging Face model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return first(self.model(input_ids=input_ids))


def uneven(model: nn.Module) -> nn.Module:
    """Every norm gets gains and shifts that differ, as after training, and every bias a value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model.eval()


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return uneven(Logits(LlamaForCausalLM(config)))


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    return uneven(Logits(BertModel(config, add_pooling_layer=False)))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=3, n_positions=32, use_cache=False, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return uneven(Logits(GPT2LMHeadModel(config)))


def task_of(model: nn.Module) -> Task:
    tokens = torch.randint(0, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(2))
    data = fw.Arrays(tokens, tokens[:, 0])
    return Task(
        name="tokens", model=model, train=data, validate=data, test=data, batch_size=4,
        loss=lambda output, batch: first(output).square().mean(), metric="mse",
    )  # fmt: skip


def rotate(model: nn.Module, **settings) -> tuple[nn.Module, Context]:
    ctx = Context(task_of(model), device=CPU)
    return run_step(step("quantize.rotate", **settings), copy.deepcopy(model), ctx)[0], ctx


def apart(one: nn.Module, other: nn.Module) -> float:
    tokens = torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return relative_difference(one(tokens), other(tokens))


# -- outputs stay ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), bert, gpt2], ids=["llama", "tied", "bert", "gpt2"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-13)], ids=["32", "64"])
def test_the_outputs_stay(make, dtype, bound):
    model = make().to(dtype)
    found, ctx = rotate(model)
    assert ctx.record.changed and apart(model, found) < bound
    assert count(found) == count(model)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_untied_llama_turns_every_layer_on_the_sides_that_are_free():
    model = llama()
    found, ctx = rotate(model)
    assert not ctx.record.left
    block = "model.model.layers.0"
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(found.get_submodule(f"{block}.{name}").weight, torch.ones(WIDTH))
    for name, text in (
        ("self_attn.q_proj", "dimension 0 not: mul multiplies entry by entry; dimension 1 turned;"),
        ("self_attn.v_proj", "dimension 0 turned in blocks of 8; dimension 1 turned;"),
        ("self_attn.o_proj", "dimension 0 turned; dimension 1 turned in blocks of 8;"),
        ("mlp.gate_proj", "dimension 0 not: silu looks at its single entries; dimension 1 turned;"),
        ("mlp.down_proj", "dimension 0 turned; dimension 1 not: mul multiplies entry by entry;"),
    ):
        assert ctx.record.changed[f"{block}.{name}"].startswith(text)
        assert not torch.allclose(
            found.get_submodule(f"{block}.{name}").weight, model.get_submodule(f"{block}.{name}").weight
        )


def test_grouped_queries_share_the_rotation_of_their_value_head():
    free = free_bases(llama(), task_of(llama()).example)
    places = {basis.places for basis in free.bases if basis.block == 8}
    layer = "model.model.layers.1.self_attn"
    assert ((f"{layer}.v_proj.weight", 0), (f"{layer}.o_proj.weight", 1)) in places


def test_a_tied_head_stays_tied_unless_untie_is_set(tmp_path):
    model = llama(tied=True)
    found, ctx = rotate(model)
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    reasons = {left.layer: left.reason for left in ctx.record.left}
    assert "tied (untie: true gives it its own)" in reasons["model.lm_head"]
    assert set(ctx.record.changed) == {
        f"model.model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("v_proj", "o_proj")
    }
    larger, ctx = rotate(model, untie=True)
    assert count(larger) == count(model) + VOCABULARY * WIDTH
    assert apart(model, larger) < 3e-6 and not ctx.record.left
    assert any(f"{VOCABULARY * WIDTH * 4:,} bytes larger" in text for text in ctx.record.warnings)
    save(larger, tmp_path / "larger")
    assert apart(load(tmp_path / "larger", like=model), larger) == 0


def test_what_is_untied_in_vain_is_tied_again():
    model = llama(tied=True)
    found, _ = rotate(model, untie=True, skip=["model.model.embed_tokens"])
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight and apart(model, found) < 3e-6


def test_behind_a_norm_that_is_added_the_stream_stays_and_the_heads_turn():
    _, ctx = rotate(bert())
    layer = "model.encoder.layer.0"
    for name in ("query", "key", "value"):
        text = ctx.record.changed[f"{layer}.attention.self.{name}"]
        assert "dimension 0 turned in blocks of 8" in text
        assert "the gain model.embeddings.LayerNorm.weight cannot move: its output goes into add as well" in text
    assert {left.layer for left in ctx.record.left} >= {f"{layer}.intermediate.dense", f"{layer}.output.dense"}


def test_a_layer_norm_stays_a_layer_norm_and_gives_its_gain_and_shift_away():
    model = gpt2()
    found, ctx = rotate(model)
    norm = found.model.transformer.h[0].ln_1
    assert torch.equal(norm.weight, torch.ones(WIDTH)) and torch.equal(norm.bias, torch.zeros(WIDTH))
    last = found.model.transformer.ln_f  # its reader has no bias, so its shift stays, divided by its gain
    assert torch.equal(last.weight, torch.ones(WIDTH)) and not torch.equal(last.bias, torch.zeros(WIDTH))
    assert "model.lm_head" in ctx.record.changed


def test_a_shift_without_a_place_is_not_divided_by_a_gain_near_zero():
    model = gpt2()
    with torch.no_grad():
        model.model.transformer.ln_f.weight[3] = 1e-9
    found, ctx = rotate(model)
    assert "is nearly zero in places" in {left.layer: left.reason for left in ctx.record.left}["model.lm_head"]
    assert apart(model, found) < 3e-6


class Chain(nn.Module):
    """Two linear layers in a row with a scale between them, then a nonlinearity and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(self.one(x) * 0.5)))


def chain_task() -> Task:
    torch.manual_seed(0)
    model, inputs = Chain().eval(), torch.randn(16, 6)
    with torch.no_grad():
        rows = torch.arange(64)
        model.two.weight[rows, torch.randperm(64)] *= 15
        data = fw.Arrays(inputs, model(inputs).argmax(1))
    return Task(name="chain", model=model, train=data, validate=data, test=data)


def test_planted_outliers_between_two_linear_layers_are_spread():
    task = chain_task()
    ctx = Context(task, device=CPU)
    found, record = run_step(step("quantize.rotate"), task.fresh(), ctx)
    assert peak(task.original.two.weight) > 2 * peak(found.two.weight)
    assert {left.layer: left.reason for left in record.left} == {
        "three": "it is an output of the model; relu looks at its single entries"
    }
    assert relative_difference(task.original(**task.example), found(**task.example)) < 1e-6


def test_rounding_afterwards_loses_less_where_there_were_outliers():
    task = chain_task()
    weights = {"kind": "quantize.weights", "bits": 3, "group": None, "method": "rtn", "skip": ["three"]}
    losses = []
    for steps in ([weights], [{"kind": "quantize.rotate"}, weights]):
        model, _ = run_recipe(fw.Recipe(steps), Context(task, device=CPU))
        assert set(encodings(model)) == {"one.weight", "two.weight"}
        losses.append(relative_difference(task.original(**task.example), model(**task.example)))
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("settings", [{"skip": ["two"]}, {"only": "one"}])
def test_a_rotation_needs_all_of_its_layers(settings):
    task = chain_task()
    with pytest.raises(NoEffect, match=r"quantize\.rotate changed nothing.*(skip|only)"):
        run_step(step("quantize.rotate", **settings), task.fresh(), Context(task, device=CPU))


def test_masked_weights_are_refused_before_anything_runs():
    recipe = fw.Recipe([{"kind": "prune.weights"}, {"kind": "quantize.rotate"}])
    with pytest.raises(RecipeError, match=r"put quantize\.rotate before it"):
        recipe.check()
    fw.Recipe([{"kind": "quantize.rotate"}, {"kind": "quantize.weights"}]).check(target("onnxruntime"))
    fw.Recipe([{"kind": "quantize.rotate"}, {"kind": "quantize.static"}]).check(target("onnxruntime"))


def test_what_changes_the_outputs_is_left_out_and_named():
    bases = [Basis(((f"layer{number}.weight", 0),), 4, False) for number in range(5)]

    def check(chosen):
        return "'output' differs by 1.0e+00 (relative)" if bases[1] in chosen or bases[4] in chosen else ""

    done, refused = agreeing(bases, check)
    assert done == [bases[0], bases[2], bases[3]]
    assert refused == dict.fromkeys([bases[1], bases[4]], "undone: rotated, 'output' differs by 1.0e+00 (relative)")


def test_another_seed_is_another_rotation():
    task = transformer_task()
    found = [
        run_step(step("quantize.rotate"), task.fresh(), Context(task, seed=seed, device=CPU))[0] for seed in (0, 1)
    ]
    assert not torch.allclose(found[0].attend.value.weight, found[1].attend.value.weight)


@pytest.mark.data
@pytest.mark.slow
def test_real_networks_compute_what_they_did():
    for name, settings, least in (
        ("zoo:stories260k", {"untie": True}, 37), ("zoo:stsb-minilm", {}, 24), ("zoo:kws-kwt1", {}, 48),
    ):  # fmt: skip
        task = find_task(name)
        found, record = run_step(step("quantize.rotate", **settings), task.fresh(), Context(task, device=CPU))
        with torch.no_grad():
            off = relative_difference(first(task.original(**task.example)), first(found(**task.example)))
        assert off < 5e-6 and len(record.changed) >= least
