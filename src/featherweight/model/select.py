"""The one way in which layers are chosen: by type, by glob on their full names, minus those to skip."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from ..core.step import Step

if TYPE_CHECKING:
    from ..core.context import Context

Kinds = tuple[type[nn.Module], ...]


def patterns(text: str) -> tuple[str, ...]:
    """The globs in a comma-separated list; blanks around them do not count."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def excluded(name: str, only: str = "*", skip: tuple[str, ...] = ()) -> str | None:
    """Why the layer `name` is not chosen, or None if it is; globs match the whole name, `skip` wins over `only`."""
    for glob in skip:
        if fnmatchcase(name, glob):
            return f"excluded by skip={glob!r}"
    if not any(fnmatchcase(name, glob) for glob in patterns(only)):
        return f"not chosen by only={only!r}"
    return None


def select(
    model: nn.Module, types: Kinds, only: str = "*", skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every module of one of `types` whose full name matches a glob of `only` (comma-separated) and none of `skip`.

    They come in module order. A module that is used under several names is given once, under the first of them. The
    model may be changed while this is gone through.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, types) and excluded(name, only, skip) is None:
            yield name, module


def left_out(model: nn.Module, types: Kinds, only: str = "*", skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every module of one of `types` that `select` does not give: its name and the reason."""
    for name, module in list(model.named_modules()):
        reason = excluded(name, only, skip)
        if isinstance(module, types) and reason is not None:
            yield name, reason


def unused(model: nn.Module, types: Kinds, only: str = "*", skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Every glob of `only` and `skip` that matches no module of these types: most likely a slip of the pen."""
    names = [name for name, module in model.named_modules() if isinstance(module, types)]
    for glob in (*patterns(only), *skip):
        if glob != "*" and not any(fnmatchcase(name, glob) for name in names):
            yield glob


class LayerStep(Step):
    """A step that works on chosen layers.

    `only` is a comma-separated list of globs on full module names, `skip` a list of globs of layers to leave alone.
    """

    only: str = "*"
    skip: tuple[str, ...] = ()

    def alone(self) -> LayerStep:
        """This step without repairs that reach across layers: what a diagnosis applies, layer by layer."""
        return self

    def layers(self, model: nn.Module, ctx: Context, types: Kinds) -> list[tuple[str, nn.Module]]:
        """The chosen layers of these types.

        Those not chosen are reported as left alone, and globs that match nothing as a warning.
        """
        for name, reason in left_out(model, types, self.only, self.skip):
            ctx.leave(name, reason)
        for glob in unused(model, types, self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        return list(select(model, types, self.only, self.skip))
