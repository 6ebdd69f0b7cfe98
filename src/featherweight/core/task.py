"""The user's problem: a model, data, a loss and a metric. The only thing that the package knows of their world."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import data as _data
from . import registry
from .errors import FeatherweightError, NotFinite, TaskError
from .files import tensor_digest
from .metric import Metric, top1
from .outputs import as_arrays, first
from .soft import copied

Split = Literal["train", "calibrate", "validate", "test"]
JUDGED = ("validate", "test")
SPLITS: tuple[Split, ...] = ("train", "calibrate", "validate", "test")
LABEL_NAMES = ("labels", "label", "target", "targets", "y")


def default_inputs(batch: Any) -> Any:
    """What of a batch goes into the model: of a mapping all but the labels, of a pair (inputs, labels) the inputs, of a
    longer tuple all but the last, in the order of the model's arguments; else the batch.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_NAMES}
    if isinstance(batch, tuple | list) and len(batch) > 2:
        return tuple(batch[:-1])
    return batch[0] if isinstance(batch, tuple | list) else batch


def labels(batch: Any) -> Any:
    """The labels of a batch: the entry named so in a mapping, the last one of a tuple."""
    if isinstance(batch, Mapping):
        for name in LABEL_NAMES:
            if name in batch:
                return batch[name]
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[-1]
    raise TaskError(
        "a batch has no labels: give (inputs, labels) or a mapping with 'labels', or a loss and a metric of your own"
    )


