"""Save any compressed model and rebuild it: a page of JSON that says what it is made of, and its tensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core import registry
from ..core.errors import ArtifactError, TaskError
from ..core.files import recover_folder, tensor_digest, value_digest, whole_folder
from ..core.soft import Link, copied
from ..core.step import one_line
from . import encoded as encoded  # its link must be known before one is loaded
from .layers import Settings, believed, children_like, describe, known, make, rebuilders
from .program import check_graphs

PAGE, TENSORS = "skeleton.json", "tensors.safetensors"
Like = nn.Module | Callable[[], nn.Module] | None


class Part(BaseModel):
    """One module: what builds it (`settings` of a known kind), or, for a type of the user's own, its plain numbers."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    settings: Settings | None = None
    numbers: dict[str, Any] = {}
    children: list[str] = []


class Stored(BaseModel):
    """One tensor of the model: its form, its digest, and what it is there."""

    model_config = ConfigDict(extra="forbid")
    shape: list[int]
    dtype: str
    digest: str = ""
    role: Literal["parameter", "buffer", "passing"]  # a passing buffer is not in the state_dict
    trained: bool = False
    tied: str = ""  # the name of the tensor that this one is


class Chained(BaseModel):
    """One link of the chain on a weight: its kind and settings, or the name of a foreign parametrization's type."""

    model_config = ConfigDict(extra="forbid")
    kind: str = ""
    settings: Settings = {}
    foreign: str = ""


class Page(BaseModel):
    """The whole structure of a model, by full names, in order; `same` says which names stand for one module."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    parts: dict[str, Part]
    same: dict[str, str] = {}
    chains: dict[str, list[Chained]] = {}
    tensors: dict[str, Stored]

    def own(self) -> dict[str, Stored]:
        """The tensors that the file holds: tied ones only once."""
        return {name: entry for name, entry in self.tensors.items() if not entry.tied}


# -- saving -----------------------------------------------------------------------------------------------------------
def save(model: nn.Module, folder: str | Path) -> None:
    """Write `model` to `folder`: its structure as `skeleton.json`, its tensors as `tensors.safetensors`; no pickle.

    The folder appears whole or not at all and replaces one that is there. Raises `OutputError` if it cannot be written,
    `TaskError` for a model with state that is no tensor.
    """
    write(*skeleton(model), folder)


def write(page: Page, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Write what `skeleton` gave to `folder`, as `save` does."""
    content = page.model_dump(mode="json")
    with whole_folder(Path(folder)) as temporary:
        text = json.dumps({"digest": value_digest(content), **content}, indent=1, allow_nan=False)
        (temporary / PAGE).write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / TENSORS)


def skeleton(model: nn.Module) -> tuple[Page, dict[str, Tensor]]:
    """The structure of `model` and its tensors by name, each tied tensor once."""
    page = Page(parts={}, tensors={})
    _describe(page, "", model, {})
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, owner, attribute, tensor in _places(model):
        first = seen.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        page.tensors[name] = _stored(tensor, tensors[first], owner, attribute, "" if first == name else first)
    return page, tensors


def _describe(page: Page, name: str, module: nn.Module, seen: dict[int, str]) -> None:
    if id(module) in seen:
        page.same[name] = seen[id(module)]
        return
    seen[id(module)] = name
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise TaskError(f"the module {name!r} keeps state that is no tensor (get_extra_state); it cannot be saved")
    found, children = describe(module), _children(module)
    page.parts[name] = Part(
        kind=found[0] if found else parametrize.type_before_parametrizations(module).__name__,
        settings=found[1] if found else None,
        numbers={} if found else _numbers(module),
        children=list(children),
    )
    for attribute, links in _chains(module).items():
        page.chains[_join(name, attribute)] = [_chained(link) for link in links]
    for child, part in children.items():
        _describe(page, _join(name, child), part, seen)


def _stored(tensor: Tensor, value: Tensor, owner: nn.Module, attribute: str, tied: str) -> Stored:
    buffer: Literal["buffer", "passing"] = "passing" if attribute in owner._non_persistent_buffers_set else "buffer"
    return Stored(
        shape=list(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        digest=tensor_digest({"": value}),
        role="parameter" if isinstance(tensor, nn.Parameter) else buffer,
        trained=tensor.requires_grad,
        tied=tied,
    )


def _chained(link: nn.Module) -> Chained:
    if isinstance(link, Link):
        return Chained(kind=link.kind, settings=link.settings())
    return Chained(foreign=type(link).__name__)


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The plain numbers that a module of the user's own type keeps: sizes that pruning may have repaired."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _plain_number(value)
    }


