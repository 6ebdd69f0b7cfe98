"""The coded checkpoint: a model comes back with equal outputs; whatever is wrong with a file is one clear error."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import featherweight as fw
from featherweight.core.encoding import Affine, Codebook
from featherweight.core.errors import ArtifactError
from featherweight.core.soft import Mask
from featherweight.model.coded import Reader
from featherweight.model.encoded import hold, lean
from featherweight.model.rounding import Rounding


def small() -> nn.Sequential:
    """A network with weights of every kind of storage, tied and plain tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 24),
        nn.Linear(24, 24),
        nn.Linear(24, 4),
    )
    rows = model[4].weight.detach().abs().amax(1) / 7
    parametrize.register_parametrization(model[4], "weight", Rounding(rows, axis=0, bits=4))
    keep = torch.rand(24, 24) > 0.7
    parametrize.register_parametrization(model[5], "weight", Mask(keep))
    hold(
        model[6],
        "weight",
        Codebook(torch.randint(0, 8, (4, 24)).byte(), torch.randn(8).half(), torch.ones(4).half(), 0),
    )
    model[0].weight.data = model[0].weight.data.half().float()
    return model.eval()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return fw.pack(small(), tmp_path_factory.mktemp("packed") / "model.fwc").read_bytes()


def test_the_model_comes_back_with_equal_outputs(tmp_path: Path) -> None:
    model, inputs = small(), torch.randn(2, 3, 5, 5)
    file = fw.pack(model, tmp_path / "model.fwc")
    made = fw.load(fw.unpack(file, tmp_path / "saved"))
    assert torch.equal(made(inputs), model(inputs))
    assert isinstance(made[6].parametrizations.weight[0].encode(None), Codebook)
    saved = fw.pack(tmp_path / "saved", tmp_path / "again.fwc")
    assert saved.read_bytes() == file.read_bytes()


def test_soft_weights_are_stored_as_their_encodings_alone(tmp_path: Path) -> None:
    model = small()
    made = lean(model)
    assert torch.equal(made[4].weight, model[4].weight) and torch.equal(made[5].weight, model[5].weight)
    assert isinstance(made[4].parametrizations.weight[0].encode(None), Affine)
    stored = dict(Reader(fw.pack(model, tmp_path / "model.fwc")).tensors())
    assert stored["4.parametrizations.weight.original"].numel() == 0
    assert stored["4.parametrizations.weight.0.values"].dtype == torch.int8


def test_a_module_that_nobody_asked_to_change_is_left_alone() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lean(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (5, 3, 2)])
def test_tensors_of_every_type_and_shape_come_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.register_buffer("held", (torch.randn(shape) * 50).to(dtype))
    made = fw.load(fw.unpack(fw.pack(module, tmp_path / "file"), tmp_path / "saved"))
    assert made.held.dtype == dtype and torch.equal(made.held, module.held)


