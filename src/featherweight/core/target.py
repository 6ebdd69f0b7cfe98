"""A target: a runtime that an artifact is written for, and the artifact itself."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from . import registry
from .adapter import FILE, AdapterFile, Switching, none
from .encoding import Encoding, Sparse, holds_zeros
from .errors import ArtifactError, MissingExtra, NotCarried, NotFinite, RecipeError
from .files import file_digest, folder_size, recover_folder, whole_folder, write_json
from .manifest import Agreement as Agreement
from .manifest import Input as Input
from .manifest import Manifest as Manifest
from .manifest import Work as Work
from .outputs import Layout, named_outputs, rebuild
from .step import one_line

if (
    TYPE_CHECKING
):  # a process that only runs an artifact must not carry torch: what it weighs there is what a user will see
    from torch import Tensor, nn


PACKED = "packed"  # in `carries`: every form whose encoding says what lies on the disk and restores itself from it


Session = Callable[..., list[np.ndarray]]


class Artifact:
    """A deployable folder: the runtime's file, `example.npz` with real inputs, and `manifest.json`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        recover_folder(self.folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ArtifactError(f"{self.folder} holds no artifact (no manifest.json)")
        try:
            self.manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ArtifactError(f"{path} cannot be read: {one_line(error)}") from error

    @property
    def file(self) -> Path:
        return self.folder / self.manifest.file

    @property
    def target(self) -> Target:
        settings = dict(self.manifest.target)
        return target(settings.pop("name"), **settings)

    def bytes(self) -> int:
        """Size of what must be shipped to run it: the folder, or the file with what lies beside it by its name."""
        if self.file.is_dir():
            return folder_size(self.file)
        return self.file.stat().st_size + sum(file.stat().st_size for file in self.folder.glob(f"{self.file.name}.*"))

    @property
    def adapter(self) -> Path | None:
        """The file of the adapter that it was exported with, which other artifacts of its base take; None without."""
        return self.folder / FILE if self.manifest.slots else None

    def verify(self) -> None:
        """Compare every file with its digest; raise `ArtifactError` that names the first that differs or is missing."""
        for name, digest in self.manifest.digests.items():
            path = self.folder / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; the artifact is incomplete")
            if file_digest(path) != digest:
                raise ArtifactError(f"{path} is not the file that was written (its digest differs); export it again")

    def example(self) -> dict[str, np.ndarray]:
        """Real inputs by name, as arrays."""
        with np.load(self.folder / "example.npz", allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def open(self, threads: int = 1) -> Runner:
        """Verify the files, load them in the runtime, and give something that is called as the torch model is."""
        self.verify()
        return Runner(self.target.load(self.file, threads), self.manifest)


def tensors_for(manifest: Manifest, adapter: str | Path) -> dict[str, np.ndarray]:
    """What stands in an artifact's slots with the adapter in this file; raises `ArtifactError` if it does not fit."""
    return AdapterFile.read(adapter).fitting(manifest.base, manifest.slots, manifest.places, adapter)


class Runner:
    """A loaded artifact: called with arrays or tensors by position or name, it gives numpy arrays in the torch model's
    layout.
    """

    def __init__(self, session: Session, manifest: Manifest):
        self.session, self.manifest = session, manifest

    def use(self, adapter: str | Path | None) -> None:
        """Run with the adapter in this file from now on, or with none: the base stays loaded as it is.

        Raises `ArtifactError` for a file of another base, or one that does not fit.
        """
        slots = self.manifest.slots
        if not slots or not isinstance(self.session, Switching):
            raise ArtifactError(
                "this artifact has no adapter to switch: export a model with adapters kept beside their layers "
                "(merge: false) to onnxruntime"
            )
        self.session.use(none(slots) if adapter is None else tensors_for(self.manifest, adapter))

    def prepare(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """The inputs by name, as contiguous arrays of the artifact's types.

        Raises `ArtifactError` if one is missing, unknown, or given twice.
        """
        expected = [item.name for item in self.manifest.inputs]
        positional = dict(zip(expected, args))
        faults = {
            "missing": [name for name in expected if name not in positional and name not in kwargs],
            "unknown": sorted(set(kwargs) - set(expected)),
            "given twice": sorted(set(kwargs) & set(positional)),
            "too many": [f"{len(args)} by position"] if len(args) > len(expected) else [],
        }
        if any(faults.values()):
            what = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
            raise ArtifactError(f"the artifact takes the inputs {', '.join(expected)}; {what}")
        named = {**positional, **kwargs}
        return {item.name: np.ascontiguousarray(named[item.name], dtype=item.dtype) for item in self.manifest.inputs}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return rebuild(
            self.manifest.layout, dict(zip(self.manifest.outputs, self.session(**self.prepare(*args, **kwargs))))
        )


class Target(BaseModel, ABC):
    """A runtime with its settings: writes a file from a model, loads it, runs it, and reads back what really lies on
    the disk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: ClassVar[dict[str, type[Target]]] = {}
    name: ClassVar[str] = ""
    file: ClassVar[str] = ""  # the name of the file or folder it writes
    carries: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    width_multiple: ClassVar[int] = 1

    def __init_subclass__(cls, name: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if name:
            cls.name = name
            Target.kinds[name] = cls

    @classmethod
    def refuses(cls, forms: Iterable[str]) -> list[str]:
        """Those of these forms of weights that this target cannot store; zeros in a pattern are also zeros anywhere."""
        return sorted(form for form in forms if not cls.carries & {form, "sparse" if holds_zeros(form) else PACKED})

    @abstractmethod
    def write(
        self,
        plain: nn.Module,
        stored: dict[str, Encoding],
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        path: Path,
    ) -> None:
        """Write `plain` (floats) to `path`, each weight named in `stored` in that form.

        `free` says which input dimensions are dynamic.
        """

    @abstractmethod
    def load(self, path: Path, threads: int = 1) -> Session:
        """Load the file; the session takes arrays by input name and gives the outputs as a list of arrays."""

    @abstractmethod
    def stored(self, path: Path) -> dict[str, str]:
        """What really lies on the disk: name of each stored weight -> form ("float32", "int8")."""

    @abstractmethod
    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        """Parameters, multiply-accumulates and bytes of one inference, read off the file."""

    def slots(self, path: Path) -> dict[str, list[int]]:
        """The tensors of adapters that lie in the file as inputs, by name: their shapes, -1 where any size will do."""
        return {}

    def evidence(self, path: Path) -> dict[str, Any]:
        """What the runtime itself says of how it runs the file, such as the number of its integer kernels."""
        return {}

    @classmethod
    def missing(cls) -> list[str]:
        """The packages that this target needs and that are not installed."""
        import importlib.util

        return [package for package in cls.packages if importlib.util.find_spec(package) is None]

    @final
    def export(
        self,
        model: nn.Module,
        example: dict[str, Tensor],
        folder: str | Path,
        free: dict[str, dict[int, str]] | None = None,
        bound: float | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> Artifact:
        """Write, load, run, compare, read back: an artifact that was never run does not leave this function.

        `example` holds real inputs by name; it is run at batch 1 and at its full batch (a single one is given twice).
        The outputs must be within `bound` (relative root mean square; default 1e-3 for floats, 0.1 where integers
        compute) of the torch model's. Raises `NotCarried` for a form that this target does not carry, `ArtifactError`
        if what was written is not what was asked for or does not agree.
        """
        from .adapted import adapter_of
        from .soft import encodings, fold

        free = {name: {0: "batch"} for name in example} if free is None else free
        asked = encodings(model)
        dense = sorted(
            name for name, encoding in asked.items() if isinstance(encoding, Sparse) and self.refuses([encoding.form])
        )
        stored = {name: encoding for name, encoding in asked.items() if name not in dense}
        for name, encoding in stored.items():
            if self.refuses([encoding.form]):
                raise NotCarried(
                    f"the weight {name!r} is stored as {encoding.form}, which the target {self.name} does not carry; "
                    f"it carries: {', '.join(sorted(self.carries)) or 'plain floats only'}"
                )
        plain = fold(model).cpu().eval()
        example = _two_inputs({name: tensor.detach().cpu() for name, tensor in example.items()}, free)
        if bound is None:
            bound = 0.1 if stored else 1e-3
        with whole_folder(Path(folder)) as temporary:
            path = temporary / self.file
            self.write(plain, stored, example, free, path)
            found = self.stored(path)
            for name, encoding in stored.items():
                if found.get(name) != encoding.form:
                    raise ArtifactError(
                        f"{self.name} stored {name!r} as {found.get(name, 'nothing')}, not as {encoding.form}"
                    )
            compared = self._compare(plain, path, example, free, bound)
            manifest = self._manifest(path, example, free, found, dense, compared, recipe, adapter_of(model))
            write_json(temporary / "manifest.json", manifest.model_dump(mode="json"))
        return Artifact(folder)

    def _manifest(
        self,
        path: Path,
        example: dict[str, Tensor],
        free: dict[str, dict[int, str]],
        stored: dict[str, str],
        dense: list[str],
        compared: tuple[Layout, list[str], Agreement],
        recipe: dict[str, Any] | None,
        adapter: AdapterFile | None,
    ) -> Manifest:
        """What was written beside `path`, the example inputs and the adapter (which it saves) included."""
        slots = self.slots(path)
        if slots and adapter is not None:
            adapter.write(path.parent / FILE)
        arrays = {name: tensor.numpy() for name, tensor in example.items()}
        np.savez(path.parent / "example.npz", **arrays)  # type: ignore[arg-type]
        inputs = [
            Input(
                name=name,
                shape=[-1 if place in free.get(name, {}) else size for place, size in enumerate(array.shape)],
                dtype=str(array.dtype),
            )
            for name, array in arrays.items()
        ]
        files = [file for file in sorted(path.parent.rglob("*")) if file.is_file()]
        layout, outputs, agreement = compared
        return Manifest(
            target={"name": self.name, **self.model_dump(mode="json")},
            file=self.file,
            inputs=inputs,
            layout=layout,
            outputs=outputs,
            stored=stored,
            dense=dense,
            base=adapter.base if slots and adapter is not None else "",
            slots=slots,
            places=adapter.places if slots and adapter is not None else {},
            evidence=self.evidence(path),
            work=self.work(path, arrays),
            agreement=agreement,
            recipe=recipe or {"steps": []},
            digests={str(file.relative_to(path.parent)): file_digest(file) for file in files},
            versions=_versions("featherweight", "torch", *self.packages),
        )

    def _compare(
        self, plain: nn.Module, path: Path, example: dict[str, Tensor], free: dict[str, dict[int, str]], bound: float
    ) -> tuple[Layout, list[str], Agreement]:
        """Run torch and the runtime on the example, and on its first input alone, and compare every output."""
        import torch

        session = self.load(path)
        size = max((len(tensor) for name, tensor in example.items() if 0 in free.get(name, {})), default=1)
        worst, relative = 0.0, 0.0
        for count in sorted({1, size}):
            part = {name: tensor[:count] if 0 in free.get(name, {}) else tensor for name, tensor in example.items()}
            with torch.no_grad():
                layout, named = named_outputs(plain(**part))
            got = session(**{name: tensor.numpy() for name, tensor in part.items()})
            if len(got) != len(named):
                raise ArtifactError(f"{self.name} gives {len(got)} outputs, the torch model {len(named)}")
            for (name, tensor), array in zip(named.items(), got):
                want = tensor.detach().double().numpy()
                if want.shape != array.shape:
                    raise ArtifactError(
                        f"{self.name} gives {name!r} of shape {array.shape} for a batch of {count}, "
                        f"the torch model {want.shape}"
                    )
                if not np.isfinite(want).all():
                    raise NotFinite(f"the torch model gives NaN or infinite values in {name!r}")
                if not np.isfinite(array).all():
                    raise ArtifactError(f"{self.name} gives NaN or infinite values in {name!r}")
                difference = np.abs(array.astype(np.float64) - want)
                worst = max(worst, float(difference.max(initial=0)))
                relative = max(relative, float(np.sqrt((difference**2).mean()) / max(np.sqrt((want**2).mean()), 1e-12)))
        if relative > bound:
            raise ArtifactError(
                f"the outputs of {self.name} differ from the torch model's by {relative:.2g} (relative), "
                f"more than {bound:.2g}"
            )
        return layout, list(named), Agreement(batches=sorted({1, size}), max_abs=worst, relative=relative, bound=bound)


def _two_inputs(example: dict[str, Tensor], free: dict[str, dict[int, str]]) -> dict[str, Tensor]:
    """The example with a batch of at least two: at one alone, a size that the export has fixed would not be seen."""
    import torch

    return {
        name: torch.cat([tensor, tensor]) if 0 in free.get(name, {}) and len(tensor) == 1 else tensor
        for name, tensor in example.items()
    }


def target(name: str, **settings: Any) -> Target:
    """The target called `name` with these settings; raises one clear error if it is unknown or not installed."""
    registry.load("targets")
    if name not in Target.kinds:
        raise RecipeError(f"there is no target {name!r}; the targets are: {', '.join(sorted(Target.kinds))}")
    kind = Target.kinds[name]
    if missing := kind.missing():
        raise MissingExtra(
            f"the target {name} needs {', '.join(missing)}; run: pip install 'featherweight[{kind.extra or name}]'"
        )
    try:
        return kind(**settings)
    except ValidationError as error:
        raise RecipeError(f"target {name}: {one_line(error)}") from error


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
