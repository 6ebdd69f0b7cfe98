"""The pieces of a captured graph that are quantized as one: single layers, or blocks between places where one value
holds all.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ...model.flow import last_uses
from .placement import FUSED

IDLE = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class Segment:
    """Some nodes of a graph in order, the value that they are there to compute, and the weights among them.

    All nodes lie from `start` up to, not including, `stop` in the graph.
    """

    start: int
    stop: int
    nodes: tuple[fx.Node, ...]
    output: fx.Node
    weights: tuple[str, ...]

    def given(self) -> list[fx.Node]:
        """The values from outside that the nodes read."""
        inside = set(self.nodes)
        read = [source for node in self.nodes for source in node.all_input_nodes]
        return [node for node in dict.fromkeys(read) if node not in inside and node.op != "get_attr"]


def by_layer(graph: fx.Graph, layers: Mapping[str, fx.Node]) -> list[Segment]:
    """Each layer by itself, with the activation that directly follows it."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    found = []
    for name, node in layers.items():
        users = list(node.users)
        nodes = (node, users[0]) if len(users) == 1 and users[0].target in FUSED else (node,)
        found.append(Segment(places[node], places[nodes[-1]] + 1, nodes, nodes[-1], (name,)))
    return found


def by_block(graph: fx.Graph, layers: Mapping[str, fx.Node]) -> list[Segment]:
    """The shortest pieces with a layer in them between places where a single value carries all that layers computed:
    residual blocks, the halves of a transformer block, or single layers where there is nothing beside them.

    Values that depend on no layer, such as masks, may be read anywhere.
    """
    nodes, last, names = list(graph.nodes), last_uses(graph), {node: name for name, node in layers.items()}
    computed = _downstream(nodes, set(names))
    live: set[fx.Node] = set()
    start, found = 0, []
    for place, node in enumerate(nodes):
        if node.op not in IDLE and node in computed:
            live.add(node)
        live = {each for each in live if last[each] > place}
        inside = [each for each in nodes[start : place + 1] if each in names]
        if not inside and not live:
            start = place + 1
        elif inside and live == {node} and not _goes_on(node):
            found.append(_segment(nodes, start, place, names))
            start = place + 1
    if any(node in names for node in nodes[start:]):  # several outputs: what is left over is one piece, up to the last
        stop = max(place for place, node in enumerate(nodes) if node in names)
        found.append(_segment(nodes, start, stop, names))
    return found


def with_ports(graph: fx.Graph, segments: Iterable[Segment], ports: Container[str]) -> list[Segment]:
    """The segments, each with those of `ports` (names) before it that only it reads."""
    places, found = {node: place for place, node in enumerate(graph.nodes)}, []
    for segment in segments:
        inside = set(segment.nodes)
        before = [
            node
            for node in segment.given()
            if node.op == "call_module" and str(node.target) in ports and set(node.users) <= inside
        ]
        nodes = (*sorted(before, key=places.__getitem__), *segment.nodes)
        found.append(replace(segment, start=min(segment.start, *map(places.__getitem__, nodes)), nodes=nodes))
    return found


def _downstream(nodes: Iterable[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    """What follows from `sources`, and they themselves."""
    found = set(sources)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _goes_on(node: fx.Node) -> bool:
    """Whether what directly follows belongs to the same operation."""
    users = list(node.users)
    return len(users) == 1 and users[0].target in FUSED


def _segment(nodes: list[fx.Node], start: int, end: int, names: Mapping[fx.Node, str]) -> Segment:
    inside = tuple(node for node in nodes[start : end + 1] if node.op not in IDLE)
    return Segment(start, end + 1, inside, nodes[end], tuple(names[node] for node in inside if node in names))