def test_a_file_that_is_cut_short_names_the_tensor(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fwc"
    path.write_bytes(packed[:-1])
    with pytest.raises(ArtifactError, match=r"cut short: the tensor '6.parametrizations.weight.0.table' is not whole"):
        fw.unpack(path, tmp_path / "out")
    path.write_bytes(packed + b"x")
    with pytest.raises(ArtifactError, match="1 bytes follow the last tensor"):
        fw.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_tensor_is_named(packed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.fwc"
    path.write_bytes(packed)
    reader = Reader(path)
    names, place = list(reader.page.own()), reader.start
    for name, record in zip(names, reader.header.records):
        for at in (place, place + record.room - 1) if record.room else ():
            data = bytearray(packed)
            data[at] ^= 64
            path.write_bytes(bytes(data))
            with pytest.raises(ArtifactError, match=rf"the tensor '{name}' was altered"):
                dict(Reader(path).tensors())
        place += record.room
    assert place == len(packed)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_give_a_clear_error_or_the_right_answer(packed: bytes, tmp_path: Path, count: int) -> None:
    path, generator = tmp_path / "model.fwc", np.random.default_rng(0)
    path.write_bytes(packed)
    wanted = dict(Reader(path).tensors())
    tracemalloc.start()
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(packed, generator))
        try:
            found = dict(Reader(path).tensors())
        except ArtifactError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 0.9 * count
    assert peak < 2**26


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes with one thing done to them: some changed, cut off, removed, repeated or put in."""
    found, (start, end) = bytearray(data), sorted(generator.integers(0, len(data), 2).tolist())
    kind = generator.integers(0, 6)
    if kind == 0:
        found[start] ^= 1 << int(generator.integers(0, 8))
    elif kind == 1:
        for place in generator.integers(0, len(data), 20).tolist():
            found[place] = int(generator.integers(0, 256))
    elif kind == 2:
        del found[end:]
    elif kind == 3:
        del found[start : start + int(generator.integers(1, 64))]
    elif kind == 4:
        found[start:start] = generator.bytes(int(generator.integers(1, 64)))
    else:
        found[start : start + 32] = found[end : end + 32]
    return bytes(found)


def test_a_hostile_header_is_refused_before_any_room_is_made(packed: bytes, tmp_path: Path) -> None:
    """A header with a right digest may still lie: shapes, settings and lengths are not believed."""
    path = tmp_path / "model.fwc"
    path.write_bytes(packed)
    for change, message in HOSTILE.items():
        reader = Reader(path)
        rewritten = tmp_path / "hostile.fwc"
        rewritten.write_bytes(with_header(packed, reader, change))
        tracemalloc.start()
        with pytest.raises(ArtifactError, match=message) as caught:
            dict(Reader(rewritten).tensors())
        assert tracemalloc.get_traced_memory()[1] < 2**26
        tracemalloc.stop()
        assert "\n" not in str(caught.value)


HOSTILE = {
    "large": "'0.weight' was altered .it asks for more memory",
    "negative": "'0.weight' was altered .it has no form",
    "type": "'0.weight' was altered .it has no form",
    "settings": "'0.weight' was altered",
    "method": "'0.weight' was altered",
    "length": "cut short: the tensor '0.weight' is not whole",
    "records": r"names \d+ tensors and holds",
}


def with_header(packed: bytes, reader: Reader, change: str) -> bytes:
    """The file with its header changed, and its digest made right."""
    import hashlib
    import json

    from featherweight.core.coding.text import pack
    from featherweight.model.coded import DIGEST, LENGTHS, MAGIC

    content = reader.header.model_dump(mode="json")
    entry, record = content["page"]["tensors"]["0.weight"], content["records"][0]
    if change == "large":
        entry["shape"] = [2**40, 2**10]
    elif change == "negative":
        entry["shape"] = [-1, 8]
    elif change == "type":
        entry["dtype"] = "nn"
    elif change == "settings":
        record[2] = [2**70] * len(record[2])
    elif change == "method":
        record[0] = "pickle"
    elif change == "length":
        record[1] = 2**40
    else:
        content["records"].pop()
    text = json.dumps(content).encode()
    data = pack(text)
    head = MAGIC + LENGTHS.pack(len(data), len(text)) + hashlib.sha256(data).digest()[:DIGEST]
    return head + data + packed[reader.start :]


def test_a_tensor_that_takes_no_bytes_is_held_by_the_digest_of_the_header(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("held", torch.full((3, 5), 7))
    path = fw.pack(module, tmp_path / "file")
    reader = Reader(path)
    assert reader.header.records[0].room == 0 and path.stat().st_size == reader.start
    assert torch.equal(dict(reader.tensors())["held"], module.held)


def test_every_encoding_is_known_in_a_process_that_only_loads() -> None:
    """What a method made must be readable where no method was imported."""
    import subprocess
    import sys

    core = Path(fw.__file__).parent / "core"
    defined = {file.stem for file in core.glob("*.py") if "(Encoding):" in file.read_text(encoding="utf-8")}
    code = "import sys, featherweight.model.coded; print(*[name for name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {f"featherweight.core.{name}" for name in defined} <= set(done.stdout.split())
