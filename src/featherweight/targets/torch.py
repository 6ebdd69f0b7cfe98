"""The target `torch`: the reference. An exported program in one file, with weights stored as asked."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from featherweight.core.encoding import Encoding
from featherweight.core.errors import ArtifactError, OutputError
from featherweight.core.storage import Packed
from featherweight.core.target import PACKED, Session, Target, Work

if TYPE_CHECKING:  # not at run time: asking which targets there are must not load torch
    import torch
    from torch import Tensor, fx, nn

PART = "__"  # "weight__scale" is a part of the stored weight "weight", whose first part bears its name
NOTES = "stored.json"  # what the stored weights are, by name
# All that a file of ours holds. Compiled libraries, custom objects and legacy weights, which torch would load or
# unpickle, are not in it.
ENTRIES = re.compile(
    r"[^/]+/(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/stored\.json"
    r"|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|\.data/\w+)"
)


class Torch(Target, name="torch"):
    """Write an exported program (`torch.export`) and run it with PyTorch, operator by operator.

    Weights lie on the disk as asked and become floats when they are used: this target shows what a model computes, not
    how fast it can be.
    """

    file: ClassVar[str] = "model.pt2"
    carries: ClassVar[frozenset[str]] = frozenset({"int8", "uint8", PACKED})
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
            notes = {name: str(Packed.of(encoding)) for name, encoding in stored.items()}
            torch.export.save(program, path, extra_files={NOTES: json.dumps(notes)})
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"cannot write {path}: {_brief(error)}; free some space or choose another folder"
            ) from error

    def load(self, path: Path, threads: int = 1) -> Session:
        import torch

        from featherweight.core.outputs import as_arrays

        module = read(path)[0].module(check_guards=False)

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
        return {name: held.form for name, held in sorted(weights(*read(path)).items())}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        from featherweight.model.macs import multiply_accumulates

        program, notes = read(path)
        batched = {name for name, array in example.items() if 0 in _free(program, name, array)}
        tensors = {
            **program.state_dict,
            **{name: value for name, value in program.constants.items() if hasattr(value, "element_size")},
        }
        return Work(
            parameters=sum(held.entries for held in weights(program, notes).values()),
            macs=multiply_accumulates(program.module(check_guards=False), example, batched),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        )


def store(module: fx.GraphModule, stored: dict[str, Encoding]) -> fx.GraphModule:
    """Hold the parts of each weight named in `stored`, the first under its own name, and compute the floats from them
    in the graph; changes `module`.

    Raises `ArtifactError` if the graph does not read such a weight.
    """
    from featherweight.model.restore import signature

    graphs: dict[Hashable, fx.GraphModule] = {}
    for name, encoding in stored.items():
        nodes = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]
        if not nodes:
            raise ArtifactError(
                f"the captured model does not read the weight {name!r}, which is to be stored as {encoding.form}; "
                "is that layer used?"
            )
        parts = _hold(module, name, encoding)
        kind = signature(encoding)
        if kind not in graphs:
            graphs[kind] = _restoring(encoding)
        _restore(module, nodes, parts, graphs[kind])
    module.recompile()
    return module


def _hold(module: nn.Module, name: str, encoding: Encoding) -> list[str]:
    """Put the parts of `encoding` in place of a weight; gives their names."""
    from featherweight.model.restore import parts_of

    prefix, _, last = name.rpartition(".")
    owner = module.get_submodule(prefix)
    delattr(owner, last)
    ends: list[str] = []
    for part, tensor in parts_of(encoding).items():
        ends.append(PART + part if ends else "")
        owner.register_buffer(last + ends[-1], tensor)
    return [name + end for end in ends]


def _restoring(encoding: Encoding) -> fx.GraphModule:
    """The operations that restore a weight: placeholders are its parts."""
    import torch

    from featherweight.model.restore import capture_restore

    module = capture_restore([encoding]).module(check_guards=False)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    return module


def _restore(module: fx.GraphModule, nodes: list[fx.Node], parts: list[str], restoring: fx.GraphModule) -> None:
    """Compute the weight from its parts, in front of the first of `nodes` (which read it) and in place of them all."""
    names, copies = iter(parts), {}
    with module.graph.inserting_before(nodes[0]):
        for old in restoring.graph.nodes:
            if old.op == "placeholder":
                copies[old] = module.graph.get_attr(next(names))
            elif old.op == "get_attr":
                copies[old] = _constant(module, restoring.get_buffer(str(old.target)))
            elif old.op == "call_function":
                copies[old] = module.graph.node_copy(old, copies.__getitem__)
            elif old.op == "output":
                (result,) = old.all_input_nodes
    for node in nodes:
        node.replace_all_uses_with(copies[result])
        module.graph.erase_node(node)


def _constant(module: fx.GraphModule, tensor: Tensor) -> fx.Node:
    name = f"constant{PART}{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, tensor)
    return module.graph.get_attr(name)


def weights(program: torch.export.ExportedProgram, notes: dict[str, str]) -> dict[str, Packed]:
    """The weights of a program by name: what is noted of each where its bytes bear that out, else what it is itself."""
    parameters, found = {name for name, _ in program.named_parameters()}, {}
    for name, tensor in program.state_dict.items():
        if name in parameters or name in notes:
            plain = Packed(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            found[name] = Packed.read(notes.get(name, ""), tensor.numel() * tensor.element_size()) or plain
    return found


def read(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The program in the file, and what it notes of its weights.

    Raises `ArtifactError` if the file is damaged, or holds anything that would have to be unpickled freely.
    """
    import torch

    import featherweight.model.dispatch
    import featherweight.model.port  # noqa: F401  register the operators that deal tokens out and quantize activations

    try:
        _refuse_pickles(path)
        extra = {NOTES: ""}
        program = torch.export.load(path, extra_files=extra)
        return program, json.loads(extra[NOTES])
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
