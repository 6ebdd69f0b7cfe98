"""Layers that can be built from plain constructor values: those of torch.nn, and our own."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core.adapted import BASE, Adapted
from ..core.errors import ArtifactError
from .adapters import Bottleneck, LowRank, Scaled
from .experts import Experts, FeedForward, MixtureOfExperts, Router
from .factored import Factored, TensorTrain, TensorTrainEmbedding
from .graph import CAPTURED
from .grouped import GroupedHeads
from .port import DynamicPort, Port
from .ported import PortedLinear, PortedLSTM
from .program import load_graph, read_captured
from .prompts import Prefix, Prompt, Prompted
from .resized import Resized

Settings = dict[str, Any]
Read = Callable[[nn.Module], Settings | None]
Make = Callable[[Settings], nn.Module]

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
HOLD_VALUES = (nn.ParameterList, nn.ParameterDict)  # their constructors take tensors
REPEATED = ("num_layers", "num_encoder_layers", "num_decoder_layers")  # each makes tensors
ADAPTERS = (LowRank, Scaled, Bottleneck, Prompted, Prompt, Prefix)
OURS = (
    Port,
    DynamicPort,
    PortedLinear,
    PortedLSTM,
    Factored,
    TensorTrain,
    TensorTrainEmbedding,
    GroupedHeads,
    Resized,
    *ADAPTERS,
)
MIXTURES = (Experts, FeedForward, MixtureOfExperts, Router)


@dataclass(frozen=True)
class Rebuilder:
    """How modules of one kind are written down and made again: `read` gives plain JSON values, `make` a module of them.

    `read` gives None for a module that it cannot describe in full. `make` may run on the meta device: tensors and
    submodules are put in afterwards, under the names that they had.
    """

    kind: str
    read: Read
    make: Make


rebuilders: dict[str, Rebuilder] = {}


def rebuilder(kind: str, read: Read, make: Make) -> Rebuilder:
    """Register how a kind of module that is no layer of torch.nn, such as a captured graph, is saved and rebuilt."""
    rebuilders[kind] = Rebuilder(kind, read, make)
    return rebuilders[kind]


def describe(module: nn.Module) -> tuple[str, Settings] | None:
    """The kind and the constructor values of `module`; None if it is of a type that only its author can build."""
    for each in rebuilders.values():
        settings = each.read(module)
        if settings is not None:
            return each.kind, settings
    kind = parametrize.type_before_parametrizations(module)
    if known().get(kind.__name__) is not kind:
        return None
    settings = {} if kind in CONTAINERS else constructor_values(module, kind)
    return None if settings is None else (kind.__name__, settings)


# what constructors, and code that puts parts together, raise for values that nobody saved
SENSELESS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


@contextmanager
def believed(what: str) -> Iterator[None]:
    """Within this block values that were read are put to use; where they make no sense, `ArtifactError` tells of
    `what`.
    """
    try:
        yield
    except SENSELESS as error:
        brief = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ArtifactError(f"{what} cannot be built from what was saved: {brief[:200]}") from error


def make(kind: str, settings: Settings, most: int = 1024) -> nn.Module:
    """The module that `describe` gave as `kind` and `settings`, on the meta device, with no more layers than `most`.

    Raises one of `SENSELESS` for what `describe` never gave: `KeyError` for an unknown kind.
    """
    if any(name in settings for name in ("device", "dtype")):
        raise ValueError("it says a device or a type")
    if any(isinstance(many, int) and many > most for name, many in settings.items() if name in REPEATED):
        raise ValueError("it has more layers than the model has tensors")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if kind in rebuilders:
            return rebuilders[kind].make(settings)
        return known()[kind](**{name: _tuples(value) for name, value in settings.items()})


@functools.cache
def known() -> dict[str, type[nn.Module]]:
    """Every layer and container of torch.nn, and ours, by the name of its class."""
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(nn.modules.__path__):
        module = importlib.import_module(f"{nn.modules.__name__}.{info.name}")
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                found[name] = kind
    for kind in HOLD_VALUES:
        del found[kind.__name__]
    return found | {kind.__name__: kind for kind in (*OURS, *MIXTURES)}


def constructor_values(module: nn.Module, kind: type[nn.Module]) -> Settings | None:
    """The arguments that build `module` again, off its attributes; None if one is not there or is no plain value."""
    values: Settings = {}
    for name, switch in _arguments(kind, module):
        if not hasattr(module, name):
            return None
        value = getattr(module, name)
        if switch and not isinstance(value, bool):
            value = value is not None
        values[name] = value
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _arguments(kind: type[nn.Module], module: nn.Module) -> list[tuple[str, bool]]:
    """Names of the constructor's arguments as attributes, and whether each only says that a tensor is there."""
    if isinstance(module, nn.RNNBase):
        names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
        own = {nn.LSTM: ["proj_size"], PortedLSTM: ["proj_size"], nn.RNN: ["nonlinearity"]}
        return [(name, False) for name in names + own.get(kind, [])]
    found = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        name, named = parameter.name, parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and name not in ("device", "dtype", "min_value", "max_value") and not name.startswith("_"):
            found.append((name, isinstance(parameter.default, bool)))
    return found


def children_like(module: nn.Module, fresh: nn.Module | None) -> dict[str, nn.Module | None]:
    """What stands for the children of `module` in a fresh model in which `fresh` stands for it: what is around a base
    stands for the base itself there.
    """
    if isinstance(module, Adapted | Resized) and not isinstance(fresh, Adapted | Resized):
        return {BASE: fresh}
    parts = {} if fresh is None else fresh._modules
    return {name: child for name, child in parts.items() if child is not None and name != "parametrizations"}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _read_attention(module: nn.Module) -> Settings | None:
    if parametrize.type_before_parametrizations(module) is not nn.MultiheadAttention:
        return None
    assert isinstance(module, nn.MultiheadAttention)
    names = ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first", "add_zero_attn")
    tensors = {"bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}
    return {name: getattr(module, name) for name in names} | tensors


rebuilder("MultiheadAttention", _read_attention, lambda settings: nn.MultiheadAttention(**settings))
rebuilder(CAPTURED, read_captured, lambda settings: load_graph(settings["graph"]))
