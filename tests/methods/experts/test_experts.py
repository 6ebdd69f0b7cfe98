"""Steps on experts: what they do to a model, in the runtime too, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_tasks import experts_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import NoEffect, RecipeError, TaskError
from featherweight.core.fit import Training
from featherweight.core.outputs import first, relative_difference
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.coverage import coverage
from featherweight.model.experts import Experts, MixtureOfExperts, Router, experts_of, feed_forward, mixture
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def applied(task, kind, **settings):
    return run_step(step(kind, **settings), task.fresh(), Context(task, device=CPU))


def outputs(task, model):
    with torch.no_grad():
        return model(task.test.tensors[0][:64])


# -- the layer in the runtime ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capacity", [None, 0.75])
def test_the_runtime_computes_the_chosen_experts_and_no_other(tmp_path, capacity):
    width, neurons, experts, tokens = 24, 40, 6, 10
    macs = []
    for top_k in (1, 2, 4):
        members = [
            feed_forward(nn.Linear(width, neurons), nn.SiLU(), nn.Linear(neurons, width)) for _ in range(experts)
        ]
        layer = mixture(Router(width, experts, top_k), experts_of(members, capacity)).eval()
        free = {"x": {0: "batch", 1: "sequence"}}
        made = target("onnxruntime").export(layer, {"x": torch.randn(2, tokens, width)}, tmp_path / str(top_k), free)
        routing = tokens * width * experts
        each = 2 * width * neurons
        if capacity is None:
            assert made.manifest.work.macs == routing + tokens * top_k * each
        else:
            assert made.manifest.work.macs <= routing + experts * -(-tokens * top_k * 3 // (4 * experts)) * each
        macs.append(made.manifest.work.macs)
        runner = made.open()
        for shape in ((1, 1), (3, 17)):
            x = torch.randn(*shape, width)
            with torch.no_grad():
                np.testing.assert_allclose(runner(x), layer(x).numpy(), atol=1e-5)
    assert macs == sorted(macs) and macs[0] < macs[1] < macs[2]


# -- dense feed-forwards -----------------------------------------------------------------------------------------------
def test_a_split_computes_its_share_and_more_of_it_is_nearer():
    task = transformer_task()
    wanted, missed = outputs(task, task.original), []
    for keep in (0.25, 0.5, 0.75):
        model, record = applied(task, "experts.split", keep=keep, experts=8)
        found = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
        assert found.router.top_k == 8 * keep and len(found.experts.members) == 8
        assert {member.up.out_features for member in found.experts.members} == {6}
        assert "narrow.experts (coverage)" in record.changed
        missed.append(relative_difference(wanted, outputs(task, model)))
    assert missed[0] > missed[1] > missed[2] > 0


def test_with_all_experts_a_split_model_is_the_one_before():
    task = transformer_task()
    model, _ = applied(task, "experts.split", experts=6, shared=1)
    for module in model.modules():
        if isinstance(module, Router):
            module.top_k = module.experts
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < 1e-5


def test_a_gated_feed_forward_is_found_by_what_it_computes():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            return self.c(self.a(x) * nn.functional.silu(self.b(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Gated(), nn.Linear(8, 10)

        def forward(self, x):
            return self.head((x + self.block(x)).mean(1))

    task = replace(transformer_task(), model=Net().eval())
    model, record = applied(task, "experts.split", experts=4, keep=0.5)
    member = model.block.experts.members[0]
    assert member.gate is not None and {"block.a", "block.b", "block.c"} <= set(record.changed)
    assert [left.layer for left in record.left] == ["head"]


def test_copies_give_what_the_original_gave_and_learn_to_differ():
    task = transformer_task()
    model, _ = applied(task, "experts.copy")
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < 1e-5
    trained, _ = applied(task, "experts.copy", retrain=Training(epochs=1, lr=1e-2))
    members = next(module for module in trained.modules() if isinstance(module, Experts)).members
    assert not torch.equal(members[0].up.weight, members[1].up.weight)


def test_copies_of_which_one_is_chosen_say_that_the_router_does_not_learn():
    _, record = applied(transformer_task(), "experts.copy", top_k=1)
    assert [text for text in record.warnings if "moves the router by its own losses alone" in text]


def test_what_is_no_feed_forward_is_left_with_the_reason():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 10)

        def forward(self, x):
            return self.down(nn.functional.gelu(self.up(x)).mean(1))

    task = replace(transformer_task(), model=Functional().eval())
    with pytest.raises(NoEffect, match=r"experts.split changed nothing: down: is in no feed-forward"):
        applied(task, "experts.split")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "experts.split",
            {"experts": 7},
            r"experts=7 divides no feed-forward \(neurons: 48\); choose a divisor of 48: 2",
        ),
        ("experts.split", {"experts": 2, "keep": 0.9}, "computes all that are not shared; give more experts"),
        (
            "experts.split",
            {"experts": 8, "keep": 0.25, "shared": 2},
            "is 2, and shared=2 leaves none of these to choose",
        ),
        ("experts.split", {"shared": 4}, "give a larger keep, more experts, or fewer shared ones"),
        ("experts.copy", {"top_k": 5}, "top_k=5 is more than experts=4; choose at most that"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_in_a_line(kind, settings, message):
    with pytest.raises(RecipeError, match=message) as error:
        applied(transformer_task(), kind, **settings)
    assert "\n" not in str(error.value)


def test_a_name_of_no_layer_is_told():
    with pytest.raises(NoEffect, match=r"experts.split changed nothing"):
        applied(transformer_task(), "experts.split", only="nothing.*")
    _, record = applied(transformer_task(), "experts.split", skip=["nothing"])
    assert record.warnings == ["experts.split: no layer matches 'nothing'"]


# -- experts that are there --------------------------------------------------------------------------------------------
def test_stacks_are_opened_with_equal_outputs_saved_and_loaded(tmp_path):
    task = experts_task()
    model, record = applied(task, "experts.route")
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < 1e-5
    assert record.changed["mixture.experts"] == "8 experts in layers of their own"
    assert isinstance(model.mixture.gate, Router)
    save(model, tmp_path / "model")
    assert torch.equal(outputs(task, load(tmp_path / "model", like=task.original)), outputs(task, model))


def test_a_stack_that_is_skipped_stays_a_stack():
    with pytest.raises(NoEffect, match=r"excluded by skip='mixture\.experts'"):
        applied(experts_task(), "experts.route", skip=["mixture.experts"])


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_layouts_of_transformers_are_opened_in_half_precision(layout, kind):
    task = language_task(layout)
    task = replace(task, model=task.fresh().to(kind))
    opened, _ = applied(task, "experts.route")
    with torch.no_grad():
        exact = first(task.fresh().float()(**task.example))
        theirs = relative_difference(exact, first(task.original(**task.example)))
        assert relative_difference(exact, first(opened(**task.example))) < 1.5 * theirs
    assert {each.dtype for each in opened.parameters()} == {kind}
    assert sum(isinstance(module, Router) for module in opened.modules()) == 2


def test_a_model_that_asks_its_routers_for_their_logits_keeps_them():
    task = language_task("mixtral")
    model = task.fresh()
    model.config.output_router_logits = True
    task = replace(task, model=model)
    opened, record = applied(task, "experts.route", top_k=1)
    with torch.no_grad():
        wanted, got = task.original(**task.example), opened(**task.example)
    assert len(got["router_logits"]) == 2 and relative_difference(wanted["logits"], got["logits"]) < 1e-5
    assert [left.layer for left in record.left if "gives the model more" in left.reason] == [
        "model.layers.0.mlp.experts (top_k)", "model.layers.1.mlp.experts (top_k)",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="what surrounds its experts counts on all of them") as error:
        applied(task, "experts.prune", keep=0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_the_layouts_of_transformers_are_opened_with_equal_outputs(layout):
    task = language_task(layout)
    opened, record = applied(task, "experts.route")
    with torch.no_grad():
        wanted = first(task.original(**task.example))
        assert relative_difference(wanted, first(opened(**task.example))) < 1e-5
    assert [name for name, how in record.changed.items() if how == "8 experts in layers of their own"]
    merged, _ = applied(task, "experts.merge", keep=0.5)
    assert {len(each.members) for each in merged.modules() if isinstance(each, Experts)} == {4}
    if layout == "deepseek_v3":
        with pytest.raises(RecipeError, match="chooses within groups of experts"):
            applied(task, "experts.prune", keep=0.5)
    else:
        pruned, _ = applied(task, "experts.prune", keep=0.5)
        assert {each.experts for each in pruned.modules() if isinstance(each, Router)} == {4}


def language_task(layout):
    """A tiny random language model of this layout, on random tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from featherweight.zoo.metrics import perplexity
    from featherweight.zoo.stories import Texts, next_token_loss

    common = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    own = {
        "mixtral": {"num_local_experts": 8},
        "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
        "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8},
        "deepseek_v3": {
            "n_routed_experts": 8, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "head_dim": 8,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8,
        },
    }[layout]  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(layout, **{**common, **own})).eval()
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            nn.init.normal_(module.weight)
    texts = Texts([torch.randint(0, 50, (12,)) for _ in range(12)])
    free = {"input_ids": {0: "batch", 1: "sequence"}}
    data = {"train": texts, "validate": texts, "test": texts}
    return Task(name=layout, model=model, loss=next_token_loss, metric=perplexity(), dynamic=free, batch_size=4, **data)


