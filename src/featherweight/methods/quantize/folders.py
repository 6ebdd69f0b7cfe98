"""A folder of safetensors shards quantized into another folder, block by block: never the whole model in memory."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.core.blocks import real_positions, walk
from featherweight.core.context import Context
from featherweight.core.encoding import Affine, Codebook, Encoding
from featherweight.core.errors import ArtifactError, TaskError
from featherweight.core.files import whole_folder, write_json
from featherweight.core.record import StepRecord
from featherweight.core.soft import encodings
from featherweight.model.matrices import Matrix, chosen_matrices
from featherweight.model.shards import Shards, ShardWriter

from .weights import WeightQuantization

PAGE = "encodings.json"
KINDS: dict[str, type[Encoding]] = {"affine": Affine, "codebook": Codebook}


class _Empty(TorchFunctionMode):
    """`torch.empty` allocates nothing: layers make their parameters with it, and buffers with other functions."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return function(*args, **given)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside the block have parameters without content (on the meta device); buffers are real."""
    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and module._parameters[name] is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign,assignment]
    try:
        with _Empty():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def quantize_folder(
    step: WeightQuantization,
    make: Callable[[], nn.Module],
    source: Path,
    out: Path,
    batches: Iterable[dict[str, Tensor]],
    ctx: Context,
) -> StepRecord:
    """Quantize the repeated blocks of a model whose weights lie in `source` as safetensors shards, and write `out`.

    `make` makes the model (its weights are dropped as they are made), `batches` are calibration inputs by name. At any
    time one block is in memory, in its original and its new form, with its activations; what is in no block stays in
    memory throughout and is copied as it is. Layers of a block that do not run on the first batch are rounded to
    nearest, and said. `out` gets shards with the parts of each encoding (`weight:values`...), `encodings.json`, and an
    index. Raises `TaskError` if the model has no repeated blocks or there are no batches, `ArtifactError` for shards
    that lack a tensor.
    """
    shards = Shards(source)
    with without_weights():
        model = make().eval()
    _check_buffers(model)
    given = list(batches)
    if not given:
        raise TaskError("there are no calibration batches; give at least one")
    ctx.record = StepRecord(step=step.full())
    inside = {matrix.name: matrix for matrix in chosen_matrices(step, model, ctx)}
    step.check_group(list(inside.values()))
    hollow: dict[str, nn.Module] = {}
    found: dict[str, Any] = {}

    with whole_folder(Path(out)) as folder:
        writer = ShardWriter(folder)

        def enter(name: str) -> None:
            module = model.get_submodule(name)
            hollow[name] = copy.deepcopy(module)
            fill(module, name, shards)

        def leave(name: str) -> None:
            writer.add(stored_tensors(model.get_submodule(name), name, found))
            _put(model, name, hollow.pop(name))
            gc.collect()  # the generated classes of parametrized modules lie in cycles

        blocks = _block_names(model)
        _report(model, blocks, inside, shards, ctx)
        outer = _fill_outer(model, blocks, shards)
        calls = [functools.partial(model, **batch) for batch in given]
        for block in walk(model, calls, [real_positions(batch) for batch in given], enter, leave):
            if step.method in ("gptq", "awq"):
                step.quantize_block(block, inside, ctx)
            step.round_block(block, inside, ctx)
        writer.add(outer)
        writer.close()
        write_json(folder / PAGE, found)
    return ctx.record


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise TaskError(f"the model makes its buffer {name!r} with torch.empty; it has no content then")


def _report(model: nn.Module, blocks: list[str], inside: dict[str, Matrix], shards: Shards, ctx: Context) -> None:
    """Take the layers that are in no block out of `inside`, and tell of them and of tensors that no block has."""
    prefixes, known = tuple(f"{block}." for block in blocks), model.state_dict().keys()
    for name in [name for name in inside if not name.startswith(prefixes)]:
        ctx.leave(name, "is in no block; copied as it is")
        del inside[name]
    for name in shards.names():
        if name.startswith(prefixes) and name not in known:
            ctx.warn(f"{name}: the model has no such tensor; it is not copied")


def _block_names(model: nn.Module) -> list[str]:
    from featherweight.core.blocks import repeated

    names = repeated(model)
    if not names:
        raise TaskError("the model has no repeated blocks, so it cannot be quantized block by block")
    return names


