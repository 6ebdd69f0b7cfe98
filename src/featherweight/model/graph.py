"""The graph of a model: captured once, with dimensions that are really dynamic."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from featherweight.core.errors import TaskError
from featherweight.core.outputs import difference
from featherweight.core.soft import Link

CAPTURED = "CapturedModel"
Free = dict[str, dict[int, str]]


def capture(model: nn.Module, example: dict[str, Tensor], free: Free) -> ExportedProgram:
    """Export `model` (evaluation mode) with the dimensions in `free` dynamic: input name -> {dimension: label}.

    Where Python code fixes a size (such as `len(x)`), which makes the exporter refuse, the model is exported at two
    sizes; the integers that differ between the two graphs are what depends on the size, and are put back as a multiple
    of it plus a constant. What else differs is refused, and so is a graph that does not compute what the model does at
    further sizes. `example` holds at least two inputs. Raises `TaskError` if the model cannot be exported.
    """
    free = {name: dims for name, dims in free.items() if dims and name in example}
    try:
        return _export(model, example, free)
    except Exception as error:
        if not free:
            raise TaskError(f"torch.export cannot capture the model: {_brief(error)}") from error
        try:
            return _export(_freed(model, example, free), example, free)
        except TaskError:
            raise
        except Exception as again:
            raise TaskError(f"torch.export cannot capture the model: {_brief(again)}") from error


def captured(model: nn.Module, example: dict[str, Tensor], free: Free) -> fx.GraphModule:
    """`model` as a graph module of ATen operators that computes what it computes in evaluation mode; weights keep their
    full names.
    """
    module = _as_graph_module(capture(model, example, free))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    return plain_graph(module)


def plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """The graph and the submodules of `module` in an ordinary `torch.fx.GraphModule`, which can be trained, copied and
    edited.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    made = fx.GraphModule(module, graph, class_name=CAPTURED)
    return made.eval()


def keep_links(module: fx.GraphModule, links: Mapping[str, list[Link]]) -> None:
    """Put masks and the like back on the captured weights, so that they still hold when the model is trained."""
    for name, chain in links.items():
        prefix, _, last = name.rpartition(".")
        for link in chain:
            parametrize.register_parametrization(module.get_submodule(prefix), last, copy.deepcopy(link))


def _export(model: nn.Module, example: dict[str, Tensor], free: Free) -> ExportedProgram:
    shapes = {name: dict.fromkeys(free.get(name, {}), Dim.DYNAMIC) or None for name in example}
    clones = {name: tensor.detach().clone() for name, tensor in example.items()}
    with torch.no_grad(), warnings.catch_warnings(), _named_arguments(model, example):
        warnings.simplefilter("ignore", UserWarning)  # such as that a recurrent layer lists its own weights
        return torch.export.export(model, (), kwargs=clones, dynamic_shapes=shapes if free else None)