def _plain_number(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, int) for item in value)
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _soft(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module)


def _chains(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The chain on each parametrized weight of `module` itself."""
    chains: Any = module.parametrizations if _soft(module) else {}
    return {attribute: list(links) for attribute, links in chains.items()}


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that are parts of the model: all but the chains on its own weights."""
    hidden = {"parametrizations"} if _soft(module) else set()
    return {name: child for name, child in module._modules.items() if child is not None and name not in hidden}


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every tensor by its full name: the module that holds it, its name there, itself."""
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield _join(prefix, attribute), module, attribute, tensor


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# -- loading ----------------------------------------------------------------------------------------------------------
def load(folder: str | Path, like: Like = None) -> nn.Module:
    """The model that `save` wrote to `folder`, in evaluation mode on the CPU, with equal outputs.

    `like` is the original model (it is copied) or a function that makes one; without it, only models of known layers
    and containers can be rebuilt. Raises `ArtifactError` if a file is missing, cut short or altered, or if `like` is
    another architecture.
    """
    folder = Path(folder)
    recover_folder(folder)
    page = _read_page(folder / PAGE)
    return rebuilt(page, _read_tensors(folder / TENSORS, page), folder, like)


def rebuilt(page: Page, tensors: dict[str, Tensor], source: Path, like: Like = None) -> nn.Module:
    """The model that `page` and `tensors`, read from `source`, describe; for `like` and errors see `load`."""
    fresh = _fresh(like)
    with believed(f"the model in {source}"):
        model = _build(page, "", fresh, {})
        _put_chains(page, model)
        _put_tensors(page, model, tensors)
        check_graphs(model)
    if missing := [name for name, _, _, tensor in _places(model) if tensor.is_meta]:
        raise ArtifactError(f"{source} holds no tensor {missing[0]!r}, which the model needs; save it again")
    return model.eval()


def _fresh(like: Like) -> nn.Module | None:
    """A model of our own to build into; a copy even of what a function gives, which may be the user's own."""
    made = like if like is None or isinstance(like, nn.Module) else like()
    if made is not None and not isinstance(made, nn.Module):
        raise TaskError(f"like= gave {type(made).__name__}; it must be a model or a function that makes one")
    return None if made is None else copied(made).cpu()


def _read_page(path: Path) -> Page:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} holds no saved model (no {path.name})")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
        page = Page.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {one_line(error)}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged or cut short: it is no skeleton of a model") from error
    if digest != value_digest(content):
        raise ArtifactError(f"{path} was altered (its digest differs); save the model again")
    return page