@torch.no_grad()
def fill(module: nn.Module, prefix: str, shards: Shards) -> None:
    """Read every parameter of `module` that has no content, and its persistent buffers, in their types."""
    for path, part in module.named_modules():
        for attribute, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.is_meta:
                name = ".".join(word for word in (prefix, path, attribute) if word)
                part._parameters[attribute] = nn.Parameter(_read(name, parameter, shards), requires_grad=False)
        _fill_buffers(part, ".".join(word for word in (prefix, path) if word), shards)


def _read(name: str, like: Tensor, shards: Shards) -> Tensor:
    value = shards.read(name).to(like.dtype)
    if value.shape != like.shape:
        raise ArtifactError(f"{name!r} is {list(value.shape)} in the shards, not {list(like.shape)}")
    return value


def _fill_buffers(part: nn.Module, path: str, shards: Shards) -> None:
    """Read the persistent buffers of this one module."""
    for attribute, buffer in _persistent(part):
        part._buffers[attribute] = _read(f"{path}.{attribute}".lstrip("."), buffer, shards)


def _persistent(part: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of this one module that belong to its state."""
    hidden = part._non_persistent_buffers_set
    return [(name, value) for name, value in part._buffers.items() if value is not None and name not in hidden]


def _fill_outer(model: nn.Module, blocks: list[str], shards: Shards) -> dict[str, Tensor]:
    """Read what is in no block; tied weights stay tied. Gives the tensors of the shards that belong to no block."""
    inside = tuple(f"{block}." for block in blocks)
    outer = {name: shards.read(name) for name in shards.names() if not name.startswith(inside)}
    same: dict[int, nn.Parameter] = {}
    for path, part in model.named_modules():
        if f"{path}.".startswith(inside):
            continue
        _fill_buffers(part, path, shards)
        for attribute, parameter in list(part._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            if name in outer:
                same[id(parameter)] = nn.Parameter(outer[name].to(parameter.dtype), requires_grad=False)
            if id(parameter) in same:
                part._parameters[attribute] = same[id(parameter)]
    _tie(model, outer)
    return outer


def _tie(model: nn.Module, outer: dict[str, Tensor]) -> None:
    """Give an output layer without weights of its own those of the input embedding, where the model ties them."""
    ends: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    if all(isinstance(end, nn.Module) for end in ends) and ends[1].weight.is_meta:
        ends[1].weight = ends[0].weight
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not any(name.startswith(f"{block}.") for block in _block_names(model)):
            raise ArtifactError(f"no shard holds the tensor {name!r}")


def stored_tensors(module: nn.Module, prefix: str, found: dict[str, Any]) -> dict[str, Tensor]:
    """What is stored of a quantized block: the parts of its encodings, noted in `found`, and its plain tensors."""
    tensors: dict[str, Tensor] = {}
    for name, encoding in encodings(module).items():
        full = f"{prefix}.{name}"
        tensors |= {f"{full}:{part}": value for part, value in encoding.parts().items()}
        found[full] = describe(encoding)
    for name, parameter in module.named_parameters():
        if "parametrizations" not in name.split("."):
            tensors[f"{prefix}.{name}"] = parameter
    for path, part in module.named_modules():
        if "parametrizations" not in path.split("."):
            named = ((f"{prefix}.{path}".rstrip("."), *each) for each in _persistent(part))
            tensors |= {f"{owner}.{name}": buffer for owner, name, buffer in named}
    return tensors


def describe(encoding: Encoding) -> dict[str, Any]:
    """An encoding without its content as plain values: kind, plain settings, and the form of each tensor in it."""
    page: dict[str, Any] = {"kind": encoding.kind, "form": encoding.form, "settings": {}, "tensors": {}}
    for each in dataclasses.fields(encoding):
        value = getattr(encoding, each.name)
        if isinstance(value, Tensor):
            page["tensors"][each.name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
        else:
            page["settings"][each.name] = value
    return page


def read_weight(name: str, page: dict[str, Any], shards: Shards) -> Tensor:
    """The floats of a stored weight: `page` is its entry in `encodings.json`."""
    blank = {key: torch.zeros(shape, dtype=getattr(torch, kind)) for key, (shape, kind) in page["tensors"].items()}
    encoding = KINDS[page["kind"]](**blank, **page["settings"])
    prefix = f"{name}:"
    parts = {key.removeprefix(prefix): shards.read(key) for key in shards.names() if key.startswith(prefix)}
    return encoding.restore(parts)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    prefix, _, last = name.rpartition(".")
    model.get_submodule(prefix)._modules[last] = module
