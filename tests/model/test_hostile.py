"""Coded checkpoints whose digests are right and whose headers lie: one clear line, and none of their code is run."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from featherweight.core.coding.text import pack
from featherweight.core.encoding import Codebook
from featherweight.core.errors import ArtifactError
from featherweight.core.soft import encodings, fold
from featherweight.core.target import target
from featherweight.model.coded import DIGEST, HEADER_RATIO, HEADER_ROOM, LENGTHS, MAGIC, Reader
from featherweight.model.encoded import hold

Change = Callable[[dict[str, Any]], None]
ODD = [
    0, -1, 2**31, 2**40, 2**63, 2**64, -(2**64), 1.5, "", "nn", "qint8", "complex64", "int64", "float8_e4m3fn",
    "constant", "bytes", "grid", None, True, [], {}, [1] * 2000, [0, 2**63], [2**40, 0], "0.weight", "a.b.c",
]  # fmt: skip


class File(NamedTuple):
    data: bytes
    start: int
    header: dict[str, Any]

    def write(self, path: Path, header: dict[str, Any]) -> Path:
        """The file with another header and its digest made right."""
        text = json.dumps(header).encode()
        data = pack(text)
        head = MAGIC + LENGTHS.pack(len(data), len(text)) + hashlib.sha256(data).digest()[:DIGEST]
        path.write_bytes(head + data + self.data[self.start :])
        return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> File:
    """What the target writes of a small network with one weight in a table."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).eval()
    hold(model[4], "weight", Codebook(torch.randint(0, 8, (4, 36)).byte(), torch.randn(8), torch.ones(4), 0))
    path = tmp_path_factory.mktemp("made") / "model.fwc"
    target("coded").write(path=path, plain=fold(model), stored=encodings(model), example=EXAMPLE, free=FREE)
    reader = Reader(path)
    return File(path.read_bytes(), reader.start, reader.header.model_dump(mode="json"))


EXAMPLE, FREE = {"input": torch.zeros(2, 3, 5, 5)}, {"input": {0: "batch"}}


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, each in inner for place in places(each, (*above, key)))]


def mutated(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The header with up to three values replaced, taken out, or put where others were."""
    made = copy.deepcopy(header)
    for _ in range(chance.choice([1, 1, 2, 3])):
        found = [place for place in places(made) if place]
        *above, last = chance.choice(found)
        holder: Any = made
        for key in above:
            holder = holder[key]
        if chance.random() < 0.85:
            holder[last] = copy.deepcopy(chance.choice(ODD))  # one list in two places could hold itself
        else:
            del holder[last]
    return made


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_header_gives_a_model_or_one_clear_line(artifact: File, tmp_path: Path, count: int) -> None:
    chance, refused, coder = random.Random(0), 0, target("coded")
    for _ in range(count):
        path = artifact.write(tmp_path / "model.fwc", mutated(artifact.header, chance))
        for work in (coder.load, coder.stored, coder.evidence):
            try:
                work(path)
            except ArtifactError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > count


def graph_of(header: dict[str, Any]) -> dict[str, Any]:
    return header["page"]["parts"][""]["settings"]["graph"]


def node_of(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node["op"] == op)


def added(graph: dict[str, Any], op: str, name: str, *args: Any) -> None:
    graph["nodes"].insert(-1, {"name": "more", "op": op, "target": name, "args": list(args), "kwargs": {"map": {}}})


def attacks(flag: Path) -> dict[str, Change]:
    """Changes of a graph that would leave a file at `flag` where they were believed."""
    code = f"__import__('pathlib').Path('{flag}').touch()"
    return {
        "argument": lambda graph: graph.update(arguments=[f"input=({code})"]),
        "keyword": lambda graph: node_of(graph, "call_function").update(kwargs={"map": {f"a={code}, b": 1}}),
        "input": lambda graph: node_of(graph, "placeholder").update(target=f"input=({code})"),
        "attribute": lambda graph: node_of(graph, "get_attr").update(target=f'a"), {code}, ("'),
        "method": lambda graph: added(graph, "call_method", "tofile", {"node": "input_1"}, str(flag)),
        "file": lambda graph: added(graph, "call_function", "aten::from_file", str(flag), True, 16),
        "library": lambda graph: added(graph, "call_function", "load_library::__call__.__call__", str(flag)),
        "path": lambda graph: added(graph, "get_attr", "forward.__globals__"),
        "module": lambda graph: added(graph, "call_module", "register_forward_hook", 1),
        "type": lambda graph: node_of(graph, "call_function").update(args=[{"dtype": "load"}]),
        "tree": lambda graph: graph.update(outputs=graph["outputs"].replace("null", '{"__enum__": true}', 1)),
    }


@pytest.mark.parametrize("name", list(attacks(Path())))
def test_no_code_of_a_file_is_run(artifact: File, tmp_path: Path, name: str) -> None:
    flag, header = tmp_path / "flag", copy.deepcopy(artifact.header)
    attacks(flag)[name](graph_of(header))
    path = artifact.write(tmp_path / "model.fwc", header)
    with pytest.raises(ArtifactError, match=r"cannot be built|which is not in it"):
        target("coded").load(path)(**{key: value.numpy() for key, value in EXAMPLE.items()})
    assert not flag.exists()


@pytest.mark.parametrize(
    "link",
    [
        {"kind": "mask", "settings": {"shape": [2**40]}},
        {"kind": "indices", "settings": {"shapes": [[2**40], [2], []]}},
        {"kind": "affine", "settings": {"shape": [2**40]}},
    ],
)
def test_sizes_of_links_are_not_believed(artifact: File, tmp_path: Path, link: dict[str, Any]) -> None:
    """They are built without room: the tensors that the file holds take their places, or the file is refused."""
    header = copy.deepcopy(artifact.header)
    (chain,) = header["page"]["chains"]
    header["page"]["chains"][chain] = [link]
    message = ""
    try:
        target("coded").load(artifact.write(tmp_path / "model.fwc", header))
    except ArtifactError as error:
        message = str(error)
    assert "alloc" not in message and "memory" not in message


@pytest.mark.parametrize(
    "part",
    [
        {"kind": "Linear", "settings": {"in_features": 2**20, "out_features": 2**20, "device": "cpu"}},
        {"kind": "LSTM", "settings": {"input_size": 1, "hidden_size": 1, "num_layers": 10**9}},
    ],
)
def test_layers_are_built_without_room(artifact: File, tmp_path: Path, part: dict[str, Any]) -> None:
    header = copy.deepcopy(artifact.header)
    header["page"]["parts"][""]["children"].append("more")
    header["page"]["parts"]["more"] = part
    with pytest.raises(ArtifactError, match=r"'more': \w+ cannot be built from what was saved: it "):
        target("coded").load(artifact.write(tmp_path / "model.fwc", header))


def test_a_header_that_would_fill_the_memory_is_not_unpacked(artifact: File, tmp_path: Path) -> None:
    header = artifact.header | {"notes": {"many": [[]] * (HEADER_ROOM // 2)}}
    path = artifact.write(tmp_path / "model.fwc", header)
    assert path.stat().st_size * HEADER_RATIO < 2 * HEADER_ROOM
    with pytest.raises(ArtifactError, match=r"its header was altered .it says to be"):
        Reader(path)
