"""The Viterbi search against every path there is, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import one_thread  # noqa: F401

from featherweight.core.trellis import code, windows
from featherweight.methods.quantize.viterbi import tail_biting, viterbi


def all_circular(table, bits, window, steps):
    """Every circular path: its symbols and its values, [paths, steps], written from the definition of a window."""
    symbols = torch.tensor(list(itertools.product(range(2**bits), repeat=steps)))
    states = torch.zeros_like(symbols)
    for step in range(steps):
        stream = 0
        for back in range(window):  # one bit of the window after the other, from the newest symbol's lowest
            place, bit = divmod(back, bits)
            stream = stream + ((symbols[:, (step - place) % steps] >> bit & 1) << back)
        states[:, step] = stream
    return symbols, table[states]


def costs(values, target, weight):
    return (weight * (target - values).square()).sum(-1)


small = st.sampled_from([(1, 3, 7), (1, 4, 6), (2, 3, 4), (2, 4, 5), (3, 4, 3)])


@settings(max_examples=25, deadline=None)
@given(small, st.integers(0, 2**31))
def test_the_open_path_is_the_best_of_all(size, seed):
    bits, window, steps = size
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2**window, generator=generator, dtype=torch.float64)
    target = torch.randn(steps, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(steps, 3, generator=generator, dtype=torch.float64)
    found = viterbi(target, table, bits, weight)
    assert torch.equal(found[1:] >> bits, found[:-1] % 2 ** (window - bits))  # a path: windows overlap
    for sequence in range(3):
        best = torch.inf
        for start in range(2**window):
            values = [[table[start]]]
            states = torch.tensor([start])
            values = table[states][:, None]
            for _ in range(1, steps):
                states = ((states[:, None] << bits) % 2**window + torch.arange(2**bits)).flatten()
                values = torch.cat([values.repeat_interleave(2**bits, 0), table[states][:, None]], 1)
            best = min(best, float(costs(values, target[:, sequence], weight[:, sequence]).min()))
        got = float(costs(table[found[:, sequence]], target[:, sequence], weight[:, sequence]))
        assert got == pytest.approx(best, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(small, st.integers(0, 2**31))
def test_with_the_joint_given_the_circular_path_is_the_best_of_all(size, seed):
    bits, window, steps = size
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2**window, generator=generator, dtype=torch.float64)
    target = torch.randn(steps, 1, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(target)
    symbols, values = all_circular(table, bits, window, steps)
    errors = costs(values, target[:, 0], ones[:, 0])
    joints = torch.arange(2 ** (window - bits))
    many = target.expand(-1, len(joints)).contiguous()
    paths = viterbi(many, table, bits, None, joints)
    best = costs(table[paths.mT], target[:, 0], ones[:, 0]).min()
    assert float(best) == pytest.approx(float(errors.min()), rel=1e-12)
    found = tail_biting(target, table, bits).mT
    circular = table[windows(found, bits, window)]
    place = int((symbols == found).all(1).nonzero())
    assert float(costs(circular, target[:, 0], ones[:, 0])) == pytest.approx(float(errors[place]), rel=1e-12)
    assert float(errors[place]) >= float(errors.min()) - 1e-12


def test_circular_paths_lose_little_to_open_ones():
    generator = torch.Generator().manual_seed(0)
    table, target = code(torch.arange(256), 8) * 0.97, torch.randn(64, 32, generator=generator)
    lost = (target - table[viterbi(target, table, 2)]).square().mean()
    circular = (target - table[windows(tail_biting(target, table, 2).mT, 2, 8)].mT).square().mean()
    assert lost <= circular < 1.15 * lost  # an open path has the bits before its first symbol for nothing


def test_chunks_change_nothing(monkeypatch):
    target, weight = torch.randn(12, 9), torch.rand(12, 9)
    table = code(torch.arange(64), 6)
    whole = tail_biting(target, table, 2, weight)
    monkeypatch.setattr("featherweight.methods.quantize.viterbi.HELD", 64 * 12 * 2)
    assert torch.equal(tail_biting(target, table, 2, weight), whole)


def test_a_sequence_shorter_than_the_window_is_refused():
    with pytest.raises(ValueError, match="3 steps of 2 bits are shorter than a window of 8 bits"):
        tail_biting(torch.zeros(3, 1), code(torch.arange(256), 8), 2)