def test_fewer_experts_a_token_are_less_work(tmp_path):
    task, macs = experts_task(), []
    for top_k in (1, 2, 4):
        model, _ = applied(task, "experts.route", top_k=top_k)
        macs.append(target("onnxruntime").export(model, task.example, tmp_path / str(top_k)).manifest.work.macs)
    each = 3 * 32 * 16 * 8  # of one expert for the eight rows
    assert macs[1] - macs[0] == each and macs[2] - macs[1] == 2 * each


@pytest.mark.parametrize("score", ["contribution", "usage"])
def test_pruning_drops_the_experts_that_matter_least(score):
    task = experts_task()
    used = coverage(task.original, task)["mixture.experts"].choices
    model, record = applied(task, "experts.prune", keep=0.5, score=score)
    assert len(model.mixture.experts.members) == model.mixture.gate.experts == len(model.mixture.gate.weight) == 4
    if score == "usage":
        kept = used.argsort(descending=True, stable=True)[:4].sort().values.tolist()
        assert f"({', '.join(map(str, kept))})" in record.changed["mixture.experts"]
    with pytest.raises(RecipeError, match=r"mixture.experts: a token computes 2 experts, and 1 would stay; raise keep"):
        applied(task, "experts.prune", keep=0.1, score=score)


def test_merging_keeps_the_router_and_pruning_works_behind_it():
    task = experts_task()
    merged, record = applied(task, "experts.merge", keep=0.5)
    assert len(merged.mixture.experts.members) == 4 and len(merged.mixture.gate.weight) == 8
    assert (
        len(set(merged.mixture.experts.table)) == 4 and "8 experts merged into 4" in record.changed["mixture.experts"]
    )
    pruned, _ = run_step(step("experts.prune", keep=0.75), merged, Context(task, device=CPU))
    assert len(pruned.mixture.experts.members) == 3 == len(set(pruned.mixture.experts.table))
    assert len(pruned.mixture.experts.table) == len(pruned.mixture.gate.weight) <= 8


