"""The target `torch`: the reference. An exported program in one file, with weights stored as asked."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from featherweight.core.encoding import Affine, Encoding, spread
from featherweight.core.errors import ArtifactError, NotCarried, OutputError
from featherweight.core.target import Session, Target, Work

if TYPE_CHECKING:  # not at run time: asking which targets there are must not load torch
    import torch
    from torch import Tensor, fx, nn

SCALE, ZERO = "__scale", "__zero"  # ends of the names of what belongs to a stored weight
# All that a file of ours holds. Compiled libraries, custom objects and legacy weights, which torch would load or
# unpickle, are not in it.
ENTRIES = re.compile(
    r"[^/]+/(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/\w+)"
)


class Torch(Target, name="torch"):
    """Write an exported program (`torch.export`) and run it with PyTorch, operator by operator.

    Weights lie on the disk as asked and become floats when they are used: this target shows what a model computes, not
    how fast it can be.
    """

    file: ClassVar[str] = "model.pt2"
    carries: ClassVar[frozenset[str]] = frozenset({"int8", "uint8"})
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        import torch

        from featherweight.model.graph import capture, captured

        program = capture(store(captured(plain, example, free), stored), example, free)
        for node in (
            program.graph.nodes
        ):  # where in the source an operator came from is most of the file, and not needed to run it
            for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                node.meta.pop(note, None)
        try:
            torch.export.save(program, path)
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"cannot write {path}: {_brief(error)}; free some space or choose another folder"
            ) from error

    def load(self, path: Path, threads: int = 1) -> Session:
        import torch

        from featherweight.core.outputs import as_arrays

        module = read(path).module(check_guards=False)

        def run(**inputs: np.ndarray) -> list[np.ndarray]:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return _listed(
                        as_arrays(module(**{name: torch.from_numpy(array) for name, array in inputs.items()}))
                    )
            finally:
                torch.set_num_threads(before)

        return run

    def stored(self, path: Path) -> dict[str, str]:
        return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in sorted(weights(read(path)).items())}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        program = read(path)
        tensors = {
            **program.state_dict,
            **{name: value for name, value in program.constants.items() if hasattr(value, "element_size")},
        }
        return Work(
            parameters=sum(tensor.numel() for tensor in weights(program).values()),
            macs=multiply_accumulates(program, example),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        )


def store(module: fx.GraphModule, stored: dict[str, Encoding]) -> fx.GraphModule:
    """Hold each weight named in `stored` as integers under its own name, and compute the floats in the graph; changes
    `module`.

    Raises `ArtifactError` if the graph does not read such a weight.
    """
    for name, encoding in stored.items():
        nodes = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]
        if not nodes:
            raise ArtifactError(
                f"the captured model does not read the weight {name!r}, which is to be stored as {encoding.form}; "
                "is that layer used?"
            )
        if not isinstance(encoding, Affine):
            raise NotCarried(f"the weight {name!r} is stored as {encoding.form}, which the target torch does not carry")
        _hold(module, name, encoding)
        for node in nodes:
            _decode(module.graph, node, name, encoding)
    module.recompile()
    return module


def _hold(module: nn.Module, name: str, encoding: Affine) -> None:
    prefix, _, last = name.rpartition(".")
    owner = module.get_submodule(prefix)
    delattr(owner, last)
    owner.register_buffer(last, encoding.values.cpu())
    owner.register_buffer(last + SCALE, spread(encoding.scale.cpu(), encoding.values, encoding.axis))
    owner.register_buffer(last + ZERO, spread(encoding.zero.cpu(), encoding.values, encoding.axis))


def _decode(graph: fx.Graph, node: fx.Node, name: str, encoding: Affine) -> None:
    """`(values - zero) * scale`, in floats, in place of `node`."""
    import torch

    aten = torch.ops.aten
    with graph.inserting_before(node):
        values, scale, zero = (graph.get_attr(name + end) for end in ("", SCALE, ZERO))
        floats, offset = (graph.call_function(aten.to.dtype, (value, torch.float32)) for value in (values, zero))
        result = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.sub.Tensor, (floats, offset)), scale))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def weights(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The weights of a program by name, in the form in which they are stored."""
    parameters, held = {name for name, _ in program.named_parameters()}, program.state_dict
    return {name: tensor for name, tensor in held.items() if name in parameters or name + SCALE in held}


def read(path: Path) -> torch.export.ExportedProgram:
    """The program in the file; raises `ArtifactError` if it is damaged, or holds anything that would have to be
    unpickled freely.
    """
    import torch

    import featherweight.model.port  # noqa: F401  registers the operators that quantize activations

    try:
        _refuse_pickles(path)
        return torch.export.load(path)
    except ArtifactError:
        raise
    except Exception as error:  # torch raises errors of many kinds here, down to AssertionError and KeyError
        raise ArtifactError(
            f"{path} is damaged and cannot be loaded by torch ({_brief(error)}); export it again"
        ) from error


def _refuse_pickles(path: Path) -> None:
    """`torch.export.load` unpickles some entries without restriction; let none of these through.

    The weights of a file of ours are raw bytes. Its one pickle is that of the (empty) sample inputs, which the
    restricted unpickler reads.
    """
    import torch

    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not ENTRIES.fullmatch(name):
                raise ArtifactError(f"{path} holds {name!r}, which no artifact of this package holds; export it again")
            if name.endswith("_config.json"):
                config = json.loads(archive.read(name))["config"]
                if any(entry["use_pickle"] for entry in config.values()):
                    raise ArtifactError(f"{path} holds pickled tensors, which are not loaded; export it again")
            elif name.endswith(".pt"):
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)


def multiply_accumulates(program: torch.export.ExportedProgram, example: dict[str, np.ndarray]) -> int:
    """Multiply-accumulates of one run of the first input: products as torch's own counter counts them, and recurrent
    layers.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    free = {name: 0 in _free(program, name, array) for name, array in example.items()}
    given = {name: torch.from_numpy(array[:1] if free[name] else array) for name, array in example.items()}
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops, attention: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter:
        program.module(check_guards=False)(**given)
    return counter.get_total_flops() // 2


def _recurrent_flops(
    input_shape: Any, weight_shape: Any, hidden_shape: Any, *rest: Any, out_shape: Any = None, **named: Any
) -> int:
    """Twice the multiply-accumulates of one recurrent layer and direction: steps x batch x entries of its weights."""
    return 2 * input_shape[0] * input_shape[1] * (math.prod(weight_shape) + math.prod(hidden_shape))


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *rest: Any, **named: Any) -> int:
    """Twice the multiply-accumulates of attention: queries times keys, and weights times values."""
    return 2 * math.prod(query_shape[:-1]) * key_shape[-2] * (query_shape[-1] + value_shape[-1])


def _free(program: torch.export.ExportedProgram, name: str, array: np.ndarray) -> set[int]:
    """The dimensions of an input that the program leaves free."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == name:
            return {place for place, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)}
    return set()


def _listed(output: Any) -> list[np.ndarray]:
    if isinstance(output, np.ndarray):
        return [output]
    return list(output.values()) if isinstance(output, dict) else list(output)


def _brief(error: Exception) -> str:
    lines = str(error).split()
    return f"{type(error).__name__}: {' '.join(lines)[:150]}"