@contextmanager
def _named_arguments(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within this block a model that takes its inputs as `**rest` says that it takes these: where a dimension of theirs
    is free, the exporter finds them by the names of arguments.
    """
    forward = model.forward
    if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(forward).parameters.values()):
        yield
        return

    def named(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    takes = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    named.__signature__ = inspect.Signature(takes)  # type: ignore[attr-defined]
    before = vars(model).get("forward")
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _as_graph_module(program: ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# -- sizes that Python code has fixed ---------------------------------------------------------------------------------
def _freed(model: nn.Module, example: dict[str, Tensor], free: Free) -> fx.GraphModule:
    """The model as a graph in which every integer that follows a free dimension is computed from it again."""
    sizes = {label: _size(example, free, label) for label in sorted(_labels(free))}
    base = _static(model, example)
    twins = {
        label: _twins(base, _static(model, _resized(example, free, {label: size + 1})), label)
        for label, size in sizes.items()
    }
    nodes = [node for node in base.graph.nodes if node.op in ("call_function", "output")]
    sources = _insert_sizes(base, free, list(sizes))
    for node in nodes:
        others = {label: (pairs[node].args, pairs[node].kwargs) for label, pairs in twins.items()}
        node.args, node.kwargs = _Merger(base.graph, node, sizes, sources, twins).merge(
            (node.args, node.kwargs), others
        )
    base.recompile()
    _verify(base, model, example, free, sizes)
    return base


def _static(model: nn.Module, example: dict[str, Tensor]) -> fx.GraphModule:
    return _as_graph_module(_export(model, example, {}))


def _labels(free: Free) -> set[str]:
    return {label for dims in free.values() for label in dims.values()}


def _size(example: dict[str, Tensor], free: Free, label: str) -> int:
    return next(
        example[name].shape[place] for name, dims in free.items() for place, each in dims.items() if each == label
    )


def _resized(example: dict[str, Tensor], free: Free, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The example with every dimension called by a label in `sizes` cut or, by its own entries over again, filled to
    that size.
    """
    resized = {name: tensor.detach().clone() for name, tensor in example.items()}
    for name, dims in free.items():
        for place, label in dims.items():
            if label in sizes:
                entries = torch.arange(sizes[label], device=resized[name].device) % resized[name].shape[place]
                resized[name] = resized[name].index_select(place, entries)
    return resized


def _refused(label: str, reason: str) -> TaskError:
    return TaskError(
        f"the dimension {label!r} cannot be left dynamic: {' '.join(reason.split())}; take sizes from x.shape instead "
        "of len(x) in the model, or leave the dimension out of the task's `dynamic`"
    )


def _twins(base: fx.GraphModule, other: fx.GraphModule, label: str) -> dict[fx.Node, fx.Node]:
    """Which node of `other`, the graph of a larger input, stands for which of `base`; both must compute alike."""
    ours, theirs = list(base.graph.nodes), list(other.graph.nodes)
    if [(node.op, node.target) for node in ours] != [(node.op, node.target) for node in theirs]:
        raise _refused(label, "the model computes differently when it grows by one")
    for node in ours:
        if node.op == "get_attr" and not _same_held(_held(base, node), _held(other, node)):
            raise _refused(label, f"the constant {node.target!r} that the model makes in Python follows its size")
    return dict(zip(ours, theirs))


def _held(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _same_held(one: Any, other: Any) -> bool:
    if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):  # the body of a loop or a branch
        return one.code == other.code
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_form = one.shape == other.shape and one.dtype == other.dtype
        return one is other or (same_form and not difference(one, other))
    return one is other


def _insert_sizes(module: fx.GraphModule, free: Free, labels: list[str]) -> dict[str, fx.Node]:
    """One node per label that reads the size of that dimension off an input."""
    inputs = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    last = list(inputs.values())[-1]
    sources = {}
    for label in labels:
        name, place = next(
            (name, place) for name, dims in free.items() for place, each in dims.items() if each == label
        )
        with module.graph.inserting_after(last):
            sources[label] = module.graph.call_function(torch.ops.aten.sym_size.int, (inputs[name], place))
    return sources


class _Merger:
    """Puts the arguments of one node together from what they are at the sizes of the example and, per label, one
    larger.
    """

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        sizes: dict[str, int],
        sources: dict[str, fx.Node],
        twins: dict[str, dict[fx.Node, fx.Node]],
    ):
        self.graph, self.node, self.sizes, self.sources, self.twins = graph, node, sizes, sources, twins

    def merge(self, value: Any, others: dict[str, Any]) -> Any:
        """`value` with each integer that differs in one of `others` replaced by what it is as a function of that
        label's size; anything else that differs is refused.
        """
        if isinstance(value, tuple | list):
            self._check(others, lambda label, other: type(other) is type(value) and len(other) == len(value), value)
            return type(value)(
                self.merge(item, {label: other[place] for label, other in others.items()})
                for place, item in enumerate(value)
            )
        if isinstance(value, dict):
            self._check(others, lambda label, other: isinstance(other, dict) and list(other) == list(value), value)
            return {
                key: self.merge(item, {label: other[key] for label, other in others.items()})
                for key, item in value.items()
            }
        if isinstance(value, fx.Node):
            self._check(others, lambda label, other: other is self.twins[label][value], value)
            return value
        if type(value) is int:
            self._check(others, lambda label, other: type(other) is int, value)
            return self._integer(value, others)
        self._check(others, lambda label, other: type(other) is type(value) and repr(other) == repr(value), value)
        return value

    def _check(self, others: dict[str, Any], same: Callable[[str, Any], bool], value: Any) -> None:
        for label, other in others.items():
            if not same(label, other):
                size = self.sizes[label]
                reason = f"at size {size} the model hands {value} to {self.node.target}, at size {size + 1} {other}"
                raise _refused(label, reason)

    def _integer(self, value: int, others: dict[str, int]) -> int | fx.Node:
        moved = {label: other - value for label, other in others.items() if other != value}
        if len(moved) > 1:
            raise TaskError(
                f"a size in the model depends on {' and '.join(sorted(moved))} together; "
                "give the task only one dynamic dimension"
            )
        for label, factor in moved.items():
            return self._line(label, factor, value - factor * self.sizes[label])
        return value

    def _line(self, label: str, factor: int, rest: int) -> fx.Node:
        """`factor * size + rest`, computed before the node."""
        value = self.sources[label]
        with self.graph.inserting_before(self.node):
            if factor != 1:
                value = self.graph.call_function(operator.mul, (value, factor))
            return self.graph.call_function(operator.add, (value, rest)) if rest else value


# -- the check of what was freed --------------------------------------------------------------------------------------
@torch.no_grad()
def _verify(
    graph: fx.GraphModule, model: nn.Module, example: dict[str, Tensor], free: Free, sizes: dict[str, int]
) -> None:
    """Refuse a graph that does not give what the model gives at sizes that it was not made from.

    Two sizes cannot tell a line from a square or from a half that is rounded down; further sizes do.
    """
    graph = fx.GraphModule(graph, graph.graph)  # without the exporter's check of the sizes that it saw
    for label, size in sizes.items():
        tried = [{label: other} for other in _further(size)]
        if not sum(_check_at(graph, model, _resized(example, free, each), each) for each in tried):
            raise _refused(label, f"beside {size} the model runs at none of the sizes {list(_further(size))}")
    if len(sizes) > 1:
        together = {label: _further(size)[-1] for label, size in sizes.items()}
        _check_at(graph, model, _resized(example, free, together), together)


def _further(size: int) -> tuple[int, ...]:
    """Sizes to check at; long dimensions only shorter, since a model may end (with its table of positions, say)."""
    return (1, 4, 7) if size < 4 else (size // 2, size - 1)


def _check_at(graph: fx.GraphModule, model: nn.Module, inputs: dict[str, Tensor], sizes: dict[str, int]) -> bool:
    """Whether the model runs on these inputs at all; where it does, the graph must give the same."""
    label = " and ".join(sizes)
    text = ", ".join(f"{name} {size}" for name, size in sizes.items())
    try:
        want = model(**{name: tensor.clone() for name, tensor in inputs.items()})
    except (
        Exception
    ):  # the user's own code runs here, and may not be made for this size; then there is nothing to match
        return False
    try:
        got = graph(**{name: tensor.clone() for name, tensor in inputs.items()})
    except Exception as error:
        raise _refused(
            label, f"a size that Python fixed does not follow it (at {text}: {_brief(error)[:120]})"
        ) from error
    reason = difference(want, got)
    if reason:
        raise _refused(label, f"a size that Python fixed does not follow it linearly (at {text}: {reason})")
    return True
