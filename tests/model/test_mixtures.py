"""Mixtures and feed-forwards known by what they compute: in stacks, in lists, in half precision, without padding."""

from dataclasses import replace

import pytest
import torch
from small_tasks import Stack, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.data import Arrays
from featherweight.core.errors import NoEffect
from featherweight.core.outputs import relative_difference
from featherweight.core.step import step
from featherweight.core.task import Task
from featherweight.methods.experts.importance import contributions
from featherweight.methods.experts.training import balanced
from featherweight.model.coverage import coverage
from featherweight.model.experts import Experts, FeedForward, Router, experts_of, feed_forward, mixture
from featherweight.model.feedforwards import as_feed_forward
from featherweight.model.mixtures import mixtures, opened

CPU = torch.device("cpu")
WIDTH, COUNT = 8, 6


class Expert(nn.Module):
    """As Mixtral's were before they were stacked."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, 16), (16, WIDTH), (WIDTH, 16)))

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Looped(nn.Module):
    """Experts in a list, called in a loop: [..., width] to the same."""

    def __init__(self, scores="selected", shared=False, times=1.0, bias=False):
        super().__init__()
        self.scores, self.times = scores, times
        self.gate = nn.Linear(WIDTH, COUNT, bias=bias)
        self.experts = nn.ModuleList(Expert() for _ in range(COUNT))
        self.common = Expert() if shared else None

    def score(self, tokens):
        return self.gate(tokens)

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        logits = self.score(tokens)
        values, indices = (logits.sigmoid() if self.scores.startswith("sigmoid") else logits.softmax(-1)).topk(2)
        if self.scores in ("selected", "sigmoid, normalised"):
            values = values / values.sum(-1, keepdim=True)
        made = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            rows, choice = torch.where(indices == place)
            made.index_add_(0, rows, self.times * values[rows, choice, None] * expert(tokens[rows]))
        return (made if self.common is None else made + self.common(tokens)).reshape(x.shape)


class Net(nn.Module):
    def __init__(self, inner, times=1):
        super().__init__()
        self.block, self.head, self.times = inner, nn.Linear(WIDTH, 10), times

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.block(x)
        return self.head(x.mean(1))


def task_of(model):
    torch.manual_seed(0)
    return replace(transformer_task(), model=model.eval())


def applied(task, kind, **settings):
    return run_step(step(kind, **settings), task.fresh(), Context(task, device=CPU))


def outputs(task, model):
    with torch.no_grad():
        return model(task.test.tensors[0][:64])


# -- in a list ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scores", ["selected", "softmax", "sigmoid", "sigmoid, normalised"])
def test_experts_in_a_list_are_opened_with_equal_outputs(scores, shared):
    task = task_of(Net(Looped(scores, shared, bias=True)))
    model, record = applied(task, "experts.route")
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < 1e-5
    assert record.changed["block.experts"] == f"{COUNT} experts in layers of their own"
    assert isinstance(model.block.router, Router) and model.block.router.top_k == 2
    assert all(isinstance(member, FeedForward) for member in model.block.experts.members)
    assert int(coverage(task.original, task)["block.experts"].choices.sum()) == 2 * 64 * 8


def test_experts_in_a_list_are_pruned_merged_and_computed_by_choice():
    task = task_of(Net(Looped()))
    pruned, _ = applied(task, "experts.prune", keep=0.5)
    assert len(pruned.block.experts.members) == pruned.block.router.experts == 3
    merged, _ = applied(task, "experts.merge", keep=0.5)
    assert len(merged.block.experts.members) == 3 and len(merged.block.experts.table) == COUNT
    one, _ = applied(task, "experts.route", top_k=1)
    seen = []
    for member in one.block.experts.members:
        member.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
    outputs(task, one)
    assert sum(seen) == 64 * 8


def test_a_list_that_is_read_in_no_way_is_left_with_the_reason():
    task = task_of(Net(Looped(times=2.5)))
    with pytest.raises(NoEffect, match="block: no way to read it as a linear score and a list of experts"):
        applied(task, "experts.route")
    with pytest.raises(NoEffect, match=r"excluded by skip='block\.experts'"):
        applied(task_of(Net(Looped())), "experts.route", skip=["block.experts"])


def test_experts_in_a_list_are_not_split_by_which_of_them_the_example_reaches():
    with pytest.raises(NoEffect, match="is in a mixture of experts already"):
        applied(task_of(Net(Looped())), "experts.split")


def test_a_score_within_a_module_of_its_own_is_found_and_parts_that_take_no_tokens_are_no_obstacle():
    class Scored(Looped):
        def __init__(self, common=None):
            super().__init__()
            self.router, self.common = nn.Sequential(self.gate, nn.Identity()), common
            del self.gate

        def score(self, tokens):
            return self.router(tokens)

    task = task_of(Net(Scored()))
    model, _ = applied(task, "experts.route")
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < 1e-5

    class Apart(Scored):
        def forward(self, x):
            return self.common(x.mean(1), x.sum(1))[:, None] + x

    with pytest.raises(NoEffect, match="block: no way to read it as a linear score"):
        applied(task_of(Net(Apart(nn.Bilinear(WIDTH, WIDTH, WIDTH)))), "experts.route")


def test_rows_of_layers_are_no_experts():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.gate = nn.ModuleList(Expert() for _ in range(COUNT)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            for each in self.rows:
                x = x + each(x)
            return self.gate(x)

    model = Net(Rows()).eval()
    assert mixtures(model, Context(task_of(model), device=CPU)) == ([], {})


# -- what runs twice, and what is alike near zero ----------------------------------------------------------------------
@pytest.mark.parametrize("listed", [False, True])
def test_a_mixture_that_runs_twice_is_opened_and_pruned_once(listed):
    members = [feed_forward(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH)) for _ in range(COUNT)]
    inner = Looped() if listed else mixture(Router(WIDTH, COUNT, 1), experts_of(members))
    task = task_of(Net(inner, times=2))
    model, _ = applied(task, "experts.prune", keep=0.5)
    assert len(model.block.experts.members) == len(model.block.router.weight) == 3
    assert torch.isfinite(outputs(task, model)).all()


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (nn.functional.gelu, "GELU(approximate='none')"),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), "GELU(approximate='tanh')"),
        (nn.functional.relu, "ReLU()"),
        (nn.functional.relu6, "ReLU6()"),
    ],
)
def test_functions_that_are_alike_near_zero_are_told_apart(function, wanted):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, x):
            return self.down(function(self.up(x)))

    torch.manual_seed(0)
    module, x = Plain(), torch.rand(2, 5, WIDTH)
    found = as_feed_forward(module, x, module(x))
    assert found is not None and repr(found.act) == wanted


def test_a_function_in_a_stack_is_told_apart():
    class Stacked(Stack):
        def forward(self, x, indices, weights):
            gate, up = torch.einsum("ehd,nd->enh", self.gate_up, x).chunk(2, -1)
            made = torch.einsum("edh,enh->end", self.down, nn.functional.gelu(gate, approximate="tanh") * up)
            share = (indices[..., None] == torch.arange(len(made))).float() * weights[..., None]
            return torch.einsum("ne,end->nd", share.sum(1), made)

    stack = Stacked(WIDTH, 16, COUNT)
    del stack.act_fn
    made, why = opened(stack, (0.1 * torch.randn(20, WIDTH), torch.randint(0, COUNT, (20, 2)), torch.rand(20, 2)))
    assert made is not None and not why and repr(made.members[0].act) == "GELU(approximate='tanh')"


# -- half precision ----------------------------------------------------------------------------------------------------
class Tokens(nn.Module):
    """Token ids to logits, in any precision."""

    def __init__(self, inner):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(17, WIDTH), inner, nn.Linear(WIDTH, 10)

    def forward(self, x):
        y = self.table(x)
        return self.head((y + self.inner(y)).mean(1))


def tokens_of(inner, kind):
    torch.manual_seed(0)
    splits = {
        name: Arrays(torch.randint(0, 17, (64, 12)), torch.randint(0, 10, (64,))) for name in ("train", "validate")
    }
    return Task(name="tokens", model=Tokens(inner).to(kind).eval(), test=splits["validate"], **splits)


@pytest.mark.parametrize(("kind", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_feed_forwards_of_any_precision_become_experts(kind, bound):
    task = tokens_of(nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)), kind)
    for name in ("experts.split", "experts.copy"):
        model, _ = applied(task, name, experts=4)
        assert {each.dtype for each in model.parameters()} == {kind}
        for router in (module for module in model.modules() if isinstance(module, Router)):
            router.top_k = router.experts  # then both give what was before
        assert relative_difference(outputs(task, task.original), outputs(task, model)) < bound
    noisy, _ = applied(task, "experts.copy", noise=0.1)
    assert {each.dtype for each in noisy.parameters()} == {kind}


@pytest.mark.parametrize(("kind", "bound"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_experts_of_half_precision_are_opened_pruned_and_merged(kind, bound):
    task = tokens_of(Looped(), kind)
    model, _ = applied(task, "experts.route")
    assert relative_difference(outputs(task, task.original), outputs(task, model)) < bound
    for name in ("experts.prune", "experts.merge"):
        made, _ = applied(task, name, keep=0.5)
        assert {each.dtype for each in made.parameters()} == {kind}
        assert {len(each.members) for each in made.modules() if isinstance(each, Experts)} == {3}


# -- padding -----------------------------------------------------------------------------------------------------------
class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        members = [feed_forward(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH)) for _ in range(COUNT)]
        self.table, self.head = nn.Embedding(17, WIDTH), nn.Linear(WIDTH, 10)
        self.inner = mixture(Router(WIDTH, COUNT, 2), experts_of(members))
        nn.init.normal_(self.inner.router.weight)

    def forward(self, input_ids, attention_mask=None):
        y = self.inner(self.table(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.head((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def test_padding_counts_neither_in_the_coverage_nor_in_what_experts_are_worth():
    torch.manual_seed(0)
    model, ids, labels = Masked().eval(), torch.randint(1, 17, (16, 5)), torch.zeros(16, dtype=torch.long)
    longer = nn.functional.pad(ids, (0, 7))  # id 0
    found = []
    for given in (ids, longer):
        rows = {"input_ids": given, "attention_mask": (given > 0).long(), "labels": labels}
        data = [rows]
        task = Task(name="masked", model=model, train=data, calibrate=data, validate=data, test=data)
        ctx = Context(task, device=CPU)
        there, _ = mixtures(model, ctx)
        found.append((coverage(model, task)["inner.experts"], contributions(model, there, ctx)["inner.experts"]))
        added = balanced(lambda *_: torch.zeros(()), 1.0, 1.0)(model, rows, None, ctx)
        found[-1] = (*found[-1], float(added.detach()))
    (plain, worth, loss), (padded, worth_of_padded, loss_of_padded) = found
    assert loss == pytest.approx(loss_of_padded, rel=1e-5)
    assert plain.tokens == padded.tokens == 80
    assert torch.equal(plain.choices, padded.choices) and int(plain.choices.sum()) == 160
    torch.testing.assert_close(worth, worth_of_padded)
