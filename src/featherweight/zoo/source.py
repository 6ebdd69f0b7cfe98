"""Where the ready-made tasks find their files: the data folder, and a cache of what was made from them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..core.errors import OutputError, TaskError
from ..core.files import file_digest, value_digest, whole_file

DATA, CACHE = "FEATHERWEIGHT_DATA", "FEATHERWEIGHT_CACHE"


class Source:
    """The files of one ready-made task in the data folder, which the environment variable FEATHERWEIGHT_DATA names.

    `files` are paths relative to that folder. Raises `TaskError` if the variable is not set, or a file is not there.
    """

    def __init__(self, task: str, *files: str):
        where = os.environ.get(DATA, "")
        if not where:
            raise TaskError(f"zoo:{task} needs the data folder: set {DATA} to it")
        self.task, self.folder, self.files = task, Path(where), files
        for file in files:
            if not self.path(file).is_file():
                raise TaskError(
                    f"zoo:{task} needs {file}, which is not in {self.folder}: set {DATA} to the data folder"
                )

    def path(self, file: str) -> Path:
        return self.folder / file

    def fingerprint(self, version: int) -> str:
        """SHA-256 that stands for the bytes of the files and for the version of the code that reads them."""
        return value_digest([self.task, version, [(file, file_digest(self.path(file))) for file in self.files]])

    def module(self, name: str) -> ModuleType:
        """The Python module `name` of the data folder: "nets" (architectures) or "load" (readers)."""
        return import_file(f"featherweight_data_{name}", self.path(f"{name}.py"))

    def weights(self, model: nn.Module, file: str) -> nn.Module:
        """Put the weights that `file` (safetensors) holds into `model`, in evaluation mode."""
        from safetensors.torch import load_file

        model.load_state_dict(load_file(self.path(file)))
        return model.eval()

    def cached(self, file: str, version: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that `make` decodes from `file`, decoded once per content of the file."""
        return cached(file.split("/")[-1].split(".")[0], [file_digest(self.path(file)), version], make)


def import_file(name: str, path: Path) -> ModuleType:
    """Import the Python file at `path` under `name`, once; classes in it can be pickled and their source found."""
    if name in sys.modules and Path(sys.modules[name].__file__ or "") == path:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TaskError(f"{path} is no Python file: set {DATA} to the data folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    """Where things made once are kept: FEATHERWEIGHT_CACHE, or ~/.cache/featherweight."""
    where = os.environ.get(CACHE, "")
    return Path(where) if where else Path.home() / ".cache" / "featherweight"


def cached(name: str, key: list[object], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` gives, kept in the cache folder under `name` and the digest of `key` (JSON values).

    Raises `OutputError` if the folder cannot be written or the kept file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_folder() / f"{name}-{value_digest(key)[:16]}.safetensors"
    if not path.is_file():
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        try:
            with whole_file(path) as temporary:
                save_file(made, temporary)
        except OutputError as error:
            raise OutputError(f"{error}; the environment variable {CACHE} names it") from error
        return made
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OutputError(f"the cached file {path} is damaged; delete it") from error


def version_of_torch() -> str:
    """Part of the key of trained weights: another version may round otherwise."""
    return str(torch.__version__)
