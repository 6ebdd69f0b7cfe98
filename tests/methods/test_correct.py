"""Bias correction and learned rounding: means against a slow reference, graphs run in parts, what they repair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread, transformer_task  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.methods.quantize.correct import ChannelMean, corrected
from featherweight.methods.quantize.placement import weight_name
from featherweight.methods.quantize.segments import by_block, by_layer
from featherweight.model.flow import Flow
from featherweight.model.graph import captured

CPU = torch.device("cpu")


def _run(task, **settings):
    return run_step(step("quantize.static", **settings), task.fresh(), Context(task, device=CPU))


# -- the mathematics ---------------------------------------------------------------------------------------------------
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([1, -1]))
def test_the_corrected_bias_moves_the_mean_of_each_channel(seed, parts, axis):
    generator = torch.Generator().manual_seed(seed)
    wanted, got, bias = (torch.randn(*shape, generator=generator) for shape in ((12, 3, 3), (12, 3, 3), (3,)))
    means = ChannelMean(axis), ChannelMean(axis)
    for mean, values in zip(means, (wanted, got)):
        for part in values.chunk(parts):
            mean.add(part)
    for channel, entry in enumerate(corrected(bias, *means).tolist()):
        want, have = (values.select(axis, channel).double().flatten().tolist() for values in (wanted, got))
        reference = float(bias[channel]) + sum(want) / len(want) - sum(have) / len(have)
        assert entry == pytest.approx(reference, abs=1e-5)


# -- graphs in parts ---------------------------------------------------------------------------------------------------
class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale):
        x = torch.relu(self.stem(x)) * scale.relu()[:, None, None, None]
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        return self.head(self.last(x).mean((2, 3)))


def _graph():
    given_ = {"x": torch.randn(6, 4, 5, 5), "scale": torch.rand(6)}
    free = {name: {0: "batch"} for name in given_}
    module = captured(Blocks().eval(), given_, free)
    layers = {name: node for node in module.graph.nodes if (name := weight_name(node))}
    return module, layers, given_


def test_blocks_end_where_one_value_carries_all():
    module, layers, _ = _graph()
    names = [tuple(name.partition(".")[0] for name in part.weights) for part in by_block(module.graph, layers)]
    assert names == [("stem",), ("one", "two"), ("last",), ("head",)]
    parts = by_layer(module.graph, layers)
    assert [part.weights for part in parts] == [(name,) for name in layers]
    assert [len(part.nodes) for part in parts] == [2, 2, 1, 1, 1]


@pytest.mark.parametrize("limit", [2**20, 0])
def test_a_graph_run_in_parts_gives_what_it_gives_at_once(limit):
    module, layers, given_ = _graph()
    batches = [tuple(value[place : place + 2] for value in given_.values()) for place in (0, 2, 4)]
    flow = Flow(module, batches, limit=limit)
    with torch.no_grad():
        for part in by_block(module.graph, layers):
            flow.advance(part.start)
            for values in flow:
                assert set(part.given()) <= set(values)
        flow.advance(len(flow.nodes))
        output = module.graph.output_node().args[0][0]
        made = torch.cat([values[output] for values in _at_end(module, batches, limit)])
        assert torch.allclose(made, module(**given_), atol=1e-6)


def _at_end(module, batches, limit):
    flow = Flow(module, batches, limit=limit)
    flow.advance(len(flow.nodes) - 1)
    return flow


# -- what they repair --------------------------------------------------------------------------------------------------
def _error(task, model):
    x = task.test.tensors[0][:128]
    with torch.no_grad():
        return float((model(x) - task.original(x)).norm() / task.original(x).norm())


@pytest.mark.parametrize("make", [conv_task, transformer_task])
@pytest.mark.parametrize("rounding", ["adaptive", "block"])
def test_learned_rounding_is_nearer_to_the_original(make, rounding):
    task = make()
    nearest, _ = _run(task, bits=3, weights="mse", bias_correction=False)
    learned, record = _run(task, bits=3, weights="mse", bias_correction=False, rounding=rounding, iterations=100)
    assert _error(task, learned) < 0.85 * _error(task, nearest)
    assert all("rounding learned" in how for layer, how in record.changed.items() if "3" in how.split()[0])
    for name, encoding in encodings(learned).items():
        assert torch.equal(encoding.decode(), dict(_values(learned))[name])


def _values(model):
    from featherweight.core.soft import chains

    return ((name, getattr(module, attribute).detach()) for name, module, attribute, _ in chains(model))


def test_corrected_biases_repair_the_means():
    task = conv_task()
    plain, corrected_ = (_run(task, bits=3, bias_correction=given_)[0] for given_ in (False, True))
    x = torch.cat([images for images, _ in task.batches("calibrate")])
    with torch.no_grad():
        want = task.original(x).mean(0)
        moved, repaired = (float((model(x).mean(0) - want).abs().mean()) for model in (plain, corrected_))
    assert repaired < 1e-4 + 0.05 * moved


def test_same_seed_same_rounding():
    task = conv_task()
    one, other = (_run(task, bits=4, rounding="adaptive", iterations=5)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("bits", [4, 8])
def test_biases_are_what_integer_kernels_add(bits):
    model, _ = _run(conv_task(), bits=bits, activation_bits=bits)
    for node in model.graph.nodes:
        if name := weight_name(node):
            layer, port = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(str(node.args[0].target))
            steps = layer.bias / (port.scale * layer.parametrizations["weight"][-1].scale)
            assert torch.allclose(steps, steps.round(), atol=1e-2 if bits == 8 else 1e-3, rtol=1e-6)