def cross_entropy(output: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of the first output (logits, N x classes) against the batch's labels (N)."""
    return nn.functional.cross_entropy(first(output), labels(batch))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, data to train, calibrate, validate and test, a loss, and a metric with its direction.

    `model` is a module or a function that gives one. Each split is a map-style data set (batched here) or an iterable
    of batches that can be gone through more than once. `inputs(batch)` says what goes into the model: a tensor, a tuple
    (positional) or a mapping (keywords). `loss(output, batch)` gets the model's own output; `metric` gets numpy arrays.
    `dynamic` names the free dimensions of each input ({"x": {0: "batch"}}); by default the first dimension of every
    input is the batch. `fingerprint` stands for model code and data in digests; without it the data are hashed, those
    of an iterable without regard to their order (augmented data have another digest each time: give a fingerprint).
    `calibrate` falls back to the first 512 inputs of `train`; `validate` has no fallback.
    """

    name: str
    model: nn.Module | Callable[[], nn.Module]
    train: Any = None
    calibrate: Any = None
    validate: Any = None
    test: Any = None
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metric: Metric = field(default_factory=top1)
    inputs: Callable[[Any], Any] = default_inputs
    dynamic: dict[str, dict[int, str]] | None = None
    batch_size: int = 64
    calibration_limit: int = 512
    fingerprint: str = ""
    source: str = ""
    notes: str = ""

    # -- the model -----------------------------------------------------------------------------------------------
    @cached_property
    def original(self) -> nn.Module:
        """The user's model in evaluation mode. Never modified: steps work on `fresh()`."""
        with torch.enable_grad():  # the function may train; who asks first may not want gradients
            made = (
                self.model if isinstance(self.model, nn.Module) else _call(self.model, f"the model of task {self.name}")
            )
        if not isinstance(made, nn.Module):
            raise TaskError(f"the model of task {self.name} is {type(made).__name__}, not a torch.nn.Module")
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NotFinite(
                    f"task {self.name}: the weight {name!r} holds NaN or infinite values; repair the model first"
                )
        return made if not any(module.training for module in made.modules()) else copied(made).eval()

    def fresh(self) -> nn.Module:
        """A copy of the user's model in evaluation mode."""
        return copied(self.original)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order, as its `forward` calls them."""
        return tuple(self.example)

    def named_inputs(self, batch: Any) -> dict[str, Tensor]:
        """The inputs in `batch`, by the name of the model's argument."""
        return bind(self.original, self.inputs(batch))

    def call(self, model: Callable[..., Any], batch: Any) -> Any:
        """Run `model` (or a loaded artifact, or anything that is called as the model is) on the inputs of `batch`."""
        given = self.inputs(batch)
        if isinstance(given, Mapping):
            return model(**given)
        return model(*given) if isinstance(given, tuple | list) else model(given)

    @cached_property
    def example(self) -> dict[str, Tensor]:
        """Two real inputs, by name: the first of the calibration split."""
        for split in ("calibrate", "train", "validate", "test"):
            if self._data(split) is not None:
                batch = next(iter(self.batches(split, batch_size=2)), None)
                if batch is None:
                    raise TaskError(f"task {self.name}: the split {split!r} is empty")
                named = self.named_inputs(batch)
                return {
                    name: tensor[:2].clone() if 0 in self.free(name) else tensor.clone()
                    for name, tensor in named.items()
                }
        raise TaskError(f"task {self.name} has no data; give at least calibrate and test")

    def free(self, name: str) -> dict[int, str]:
        """The dynamic dimensions of the input `name`: dimension -> label."""
        return {0: "batch"} if self.dynamic is None else self.dynamic.get(name, {})

    # -- the data ------------------------------------------------------------------------------------------------
    def has(self, split: Split) -> bool:
        return self._data(split) is not None

    def _data(self, split: str) -> Any:
        own = getattr(self, split)
        return self.train if own is None and split == "calibrate" else own

    def batches(
        self, split: Split, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Any]:
        """Batches of a split; shuffled and augmented if `generator` is given. Calibration stops at `calibration_limit`
        inputs.
        """
        data = self._data(split)
        if data is None:
            raise TaskError(f"task {self.name} has no {split!r} data, which this needs")
        seen = 0
        for batch in _data.batches(data, batch_size or self.batch_size, generator):
            for tensor in _data.tensors_in(batch):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise NotFinite(f"task {self.name}: a batch of the split {split!r} holds NaN or infinite values")
            yield batch
            seen += self.count(batch)
            if split == "calibrate" and seen >= self.calibration_limit:
                return

    def count(self, batch: Any) -> int:
        """How many inputs a batch holds: the length of its first tensor."""
        first_tensor = next(_data.tensors_in(batch), None)
        return 1 if first_tensor is None or first_tensor.dim() == 0 else len(first_tensor)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the model's weights and code, what the task does with them, and the data (or the fingerprint,
        where the task gives one).
        """
        digest = hashlib.sha256(f"{self.name};{self.calibration_limit};{self.batch_size};{self.dynamic}".encode())
        metric = self.metric
        for code in (type(self.original), self.loss, self.inputs, metric.record, metric.reduce, metric.agree):
            digest.update(source(code).encode())
        digest.update(f"{metric.name};{metric.higher_is_better}".encode())
        digest.update(tensor_digest(dict(self.original.state_dict())).encode())
        if self.fingerprint:
            digest.update(self.fingerprint.encode())
        else:
            for split in SPLITS:
                if getattr(self, split) is not None:
                    digest.update(split.encode() + self._data_digest(split))
        return digest.hexdigest()

    def _data_digest(self, split: Split) -> bytes:
        if not _data.is_map_style(getattr(self, split)):
            return _data.unordered_digest(_data.batches(getattr(self, split), self.batch_size))
        digest = hashlib.sha256()
        for batch in self.batches(split):
            digest.update(_data.content_digest(batch))
        return digest.digest()

    def check(self) -> None:
        """Run the model once on each split; raise one clear `TaskError` or `NotFinite` about what does not fit.

        Splits to judge on must give the same batches each time: artifacts are compared input by input.
        """
        for split in SPLITS:
            if self._data(split) is None:
                continue
            batch = next(iter(self.batches(split)), None)
            if batch is None:
                raise TaskError(f"task {self.name}: the split {split!r} is empty")
            self._check_batch(split, batch)
            if split in JUDGED:
                self._check_order(split, batch)

    def _check_order(self, split: Split, batch: Any) -> None:
        again = next(iter(self.batches(split)), None)
        before, after = (_data.content_digest(list(_data.tensors_in(each))) for each in (batch, again))
        if before != after:
            raise TaskError(
                f"task {self.name}: the split {split!r} gives other batches when it is gone through again; "
                "turn off shuffling and augmentation there, or give a list of batches"
            )

    @torch.no_grad()
    def _check_batch(self, split: str, batch: Any) -> None:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _data.tensors_in(batch))
        where = f"task {self.name}, split {split!r}, a batch of shapes {shapes}"
        try:
            output = self.call(self.original, batch)
        except FeatherweightError:
            raise
        except Exception as error:
            raise TaskError(f"{where}: the model fails on it: {_brief(error)}") from error
        arrays = as_arrays(output)
        if not torch.isfinite(torch.as_tensor(first(arrays))).all():
            raise NotFinite(f"{where}: the original model gives NaN or infinite outputs")
        try:
            records = self.metric.record(arrays, batch)
            loss = self.loss(output, batch) if self.train is not None and split == "train" else None
        except FeatherweightError:
            raise
        except Exception as error:
            raise TaskError(f"{where}: the loss or the metric fails on it: {_brief(error)}") from error
        if len(records) == 0:
            raise TaskError(f"{where}: the metric {self.metric.name} gives no record")
        if loss is not None and not torch.isfinite(loss).all():
            raise NotFinite(f"{where}: the loss is {float(loss)}")


def source(code: Any) -> str:
    """The source text of a class or function; its name where there is none to read."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', type(code).__name__)}"


