"""quantize.trellis: the code, the rotations, the feedback between columns, and the step on small tasks."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import Arrays, Task, accuracy, conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import TaskError
from featherweight.core.evaluate import torch_figure
from featherweight.core.soft import encodings, fold
from featherweight.core.step import step
from featherweight.core.task import find_task
from featherweight.core.trellis import Trellis, code, hadamard, rotate, turn, unturn, windows
from featherweight.methods.quantize.allocation import DISTORTION, allocate
from featherweight.methods.quantize.fisher import loss_hessians
from featherweight.methods.quantize.incoherent import encode, layout, rotated
from featherweight.methods.quantize.viterbi import tail_biting
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")
sizes = st.sampled_from([(64, 16), (16, 24), (12, 10), (3, 43), (1, 30), (130, 7)])


def distortion(bits: int, window: int, count: int, steps: int) -> float:
    source = torch.randn(steps, count // steps, generator=torch.Generator().manual_seed(1))
    table = code(torch.arange(2**window), window) * (1 - 4.0**-bits) ** 0.5
    found = table[windows(tail_biting(source, table, bits).mT, bits, window)].mT
    return float((source - found).square().mean())


def test_distortion_on_a_gaussian_source_is_below_that_of_any_scalar():
    assert distortion(2, 10, 2**12, 128) < 0.08 < 0.1175  # the last: Lloyd-Max


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(2, 0.075), (3, 0.0200), (4, 0.0053)])
def test_distortion_on_a_gaussian_source_is_near_the_bound(bits, most):
    assert 4.0**-bits < distortion(bits, 12, 2**16, 256) <= most


@pytest.mark.parametrize("window", [6, 10, 12, 16])
def test_the_code_gives_each_state_an_own_sample_of_the_gaussian(window):
    values = code(torch.arange(2**window), window).double()
    assert len(values.unique()) == len(values)
    assert abs(float(values.mean())) < 1e-4
    assert float(values.square().mean()) == pytest.approx(1, abs=0.1 if window == 6 else 0.03)


@given(st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_rotation_is_orthonormal_and_undone(size, seed):
    sign = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    matrix = rotate(torch.eye(size, dtype=torch.float64), sign)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    assert torch.allclose(rotate(matrix, sign, back=True), torch.eye(size, dtype=torch.float64))


@given(st.floats(2**-4, 2**3.5), st.booleans())
def test_signs_and_magnitudes_take_five_bits(magnitude, positive):
    turns = turn(torch.tensor([positive]), torch.tensor([magnitude]))
    sign, found = unturn(turns)
    assert int(turns) < 32 and float(sign) == (1 if positive else -1)
    assert 2**-0.251 <= float(found) / magnitude <= 2**0.251


def test_rows_that_matter_more_are_coded_finer():
    generator = torch.Generator().manual_seed(0)
    weight, outputs = torch.randn(64, 32, generator=generator), torch.ones(64)
    outputs[:8] = 1000.0
    plain, minded = (rotated(weight, torch.eye(32)[None], 0.01, generator, each) for each in (None, outputs))
    errors = [
        ((weight - encode([each], 2, 8)[0][0].decode()).square().mean(1) * outputs).sum() for each in (plain, minded)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_the_hadamard_transform_is_its_matrix():
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rows = torch.randn(3, 2, 16)
    assert torch.allclose(hadamard(rows), rows @ matrix / 4, atol=1e-6)


def made(size: tuple[int, int], bits: int, turned: bool, seed: int, groups: int = 1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator) * 0.1
    given = torch.randn(groups, 300, size[1], generator=generator) @ torch.randn(size[1], size[1], generator=generator)
    hessian = given.mT @ given / 300
    found = rotated(weight, hessian, 0.01, generator if turned else None)
    return weight, hessian, encode([found], bits, 8)[0]


@settings(max_examples=12, deadline=None)
@given(sizes, st.sampled_from([1, 2, 3, 4]), st.booleans(), st.integers(0, 2**31))
def test_what_lies_on_the_disk_restores_the_weight(size, bits, turned, seed):
    weight, hessian, (encoding, lost) = made(size, bits, turned, seed)
    parts = encoding.parts()
    assert torch.equal(encoding.restore(parts), encoding.decode())
    assert encoding.shape == size == tuple(encoding.decode().shape)
    stored = size[0] * size[1] * bits / 8 + 2 + (sum(size) * 5 / 8 if turned else 0)
    assert stored <= encoding.bits_per_weight() * size[0] * size[1] / 8 <= stored + bits + 5
    error, moment = (weight - encoding.decode()).double(), hessian[0].double()
    moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
    rows = torch.ones(size[0]) if encoding.left is None else unturn(encoding.left)[1]
    error, whole = (each.double() / rows[:, None].double() for each in (error, weight))
    wanted = ((error @ moment) * error).sum() / ((whole @ moment) * whole).sum()
    assert lost == pytest.approx(float(wanted), rel=1e-3)


def test_feedback_between_columns_loses_less_than_none():
    weight, hessian, (_, lost) = made((64, 16), 2, True, 0)
    ((plain, _),) = encode([rotated(weight, torch.eye(16)[None])], 2, 8)
    error = weight - plain.decode()
    without = ((error @ hessian[0]) * error).sum() / ((weight @ hessian[0]) * weight).sum()
    assert lost < 0.8 * float(without)


def test_groups_of_rows_have_hessians_of_their_own():
    weight, _, (encoding, lost) = made((64, 9), 3, False, 0, groups=16)
    assert encoding.symbols.numel() == weight.numel() and lost < 0.05


def test_more_bits_lose_less():
    lost = [made((64, 8), bits, True, 3)[2][1] for bits in (1, 2, 3, 4)]
    assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(lost))


def test_how_columns_are_taken():
    assert layout(4096, 100, 2, 12) == (1, 128)
    assert layout(172, 64, 2, 12) == (1, 172)
    assert layout(1009, 3, 2, 12) == (1, 1009)
    assert layout(16, 9, 2, 12) == (9, 144)
    assert layout(16, 9, 4, 8) == (3, 48)
    assert layout(1, 5, 2, 12) is None


def test_a_hessian_that_is_singular_or_worse_is_named():
    weight = torch.randn(64, 8)
    partly = torch.stack([torch.eye(8), torch.zeros(8, 8)])
    assert rotated(weight, partly) is not None  # inputs of one group that are always zero
    assert rotated(weight, torch.ones(1, 8, 8)) is not None  # damping helps
    assert rotated(weight, torch.zeros(1, 8, 8)) is None


def test_layers_side_by_side_are_coded_as_each_alone():
    generator = torch.Generator().manual_seed(5)
    problems = []
    for scale in (0.01, 1.0, 30.0):
        given = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
        weight = torch.randn(20, 12, generator=generator) * scale
        problems.append(rotated(weight, (given.mT @ given)[None], 0.01, generator))
    together = encode(problems, 3, 8)
    for problem, (encoding, lost) in zip(problems, together):
        ((alone, lost_alone),) = encode([problem], 3, 8)
        assert torch.equal(encoding.symbols, alone.symbols) and torch.equal(encoding.scale, alone.scale)
        assert lost == pytest.approx(lost_alone, rel=1e-9)


@pytest.mark.parametrize("task", [conv_task, transformer_task], ids=["conv", "transformer"])
def test_four_bits_cost_little_and_are_stored(task):
    task = task()
    model, record = run_step(
        step("quantize.trellis", bits=4, window=8, passes=2, rounds=0), task.fresh(), Context(task, device=CPU)
    )
    assert accuracy(task, model) >= accuracy(task, task.original) - 0.05
    stored = encodings(model)
    assert {f"{name}.weight" for name in record.changed} == set(stored)
    assert all(isinstance(encoding, Trellis) and encoding.form == "trellis4" for encoding in stored.values())
    assert all(parameter.numel() for name, parameter in fold(model).named_parameters())
    kept = sum(parameter.numel() for parameter in model.parameters())
    assert kept < 0.2 * sum(parameter.numel() for parameter in task.original.parameters())  # the floats are dropped


def test_scales_can_be_trained_and_all_survives_saving(tmp_path):
    task = transformer_task()
    ctx = Context(task, device=CPU)
    model, _ = run_step(step("quantize.trellis", bits=2, window=6, passes=1, rounds=0), task.fresh(), ctx)
    trained, _ = run_step(step("finetune", epochs=2, lr=1e-3), model, ctx)
    scales = [parameter for name, parameter in trained.named_parameters() if name.endswith(".scale")]
    assert scales and all(parameter.requires_grad for parameter in scales)
    save(trained, tmp_path / "model")
    found = load(tmp_path / "model", like=task.original)
    with torch.no_grad():
        assert torch.equal(found(**task.example), trained(**task.example))
        assert torch.equal(fold(trained)(**task.example), trained(**task.example))
    for name, encoding in encodings(found).items():
        prefix, _, last = name.rpartition(".")
        assert torch.equal(getattr(found.get_submodule(prefix), last), encoding.decode())


def test_inputs_that_the_loss_does_not_see_have_no_weight():
    task = transformer_task()
    ctx = Context(task, device=CPU)
    found = loss_hessians(task.original, ["wide", "head"], ctx)
    seen: dict[str, list[torch.Tensor]] = {}
    total, outputs = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(48, dtype=torch.float64)
    for batch in task.batches("calibrate"):
        handle = task.original.wide.register_forward_hook(lambda _m, given, out: seen.update(call=[given[0], out]))
        loss = task.loss(task.call(task.original, batch), batch)
        handle.remove()
        rows, output = (value.flatten(0, 1) if place == 0 else value for place, value in enumerate(seen["call"]))
        (gradient,) = torch.autograd.grad(loss, [output])
        weights = gradient.flatten(0, 1).double().square().sum(1)
        total += (rows.detach().double() * weights[:, None]).mT @ rows.detach().double()
        outputs += gradient.flatten(0, 1).double().square().sum(0)
    assert torch.allclose(found["wide"][0][0].double(), total, rtol=1e-4, atol=1e-4 * float(total.abs().max()))
    assert torch.allclose(found["wide"][1].double(), outputs, rtol=1e-4)


def test_a_layer_that_the_loss_does_not_reach_is_an_error():
    class Detached(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.aside = inner, nn.Linear(8, 4)

        def forward(self, x):
            self.aside(x)
            return self.inner(x)

    task = transformer_task()
    with pytest.raises(TaskError, match="the loss does not depend on the layer 'aside'"):
        loss_hessians(Detached(task.original), ["aside"], Context(task, device=CPU))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50)), min_size=1, max_size=4), st.floats(1, 6))
def test_bits_are_allocated_with_the_least_loss(layers, bits):
    costs = {str(place): cost for place, (cost, _) in enumerate(layers)}
    counts = {str(place): count for place, (_, count) in enumerate(layers)}
    found = allocate(costs, counts, bits)
    spent = sum(found[name] * counts[name] for name in costs)

    def loss(chosen):
        return sum(costs[name] * DISTORTION[given] for name, given in zip(costs, chosen))

    every = itertools.product(DISTORTION, repeat=len(layers))
    most = bits * sum(counts.values()) + 1e-6
    as_cheap = [chosen for chosen in every if sum(map(math.prod, zip(chosen, counts.values()))) <= most]
    assert spent <= most
    assert loss(found.values()) == pytest.approx(min(map(loss, as_cheap)), rel=1e-9)


def test_distortions_are_the_figures_of_the_ledger():
    ledger = max((Path(__file__).parents[2] / "benchmarks" / "ledger").glob("gaussian-*.json"))
    rows = {row["code"]: row["distortion"] for row in json.loads(ledger.read_text())["rows"]}
    measured = rows["trellis, window 12, ours (default)"]
    assert {str(bits): value for bits, value in DISTORTION.items()} == pytest.approx(measured, abs=5e-6)


def test_bits_of_many_layers_spend_the_whole_budget():
    generator = torch.Generator().manual_seed(3)
    costs = {str(place): float(value) for place, value in enumerate(torch.rand(100, generator=generator))}
    counts = {name: int(torch.randint(10**5, 10**7, (), generator=generator)) for name in costs}
    found = allocate(costs, counts, 2.5)
    spent = sum(found[name] * count for name, count in counts.items()) / sum(counts.values())
    assert 2.498 < spent <= 2.5


def test_half_bits_are_spent_where_they_matter():
    task = transformer_task()
    model, _ = run_step(
        step("quantize.trellis", bits=2.5, window=6, passes=1, rounds=0), task.fresh(), Context(task, device=CPU)
    )
    stored = encodings(model)
    weights = sum(math.prod(encoding.shape) for encoding in stored.values())
    mean = sum(encoding.bits * math.prod(encoding.shape) for encoding in stored.values()) / weights
    assert 2.3 < mean <= 2.5 and len({encoding.bits for encoding in stored.values()}) > 1


def test_embeddings_that_the_head_shares_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.inner(self.embed(x)).mean(1))

    split = Arrays(torch.randint(0, 10, (32, 4)), torch.randint(0, 10, (32,)))
    task = Task(name="tied", model=Tied(), train=split, validate=split, test=split)
    model, record = run_step(step("quantize.trellis", window=6), task.fresh(), Context(task, device=CPU))
    assert set(encodings(model)) == {"inner.weight"}
    reason = next(left.reason for left in record.left if left.layer == "head")
    assert reason.startswith("shares its weight with embed")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most", "perplexity"), [(3.4, 3.56, 4.9), (2.4, 2.54, 12.0)])
def test_a_language_model_of_few_bits_beats_the_peer(bits, most, perplexity):
    task = find_task("zoo:stories260k")
    model, _ = run_step(step("quantize.trellis", bits=bits), task.fresh(), Context(task, device=CPU))
    stored = encodings(model).values()
    weights = sum(math.prod(encoding.shape) for encoding in stored)
    assert sum(encoding.bits_per_weight() * math.prod(encoding.shape) for encoding in stored) / weights < most
    assert weights == 226_560 and torch_figure(task, model) < perplexity
