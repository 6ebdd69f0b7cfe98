"""A captured graph run part by part over a whole data set: between parts only what is still needed is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .port import Port

Values = dict[fx.Node, Any]
LIMIT = 2**30  # bytes of kept values that stay in memory


class Runner(fx.Interpreter):
    """Runs any nodes of a captured graph from given values.

    The tensors in `held` and the modules in `instead` stand in for those of the graph, by full name; without `ports`
    ports do nothing.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        held: Mapping[str, Tensor] | None = None,
        ports: bool = True,
        instead: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__(module, garbage_collect_values=False)
        self.held, self.ports = {} if held is None else held, ports
        self.instead = {} if instead is None else instead

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self.ports and isinstance(self.submodules[target], Port):
            return args[0]
        if target in self.instead:
            return self.instead[target](*args, **kwargs)
        return super().call_module(target, args, kwargs)

    def part(self, nodes: Iterable[fx.Node], values: Values) -> Values:
        """What `nodes`, in order, give from `values`; weights are read anew."""
        self.env = dict(values)
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in self.env:
                    self.env[source] = self.run_node(source)
            self.env[node] = self.run_node(node)
        return self.env


class Shelf:
    """Values per batch: in memory up to `limit` bytes in all, what is beyond that in files of a temporary folder."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.folder = limit, tempfile.TemporaryDirectory(prefix="featherweight-")
        self.kept: dict[int, Values] = {}
        self.nodes: dict[int, list[fx.Node]] = {}

    def put(self, place: int, values: Values) -> None:
        """Keep `values` as those of the batch `place`; they replace the earlier ones."""
        self.kept.pop(place, None)
        if self.held() + _bytes(values) <= self.limit:
            self.kept[place] = values
            return
        self.nodes[place] = list(values)
        torch.save(list(values.values()), self._file(place))

    def get(self, place: int) -> Values:
        if place in self.kept:
            return self.kept[place]
        return dict(zip(self.nodes[place], torch.load(self._file(place), weights_only=True)))

    def held(self) -> int:
        """Bytes in memory."""
        return sum(map(_bytes, self.kept.values()))

    def _file(self, place: int) -> Path:
        return Path(self.folder.name) / str(place)


def last_uses(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place in the graph of the last node that reads each node; -1 where none does."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    return {node: max((places[user] for user in node.users), default=-1) for node in graph.nodes}


def _bytes(values: Values) -> int:
    return sum(value.numel() * value.element_size() for value in values.values() if isinstance(value, Tensor))


class Flow:
    """The values that a captured graph holds at one place in it, for every batch of a data set.

    It goes through the graph once, from front to back: `advance` runs the next nodes over all batches, and drops what
    no later node reads. Memory: the batches' live values, up to `limit` bytes; beyond that they lie on the disk.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        batches: Iterable[Sequence[Tensor]],
        held: Mapping[str, Tensor] | None = None,
        ports: bool = True,
        limit: int = LIMIT,
    ):
        self.nodes, self.last = list(module.graph.nodes), last_uses(module.graph)
        self.runner, self.shelf, self.at, self.count = Runner(module, held, ports), Shelf(limit), 0, 0
        given = [node for node in self.nodes if node.op == "placeholder"]
        for batch in batches:
            self.shelf.put(self.count, dict(zip(given, batch)))
            self.count += 1

    @torch.no_grad()
    def advance(self, place: int) -> None:
        """Run all batches up to, not including, the node at `place` in the graph."""
        nodes = [node for node in self.nodes[self.at : place] if node.op not in ("placeholder", "get_attr", "output")]
        self.at = max(self.at, place)
        if nodes:
            for batch, values in enumerate(self):
                env = self.runner.part(nodes, values)
                self.shelf.put(batch, {node: value for node, value in env.items() if self._needed(node)})

    def _needed(self, node: fx.Node) -> bool:
        return self.last[node] >= self.at and node.op != "get_attr"

    def __iter__(self) -> Iterator[Values]:
        """The values of each batch in turn."""
        for batch in range(self.count):
            yield self.shelf.get(batch)
