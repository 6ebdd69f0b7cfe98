"""The coder: every array comes back bit by bit, near its entropy, and by whole numbers alone."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from featherweight.core.coding import integers, raw, tables, text
from featherweight.core.coding.arrays import (
    LAYOUTS,
    Coded,
    code_bytes,
    code_floats,
    code_integers,
    decode_bytes,
    decode_floats,
    decode_integers,
)

matrices = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)
spans = st.sampled_from([1, 3, 130, 2**20, 2**60])


def entropy(values: np.ndarray) -> float:
    """Bits of all entries together, coded with their own frequencies."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_integers_come_back(data: st.DataObject) -> None:
    span = data.draw(spans)
    values = data.draw(arrays(np.int64, matrices, elements=st.integers(-span, span)))
    coded = code_integers(values)
    assert coded is not None
    np.testing.assert_array_equal(decode_integers(coded, values.shape), values)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(LAYOUTS)))
def test_any_pattern_of_bits_comes_back(data: st.DataObject, kind: str) -> None:
    layout = LAYOUTS[kind]
    values = data.draw(arrays(np.uint64, matrices, elements=st.integers(0, 2**layout.bits - 1)))
    np.testing.assert_array_equal(decode_floats(code_floats(values, layout), values.shape, layout), values)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(-20, 20))
def test_floats_on_a_grid_come_back(data: st.DataObject, power: int) -> None:
    values = data.draw(arrays(np.int32, matrices, elements=st.integers(-500, 500))).astype(np.float32) * 2.0**power
    patterns = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    coded = code_floats(patterns, LAYOUTS["float32"])
    assert coded.method in ("grid", "floats", "constant")
    np.testing.assert_array_equal(decode_floats(coded, values.shape, LAYOUTS["float32"]), patterns)


@given(st.binary(max_size=500))
def test_bytes_come_back(data: bytes) -> None:
    assert decode_bytes(code_bytes(data), len(data)) == data
    with pytest.raises(ValueError):
        decode_bytes(code_bytes(data), len(data) + 1)


@given(arrays(np.uint64, st.integers(0, 70), elements=st.integers(0, 2**64 - 1)), st.integers(0, 64))
def test_plain_bits_come_back(values: np.ndarray, bits: int) -> None:
    data = raw.put(values, bits)
    assert len(data) == raw.size(len(values), bits)
    wanted = [int(value) % 2**bits for value in values]
    assert [int(value) for value in raw.get(data, len(values), bits)] == wanted


@pytest.mark.parametrize("deviation", [0.3, 1.0, 3.0, 20.0])
def test_what_has_no_structure_takes_its_entropy(deviation: float) -> None:
    values = np.random.default_rng(0).normal(0, deviation, (512, 256)).round().astype(np.int64)
    coded = code_integers(values)
    assert coded is not None
    assert 8 * len(coded.data) < 1.01 * entropy(values) + 64


def test_rows_and_columns_of_their_own_size_take_less_than_the_entropy_of_all() -> None:
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.normal(size=(256, 1)) + generator.normal(size=(1, 256)))
    values = (generator.normal(size=sizes.shape) * sizes).round().astype(np.int64)
    ideal = -np.log2(_mass(values, sizes)).sum()
    coded = code_integers(values)
    assert coded is not None
    assert 8 * len(coded.data) < 0.9 * entropy(values)
    assert 8 * len(coded.data) < 1.15 * ideal


def _mass(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The probability of each integer, where the deviations are known."""
    edges = [torch.from_numpy((values + side) / sizes / math.sqrt(2)) for side in (-0.5, 0.5)]
    return ((torch.erf(edges[1]) - torch.erf(edges[0])) / 2).clamp_min(2.0**-40).numpy()


def test_tables_have_the_mean_of_their_class() -> None:
    magnitudes = np.abs(np.arange(-127, 128))
    for place in range(50):
        table = tables.prior(place, 127)
        assert (table * magnitudes).sum() / table.sum() == pytest.approx(2 ** ((place - 32) / 4), rel=0.01)


def test_the_bounds_of_levels_are_powers_of_two() -> None:
    wanted = [round(2 ** ((level + 0.5) / 8 + tables.POINT)) for level in range(-tables.LEVELS, tables.LEVELS)]
    np.testing.assert_allclose(tables.bounds(), wanted, atol=1)
    assert tables.level(np.array([2**tables.POINT]))[0] == 0


def test_frequencies_add_up_and_leave_nothing_out() -> None:
    given = np.random.default_rng(0).integers(0, 2**40, (5, 255))
    given[0, 1:] = 0
    found = tables.frequencies(given)
    assert (found.sum(1) == tables.TOTAL).all() and found.min() >= 1


def test_the_stream_of_before_is_still_read() -> None:
    """The bytes of a fixed matrix: who changes the coder must change the format's number."""
    values = (np.arange(200).reshape(10, 20) * 37 % 11 - 5).astype(np.int64)
    found = integers.encode(values, integers.Settings.fit(values))
    assert found.hex() == STREAM


STREAM = (
    "44649a0bb9661211997234248e9f90453173536cd86cb8dc3cb16d325d3312b32cd4289fc6a3ce7cae525783c05c7e9f7e75"
    "68b94c0f87663e43821e7563dbdd84d83ebe2245ad5a56f94cf6bbe23eb1fc72666ba09651409697a139"
)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.tuples(*[st.integers(-3, 130)] * 9), st.sampled_from(["floats", "grid", "integers"]))
def test_any_bytes_give_an_array_or_a_value_error(data: bytes, numbers: tuple[int, ...], method: str) -> None:
    count = {"floats": 9, "grid": 8, "integers": 7}[method]
    coded = Coded(method, numbers[:count], data)
    try:
        if method == "integers":
            found = decode_integers(coded, (5, 7))
        else:
            found = decode_floats(coded, (5, 7), LAYOUTS["float32"])
    except ValueError:
        return
    assert found.shape == (5, 7)


@given(st.binary(max_size=3000), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_text_comes_back_whole_and_nothing_else_does(data: bytes, repeats: int) -> None:
    given = data * (1 + repeats)
    packed = text.pack(given)
    assert text.unpack(packed, len(given)) == given
    for wrong in (packed[1:], b"\x07" + packed[1:], packed[:-1] + bytes([packed[-1] ^ 1])):
        with contextlib.suppress(ValueError):  # and nothing else
            text.unpack(wrong, len(given))
    for size in (len(given) - 1, len(given) + 1):
        with pytest.raises(ValueError, match="another length"):
            text.unpack(packed, size)


def test_the_words_of_headers_never_change() -> None:
    """A file that was packed with them can only be read with them."""
    digest = "36f98b87ef68cec825524eb641eb0a1df9f4ba5b0a27c06ad6e7f7c1f583d844"
    assert hashlib.sha256(text.words()).hexdigest() == digest
    usual = text.words()[-600:]
    assert len(text.pack(usual)) < 30 < len(zlib.compress(usual, 9))