def bind(model: nn.Module, given: Any) -> dict[str, Tensor]:
    """Name the inputs of a call as the model's `forward` does. Inputs must be tensors."""
    signature = inspect.signature(model.forward)
    try:
        if isinstance(given, Mapping):
            bound = signature.bind(**given)
        else:
            bound = signature.bind(*(given if isinstance(given, tuple | list) else (given,)))
    except TypeError as error:
        raise TaskError(f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    named: dict[str, Tensor] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise TaskError(f"{type(model).__name__}.forward takes *{name}; give its inputs names")
        else:
            named[name] = value
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TaskError(
                f"the input {name!r} is {type(value).__name__}, not a tensor; "
                "wrap the model so that each input is one tensor"
            )
    return named


# -- finding tasks by name ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ReadyMade:
    """A function that gives a ready-made task, with the environment variables and the packages that it needs."""

    function: Callable[[], Task]
    variables: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = "zoo"

    def __call__(self) -> Task:
        return self.function()


zoo: dict[str, ReadyMade] = {}


def ready_made(
    name: str, variables: tuple[str, ...] = (), packages: tuple[str, ...] = ()
) -> Callable[[Callable[[], Task]], Callable[[], Task]]:
    """Register a function that gives a ready-made task as `zoo:NAME`, and say what it needs to be there."""

    def register(function: Callable[[], Task]) -> Callable[[], Task]:
        zoo[name] = ReadyMade(function, variables, packages)
        return function

    return register


def find_task(spec: str | Task) -> Task:
    """The task that `spec` names: `file.py:function`, `package.module:function`, or `zoo:NAME`."""
    if isinstance(spec, Task):
        return spec
    task = find(spec, "task")
    if not isinstance(task, Task):
        raise TaskError(f"{spec} gives {type(task).__name__}, not a Task")
    return task if task.source else replace(task, source=spec)


def find(spec: str, what: str) -> Any:
    """What `spec` names in a file, a module or the zoo: the task or model there, or what the function there gives."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise TaskError(f"{spec!r} names no {what}; write file.py:function, package.module:function or zoo:NAME")
    if where == "zoo":
        registry.load("tasks")
        if name not in zoo:
            raise TaskError(f"there is no task zoo:{name}; the zoo holds: {', '.join(sorted(zoo))}")
        return zoo[name]()
    module = _module(where, spec)
    if not hasattr(module, name):
        raise TaskError(f"{where} has no {name!r}")
    found = getattr(module, name)
    return found if isinstance(found, Task | nn.Module) else _call(found, f"the {what} {spec}")


def _module(where: str, spec: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise TaskError(f"there is no file {where} (from {spec!r})")
        name = f"featherweight_task_{path.stem}"
        loader = importlib.util.spec_from_file_location(name, path)
        assert loader is not None and loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        sys.modules[name] = module
        sys.path.insert(0, str(path.parent.resolve()))
        try:
            loader.loader.exec_module(module)
        except Exception as error:
            raise TaskError(f"{where} cannot be imported: {_brief(error)}") from error
        finally:
            sys.path.remove(str(path.parent.resolve()))
        return module
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise TaskError(f"the module {where} cannot be imported: {_brief(error)}") from error


def _call(function: Any, what: str) -> Any:
    if not callable(function):
        raise TaskError(f"{what} is {type(function).__name__}; it must be a function or the thing itself")
    try:
        return function()
    except FeatherweightError:
        raise
    except Exception as error:
        raise TaskError(f"{what} raised {_brief(error)}") from error


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
