"""The commands. Each one calls the package, and prints what it found: a table, or with --json one JSON object."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .core.progress import Progress
    from .core.run import Run

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a trained PyTorch model small and fast, and prove it on the artifact that will be deployed.",
)

Objective = StrEnum("Objective", ["latency", "size", "energy", "accuracy"])
DEMO_FOLDER = "featherweight-demo"
DEMO_SECONDS = 150.0
# Typer carries its own copy of Click from 0.2x on; the base of "wrong usage" is the same class in both.
WrongUsage: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def names(text: str | None) -> list[str] | None:
    """The parts of a list with commas; None where nothing was said."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="file.py:function, package.module:function, or zoo:NAME.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What compress, apply or demo wrote.")]
TargetOption = Annotated[str, typer.Option("--target", help="The runtime; see: featherweight targets.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write; new, empty, or a run to go on with.")]
AxesOption = Annotated[
    str | None, typer.Option("--axes", help="What to measure, with commas between [default: all that there is].")
]
Seed = Annotated[int, typer.Option(help="Same seed, same model.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show warnings of libraries, and the traceback of an unexpected error.")
]


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help=f"Where to write [default: {DEMO_FOLDER}].")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Train a network on handwritten digits and compress it: all of featherweight in three minutes, offline."""

    def work(progress: Progress) -> tuple[Run, Path]:
        from . import api
        from .core.run import Budget

        folder = out or _demo_folder(progress)
        budget = Budget(objective="latency", max_drop=0.5)
        return api.compress(
            "zoo:digits", "onnxruntime", budget, out=folder, time=DEMO_SECONDS, progress=progress
        ).run, folder

    return _do(work, as_json, debug)


@app.command()
def compress(
    task: TaskArgument,
    out: Out,
    target: TargetOption = "onnxruntime",
    objective: Annotated[Objective, typer.Option(help="What is to be made as good as possible.")] = Objective.latency,
    max_drop: Annotated[float | None, typer.Option(help="How much of the metric may be lost, in its own unit.")] = None,
    max_size: Annotated[int | None, typer.Option(metavar="BYTES", help="How large the artifact may be.")] = None,
    max_latency: Annotated[
        float | None, typer.Option(metavar="MS", help="How long one input may take: p50, one thread.")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="TIME", help="How long all may take, such as 10m.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many recipes may be tried.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Search for the recipe that meets the bar best, export it, measure the artifact, write a report."""

    def work(progress: Progress) -> tuple[Run, Path]:
        from . import api

        budget = _budget(objective=objective.value, max_drop=max_drop, max_size=max_size, max_latency=max_latency)
        return api.compress(
            task, target, budget, out=out, time=time, trials=trials, seed=seed, progress=progress
        ).run, out

    return _do(work, as_json, debug)


@app.command("apply")
def apply_recipe(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships with featherweight."),
    ],
    task: TaskArgument,
    out: Out,
    target: TargetOption = "onnxruntime",
    axes: AxesOption = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Apply one recipe without any search, export, measure, write a report."""

    def work(progress: Progress) -> tuple[Run, Path]:
        from . import api

        chosen = names(axes)
        return api.apply(task, recipe, target, out=out, seed=seed, axes=chosen, progress=progress).run, out

    return _do(work, as_json, debug)


@app.command()
def measure(
    folder: Folder,
    axes: AxesOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure the artifact in DIR again, on this machine."""

    def work(progress: Progress) -> tuple[Run, Path]:
        from . import api

        return api.measure(folder, names(axes), progress=progress).run, folder

    return _do(work, as_json, debug, judge=False)