def test_experts_in_factors_are_left_by_merging_and_dropped_by_pruning():
    steps = [step("experts.route"), step("factor.svd", only="mixture.experts.*")]
    model, _ = run_recipe(Recipe(steps), Context(experts_task(), device=CPU))
    with pytest.raises(NoEffect, match="its experts are no feed-forwards of plain linear layers of the same sizes"):
        run_step(step("experts.merge"), model, Context(experts_task(), device=CPU))
    pruned, _ = run_step(step("experts.prune"), model, Context(experts_task(), device=CPU))
    assert len(pruned.mixture.experts.members) == 4


def test_a_capacity_that_is_not_asked_for_stays_as_it_is():
    steps = [step("experts.copy", capacity=1.0), step("experts.route", top_k=1)]
    model, _ = run_recipe(Recipe(steps), Context(transformer_task(), device=CPU))
    assert model.narrow.experts.capacity == 1.0 and model.narrow.router.top_k == 1


def test_more_experts_a_token_than_there_are_is_refused():
    with pytest.raises(RecipeError, match=r"top_k=9, but mixture.experts has 8 experts; choose at most that"):
        applied(experts_task(), "experts.route", top_k=9)


# -- who is routed where -----------------------------------------------------------------------------------------------
def test_the_coverage_counts_every_choice_and_what_is_dropped():
    task = experts_task()
    found = coverage(task.original, task)["mixture.experts"]
    assert (
        found.tokens == 64 * 8
        and int(found.choices.sum()) == 2 * found.tokens
        and sum(found.shares) == pytest.approx(1)
    )
    model, _ = applied(task, "experts.route", capacity=0.5)
    dropped = coverage(model, task)["mixture.experts"]
    assert int(dropped.dropped.sum()) >= found.tokens and "dropped" in str(dropped)
    with pytest.raises(TaskError, match="no layer of experts"):
        coverage(transformer_task().original, transformer_task())