def _read_tensors(path: Path, page: Page) -> dict[str, Tensor]:
    """The tensors, each checked against the page: first forms, then what was read."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; the saved model is incomplete")
    try:
        with safe_open(path, framework="pt") as file:
            _compare_names(path, set(file.keys()), set(page.own()))
            tensors = {}
            for name, entry in page.own().items():
                if list(file.get_slice(name).get_shape()) != entry.shape:
                    raise ArtifactError(f"{path}: the tensor {name!r} has another shape than was saved")
                tensors[name] = file.get_tensor(name).clone()  # aligned memory: the kernels then round alike
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged{_first_lost(path)}: {' '.join(str(error).split())}") from error
    for name, entry in page.own().items():
        if tensor_digest({"": tensors[name]}) != entry.digest:
            raise ArtifactError(f"{path}: the tensor {name!r} was altered (its digest differs)")
    return tensors


def _compare_names(path: Path, found: set[str], wanted: set[str]) -> None:
    for name in sorted(found ^ wanted):
        raise ArtifactError(f"{path}: the tensor {name!r} is {'missing' if name in wanted else 'not one of the model'}")


def _first_lost(path: Path) -> str:
    """Which tensor lies beyond the end of a file that was cut short; empty if that is not what is wrong."""
    data = path.read_bytes()
    if len(data) < 8 or len(data) < 8 + (length := struct.unpack("<Q", data[:8])[0]):
        return " (cut short within its header)"
    try:
        header = json.loads(data[8 : 8 + length])
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        lost = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if 8 + length + end > len(data)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return " (its header is no JSON)"
    return f" (cut short: the tensor {lost[0]!r} is not whole)" if lost else ""


def _build(page: Page, name: str, fresh: nn.Module | None, made: dict[str, nn.Module]) -> nn.Module:
    """The module called `name` with all below it: `fresh` where that is what was saved, else a new one."""
    if name in page.same:
        return made[page.same[name]]
    if name not in page.parts:
        raise ArtifactError(f"the saved model does not say what {name!r} is; save it again")
    part = page.parts[name]
    module = _own(part, name, fresh) if part.settings is None else _layer(part, name, fresh, len(page.tensors))
    made[name] = module
    _unchain(module, page, name)
    before = _children(module)
    from_fresh = children_like(module, fresh)
    for child in before:
        del module._modules[child]
        if part.settings is None and child not in part.children:
            setattr(module, child, None)
    for child in part.children:
        setattr(module, child, _build(page, _join(name, child), from_fresh.get(child, before.get(child)), made))
    if _soft(module):  # as where chains were put on last
        module._modules["parametrizations"] = module._modules.pop("parametrizations")
    return module


def _layer(part: Part, name: str, fresh: nn.Module | None, most: int) -> nn.Module:
    if fresh is not None and describe(fresh) == (part.kind, part.settings):
        return fresh
    if part.kind not in rebuilders and part.kind not in known():
        raise ArtifactError(f"{name!r} is {part.kind}, which this version of featherweight cannot build")
    with believed(f"{name!r}: {part.kind}"):
        return make(part.kind, part.settings or {}, most)


def _own(part: Part, name: str, fresh: nn.Module | None) -> nn.Module:
    where = f"the module {name!r}" if name else "the model"
    if fresh is None:
        raise ArtifactError(f"{where} is {part.kind}, which is no layer of torch.nn; give like= the original model")
    kind = parametrize.type_before_parametrizations(fresh).__name__
    if kind != part.kind:
        raise ArtifactError(f"{where} was {part.kind}, but in like= it is {kind}; give the architecture that was saved")
    for attribute, value in part.numbers.items():
        old = getattr(fresh, attribute, None)
        value = type(old)(value) if isinstance(value, list) and isinstance(old, tuple) else value
        if old != value or type(old) is not type(value):
            setattr(fresh, attribute, value)
    return fresh


def _unchain(module: nn.Module, page: Page, name: str) -> None:
    """Take the chains off a fresh module, unless what was saved goes on from them."""
    if not _soft(module):
        return
    chains = _chains(module)
    if all(_starts(page.chains.get(_join(name, attribute), []), links) for attribute, links in chains.items()):
        return
    values = {attribute: getattr(module, attribute).detach().clone() for attribute in chains}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for attribute, value in values.items():
        module.register_parameter(attribute, nn.Parameter(value))


def _starts(saved: list[Chained], links: list[nn.Module]) -> bool:
    return saved[: len(links)] == [_chained(link) for link in links]


def _put_chains(page: Page, model: nn.Module) -> None:
    """Register every saved chain that the model does not have yet."""
    for name, chain in page.chains.items():
        prefix, attribute = name.rpartition(".")[::2]
        module = _submodule(model, prefix, name)
        there = len(_chains(module).get(attribute, []))
        if not there and module._parameters.get(attribute) is None:
            module.register_parameter(attribute, nn.Parameter(torch.empty(0, device="meta")))
        for entry in chain[there:]:
            parametrize.register_parametrization(module, attribute, _link(entry, name), unsafe=True)
        if all(entry.kind for entry in chain):
            module.parametrizations[attribute].unsafe = False  # type: ignore[index,union-attr]


def _link(entry: Chained, name: str) -> Link:
    if entry.foreign:
        raise ArtifactError(f"{name!r} was parametrized by {entry.foreign}; give like= a model that has it")
    if entry.kind not in Link.kinds:
        registry.load("methods")
    if entry.kind not in Link.kinds:
        raise ArtifactError(f"{name!r} is held by {entry.kind!r}, which this version of featherweight does not know")
    with believed(f"the weight {name!r}"), torch.device("meta"):
        return Link.kinds[entry.kind](**entry.settings)


def _put_tensors(page: Page, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put every tensor into its module in the order in which it was saved; take away those that were not saved."""
    for _, owner, attribute, _ in list(_places(model)):
        owner._buffers.pop(attribute, None)
        if owner._parameters.pop(attribute, None) is not None:
            setattr(owner, attribute, None)
    values: dict[str, Tensor] = {}
    for name, entry in page.tensors.items():
        prefix, attribute = name.rpartition(".")[::2]
        owner = _submodule(model, prefix, name)
        if entry.tied:
            values[name] = values[entry.tied]
        elif entry.role == "parameter":
            values[name] = nn.Parameter(tensors[name], requires_grad=entry.trained)
        else:
            values[name] = tensors[name]
        vars(owner).pop(attribute, None)
        if entry.role == "parameter":
            setattr(owner, attribute, values[name])
        else:
            owner.register_buffer(attribute, values[name], persistent=entry.role == "buffer")


def _submodule(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(f"the saved model has {name!r}, but no module holds it; save it again") from error