@app.command()
def diagnose(
    task: TaskArgument,
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="A method, or a recipe whose last step is looked at.")
    ] = "quantize.static",
    max_drop: Annotated[float | None, typer.Option(help="What may be lost, in the metric's own unit.")] = None,
    split: Annotated[
        str, typer.Option(help="The data that are looked at: validate, test, train or calibrate.")
    ] = "validate",
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs are looked at.")] = 512,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write the page; new or empty.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Rank the layers by what compressing each alone costs, and say which to skip."""

    def work(progress: Progress) -> dict[str, Any]:
        from . import api
        from .core.errors import FeatherweightError
        from .core.task import SPLITS

        chosen = next((name for name in SPLITS if name == split), None)
        if chosen is None:
            raise FeatherweightError(f"there is no split {split!r}; the splits are: {', '.join(SPLITS)}")
        found = api.diagnose(task, method, out, chosen, inputs, max_drop, seed, progress)
        return found.model_dump(mode="json") | {"line": found.line}

    def show(console: Any, answer: dict[str, Any]) -> None:
        from .terminal import show_diagnosis

        show_diagnosis(console, answer, out)

    return _show(work, show, as_json, debug)


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, or what compress or apply wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The coded checkpoint to write.")],
    like: Annotated[
        str | None, typer.Option(metavar="TASK", help="A task with a model of the saved one's classes.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write a model to one small file: every tensor through an adaptive arithmetic coder."""

    def work(_: Progress) -> dict[str, Any]:
        from . import api
        from .core.task import find_task

        api.pack(folder, file, None if like is None else find_task(like).original)
        return {"file": str(file), "bytes": file.stat().st_size}

    return _show(work, lambda out, answer: out.print(answer["file"], markup=False, soft_wrap=True), as_json, debug)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What pack wrote, or an artifact of the target coded.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to save the model; new or empty.")],
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Decode a coded checkpoint and save the model in DIR."""

    def work(_: Progress) -> dict[str, Any]:
        from . import api
        from .search.output import fresh

        with fresh(folder):
            return {"folder": str(api.unpack(file, folder))}

    return _show(work, lambda out, answer: out.print(answer["folder"], markup=False, soft_wrap=True), as_json, debug)


@app.command()
def report(folder: Folder, as_json: Json = False, debug: Debug = False) -> int:
    """Build the report again from what DIR holds."""

    def work(_: Progress) -> dict[str, Any]:
        from .report.build import rebuild

        return {"report": str(rebuild(folder))}

    return _show(work, lambda out, answer: out.print(answer["report"], markup=False, soft_wrap=True), as_json, debug)


@app.command()
def methods(as_json: Json = False, debug: Debug = False) -> int:
    """List the methods: settings, ranges, papers."""
    return _list("methods", as_json, debug)


@app.command()
def targets(as_json: Json = False, debug: Debug = False) -> int:
    """List the runtimes: what they carry, and what is not installed."""
    return _list("targets", as_json, debug)


@app.command()
def axes(as_json: Json = False, debug: Debug = False) -> int:
    """List what can be measured, and how."""
    return _list("axes", as_json, debug)


@app.command()
def tasks(as_json: Json = False, debug: Debug = False) -> int:
    """List the ready-made tasks."""
    return _list("tasks", as_json, debug)


# -- from a command to an exit code --------------------------------------------------------------------------------
def _do(work: Callable[[Progress], tuple[Run, Path]], as_json: bool, debug: bool, judge: bool = True) -> int:
    """Run a job and show its record; 2 if it was to meet a bar and did not."""
    from .terminal import console, show_run

    run, folder = _quietly(work, debug)
    missed = judge and not run.feasible
    if as_json:
        _emit(run.answer() | ({"error": run.verdict} if missed else {}))
    else:
        show_run(console(), run, folder, details=not judge)
    if missed:
        _tell(run.verdict)
    return 2 if missed else 0


def _list(what: str, as_json: bool, debug: bool) -> int:
    def work(_: Progress) -> dict[str, Any]:
        from . import catalog

        return {what: getattr(catalog, what)()}

    def show(out: Any, answer: dict[str, Any]) -> None:
        from .terminal import show_catalog

        show_catalog(out, answer[what])

    return _show(work, show, as_json, debug)


def _show(
    work: Callable[[Progress], dict[str, Any]], show: Callable[[Any, dict[str, Any]], None], as_json: bool, debug: bool
) -> int:
    from .terminal import console

    answer = _quietly(work, debug)
    if as_json:
        _emit(answer)
    else:
        show(console(), answer)
    return 0


def _quietly(work: Callable[[Progress], Any], debug: bool) -> Any:
    """Do the work with progress on standard error and nothing at all on standard output."""
    import warnings

    from .terminal import Bars, console, stdout_to_stderr

    with warnings.catch_warnings(), stdout_to_stderr(), Bars(console(stderr=True)) as progress:
        if not debug:
            warnings.simplefilter("ignore")  # libraries warn their own developers; ours are in the report
        return work(progress)


def _budget(**bars: Any) -> Any:
    from pydantic import ValidationError

    from .core.errors import FeatherweightError
    from .core.run import Budget
    from .core.step import one_line

    try:
        return Budget(**bars)
    except ValidationError as error:
        raise FeatherweightError(one_line(error)) from error


def _demo_folder(progress: Progress) -> Path:
    """The first demo folder that holds no finished demo, so that one which was stopped is gone on with."""
    folder, place = Path(DEMO_FOLDER), 1
    while (folder / "report.html").exists():
        place += 1
        folder = Path(f"{DEMO_FOLDER}-{place}")
    if place > 1:
        progress.say(f"{DEMO_FOLDER} holds a finished demo; writing to {folder}")
    return folder


def _emit(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, allow_nan=False), flush=True)


def _tell(message: str) -> None:
    print("featherweight: " + " ".join(message.split()), file=sys.stderr, flush=True)


def _user_message(error: BaseException) -> str | None:
    """One line for an error that the user can act on; None for one that is ours."""
    from .core.errors import FeatherweightError
    from .core.files import disk_message

    return str(error) if isinstance(error, FeatherweightError) else disk_message(error)


def _unexpected(error: BaseException, debug: bool) -> str:
    if debug:
        traceback.print_exception(error)
    with tempfile.NamedTemporaryFile(
        "w", prefix="featherweight-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        traceback.print_exception(error, file=log)
    return f"unexpected {type(error).__name__}: {error}; the traceback is in {log.name}, please report it"


def _fail(message: str, code: int, argv: list[str]) -> int:
    _tell(message)
    if "--json" in argv:
        _emit({"error": " ".join(message.split())})
    return code


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: an unexpected error; 2: wrong usage, or an error that the user can act on; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = typer.main.get_command(app).main(argv or ["--help"], prog_name="featherweight", standalone_mode=False)
    except WrongUsage as error:
        return _fail(f"{error.format_message().rstrip('.')}; see featherweight --help", 2, argv)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if (message := _user_message(error)) is not None:
            return _fail(message, 2, argv)
        return _fail(_unexpected(error, "--debug" in argv), 1, argv)
    if code == 130:
        return _fail("stopped; run the same command again to go on where it was", 130, argv)
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