def collapsed():
    """The task with a router that sends every token to the same two experts."""
    task = experts_task()
    model = task.fresh()
    with torch.no_grad():
        model.between.bias.add_(5.0)  # so that what the router reads adds up to more than nothing
        model.mixture.gate.weight.copy_(0.01 * torch.arange(8, 0, -1)[:, None])
    return replace(task, model=model)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_expert_is_calibrated_also_those_that_no_token_is_sent_to(method):
    task = collapsed()
    recipe = Recipe([step("experts.route"), step("quantize.weights", method=method)])
    _, records = run_recipe(recipe, Context(task, device=CPU))
    told = [text for text in records[1].warnings if text.startswith("mixture.experts: no calibration token is sent to")]
    assert len(told) == 1 and "calibrated on all tokens" in told[0]
    assert not any("rounded to nearest" in text for text in records[1].warnings)
    experts = [how for name, how in records[1].changed.items() if name.startswith("mixture.experts.")]
    assert len(experts) == 24 and all(how.endswith(method) for how in experts)


def test_static_quantization_names_the_experts_it_has_no_ranges_for(tmp_path):
    task = collapsed()
    recipe = Recipe([step("experts.route"), step("quantize.static")])
    model, records = run_recipe(recipe, Context(task, device=CPU))
    left = {each.layer for each in records[1].left if each.reason.startswith("no calibration data reach it")}
    assert len(left) == 18 and all(name.startswith("mixture.experts.") for name in left)
    target("onnxruntime").export(model, task.example, tmp_path / "made")


def test_split_pruned_and_quantized_in_one_recipe(tmp_path):
    task = transformer_task()
    steps = [step("experts.split", experts=6), step("prune.weights", sparsity=0.3), step("quantize.dynamic")]
    model, _ = run_recipe(Recipe(steps), Context(task, device=CPU))
    for name in ("onnxruntime", "torch"):
        made = target(name).export(model, task.example, tmp_path / name)
        assert made.manifest.agreement.relative < 0.05 and made.manifest.stored["narrow.experts.0.up.weight"] == "int8"
