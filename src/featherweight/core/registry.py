"""Methods, targets, axes and tasks are found, never listed: by the entry points of installed packages."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType


@functools.cache
def load(group: str) -> tuple[ModuleType, ...]:
    """Import every module of every package that registers itself under the entry point group `featherweight.<group>`.

    A new method, target, axis or task is a new file in such a package (ours or somebody else's); no list is edited.
    """
    modules: list[ModuleType] = []
    for point in entry_points(group=f"featherweight.{group}"):
        package = importlib.import_module(point.value)
        modules.append(package)
        if hasattr(package, "__path__"):
            for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                modules.append(importlib.import_module(found.name))
    return tuple(modules)


def need(package: str, extra: str) -> ModuleType:
    """Import `package`, or raise `MissingExtra` with the command that installs it.

    A package that is there but lacks another one of its own raises what Python raises: the extra would not help.
    """
    from .errors import MissingExtra

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if not f"{package}.".startswith(f"{error.name}."):
            raise
        raise MissingExtra(
            f"the package {package} is not installed; run: pip install 'featherweight[{extra}]'"
        ) from error
