"""The commands: what they print, where, and with which exit code."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from featherweight import catalog, cli
from featherweight.cli import main, names
from featherweight.core.axis import Axis
from featherweight.core.progress import Progress
from featherweight.core.run import Run
from featherweight.core.step import Step
from featherweight.core.target import Target
from featherweight.core.task import zoo
from featherweight.terminal import Bars, console, gains_table

TASKS = str(Path(__file__).parent / "tiny_tasks.py")
COMMANDS = ["demo", "compress", "apply", "measure", "diagnose", "report", "methods", "targets", "axes", "tasks"]
READING = {
    "subject",
    "axis",
    "name",
    "value",
    "unit",
    "low",
    "high",
    "n",
    "kind",
    "split",
    "conditions",
    "runtime",
    "machine",
}


def start(*argv: str, **rest: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "featherweight.cli", *argv], **pipes, **rest)


def answer(capfd: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict:
    """Run a command with --json; its standard output must be one JSON object and a line end, and nothing else."""
    assert main([*argv, "--json"]) == code
    out = capfd.readouterr().out
    assert out.count("\n") == 1 and out.startswith("{")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


# -- help and lists ---------------------------------------------------------------------------------------------------
def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = "import sys; from featherweight.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    loaded = done.stdout.splitlines()[-1]
    assert not [package for package in ("torch", "onnx", "optuna", "numpy") if f"'{package}'" in loaded]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--json" in capfd.readouterr().out


def test_without_a_command_the_help_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: featherweight" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("what", "registered"), [("methods", Step.kinds), ("targets", Target.kinds), ("axes", Axis.kinds)]
)
def test_lists_hold_everything_that_is_registered(
    what: str, registered: dict[str, type], capfd: pytest.CaptureFixture[str]
) -> None:
    entries = answer(capfd, what)[what]
    assert {entry["name"] for entry in entries} >= {
        name for name, kind in registered.items() if "featherweight." in kind.__module__
    }
    assert len(entries) >= 2 and all(entry["summary"].endswith(".") for entry in entries)
    assert main([what]) == 0
    shown = capfd.readouterr().out
    assert all(entry["name"] in shown for entry in entries)


def test_methods_say_settings_ranges_and_papers(capfd: pytest.CaptureFixture[str]) -> None:
    entry = next(entry for entry in answer(capfd, "methods")["methods"] if entry["name"] == "prune.weights")
    sparsity = next(setting for setting in entry["settings"] if setting["name"] == "sparsity")
    assert sparsity["searched"] == "0.1 to 0.95" and "<" in sparsity["range"] and entry["paper"].startswith("arXiv:")
    main(["methods"])
    out = capfd.readouterr().out
    assert "prune.weights" in out and "0.1 to 0.95" in out and entry["paper"] in out


def test_tasks_are_named_as_the_command_line_takes_them(capfd: pytest.CaptureFixture[str]) -> None:
    entries = answer(capfd, "tasks")["tasks"]
    assert {entry["name"] for entry in entries} == {f"zoo:{name}" for name in zoo} and zoo
    assert all(entry["summary"] for entry in entries)


def test_what_is_not_installed_is_said_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Target.kinds["onnxruntime"], "packages", ("no_such_runtime",))
    monkeypatch.setattr(Target.kinds["onnxruntime"], "extra", "web")
    entry = next(entry for entry in answer(capfd, "targets")["targets"] if entry["name"] == "onnxruntime")
    assert entry["missing"] == ["no_such_runtime"] and entry["install"] == "pip install 'featherweight[web]'"
    main(["targets"])
    assert "not installed: no_such_runtime; run: pip install 'featherweight[web]'" in capfd.readouterr().out


# -- jobs -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `apply int8` wrote."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert main(["apply", "int8", f"{TASKS}:bars", "--out", str(out)]) == 0
    return out


def check(found: dict, out: Path) -> None:
    """The form that demo, compress, apply and measure share, and that readings.json keeps."""
    assert set(found) == {"verdict", "feasible", "artifact", "recipe", "readings"}
    assert found["verdict"] and found["feasible"] is True and Path(found["artifact"]) == out / "artifact"
    assert (out / "artifact" / "manifest.json").is_file() and found["recipe"]["steps"]
    assert all(set(reading) == READING for reading in found["readings"])
    assert {reading["subject"] for reading in found["readings"]} == {"original", "compressed"}
    assert json.loads((out / "readings.json").read_text()) == found


def test_one_json_object_whatever_libraries_print(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("apply", "int8", f"{TASKS}:noisy", "--axes", "accuracy,size", "--out", str(out), "--json")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("\n") == 1
    check(json.loads(stdout), out)
    assert all(text in stderr for text in ("printed", "written", "formatted"))


def test_compress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bar = ["--max-drop", "5", "--objective", "size", "--trials", "1"]
    check(answer(capfd, "compress", f"{TASKS}:bars", *bar, "--out", str(out)), out)
    made = {path.name for path in out.iterdir()}
    assert made >= {"artifact", "model", "recipe.yaml", "readings.json", "study.db", "report.html"}


def test_apply_shows_what_was_gained_and_lost(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The job is finished already, so that it is shown at once."""
    assert main(["apply", "int8", f"{TASKS}:bars", "--out", str(done)]) == 0
    shown = capfd.readouterr()
    for text in ("top1", "artifact on disk", "latency p50", "smaller", "quantize.static", str(done / "report.html")):
        assert text in shown.out
    assert "nothing is done again" in shown.err


def test_apply_in_json(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check(answer(capfd, "apply", "int8", f"{TASKS}:bars", "--out", str(done)), done)


def test_apply_measures_the_axes_it_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = answer(capfd, "apply", "int8", f"{TASKS}:bars", "--out", str(out), "--axes", "accuracy, size")
    check(found, out)
    assert {reading["axis"] for reading in found["readings"]} == {"accuracy", "size"}


def test_measure_reads_anew_the_axes_it_is_told(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = json.loads((done / "run.json").read_text())
    truth = {axis: [r["value"] for r in run["readings"] if r["axis"] == axis] for axis in ("size", "memory")}
    for reading in run["readings"]:
        reading["value"] = 1.0
    (done / "run.json").write_text(json.dumps(run))
    check(found := answer(capfd, "measure", str(done), "--axes", "accuracy, size"), done)
    assert [r["value"] for r in found["readings"] if r["axis"] == "size"] == truth["size"]
    assert {r["value"] for r in found["readings"] if r["axis"] == "memory"} == {1.0} != set(truth["memory"])
    assert main(["measure", str(done)]) == 0
    assert "peak resident memory" in capfd.readouterr().out
    energy = [r for r in json.loads((done / "run.json").read_text())["readings"] if r["axis"] == "energy"]
    assert energy and 1.0 not in {r["value"] for r in energy}  # by default all axes, here as in apply and in Python


def test_measure_refuses_an_unknown_axis(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        "there is no axis 'beauty'; the axes are: "
        in answer(capfd, "measure", str(done), "--axes", "beauty", code=2)["error"]
    )


def test_a_file_that_may_not_be_read_is_not_taken_for_a_full_disk() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/images.npz")
    assert cli._user_message(denied) == (
        "cannot use /data/images.npz: permission denied; check the path, and who may use it"
    )
    try:
        try:
            raise denied
        except PermissionError:
            raise KeyError("a mistake of ours")  # noqa: B904
    except KeyError as mistake:
        assert cli._user_message(mistake) is None


def test_diagnose_ranks_the_layers_and_writes_a_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page"
    found = answer(capfd, "diagnose", f"{TASKS}:bars", "--inputs", "64", "--out", str(page))
    assert found["n"] == 64 and len(found["layers"]) > 1 and found["method"]["kind"] == "quantize.static"
    assert json.loads((page / "diagnosis.json").read_text()) | {"line": found["line"]} == found
    assert "Each layer compressed alone" in (page / "diagnosis.html").read_text()
    assert main(["diagnose", f"{TASKS}:bars", "--out", str(page)]) == 2
    assert "is not an empty folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "nope"], "there is no method or recipe 'nope'"),
        (["--method", "finetune"], "finetune does not work layer by layer"),
        (["--split", "nope"], "there is no split 'nope'"),
    ],
)
def test_diagnose_refuses_in_one_line(
    given: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", f"{TASKS}:bars", "--out", str(tmp_path / "page"), *given]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "page").exists()


def test_report_is_built_again(done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (done / "report.html").unlink()
    assert answer(capfd, "report", str(done)) == {"report": str(done / "report.html")}
    assert (done / "report.html").is_file()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    """That going on works is tested with the search."""
    out = tmp_path / "out"
    process = start("compress", f"{TASKS}:bars", "--max-drop", "5", "--trials", "9", "--out", str(out), "--json")
    while not (out / "study.db").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    message = "stopped; run the same command again to go on where it was"
    assert json.loads(stdout) == {"error": message}
    assert "Traceback" not in stderr and stderr.rstrip().endswith(f"featherweight: {message}")
    assert (out / "job.json").is_file() and not (out / "artifact").exists()


def test_an_unexpected_error_is_one_line_and_a_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(catalog, "axes", broken)
    assert main(["axes"]) == 1
    line = capfd.readouterr().err.strip()
    assert (
        line.startswith("featherweight: unexpected ZeroDivisionError: a mistake of ours; the traceback is in ")
        and "\n" not in line
    )
    log = Path(line.split("the traceback is in ")[1].split(",")[0])
    assert "def broken" not in line and "ZeroDivisionError" in log.read_text()
    log.unlink()
    assert main(["axes", "--debug"]) == 1
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m featherweight.cli methods | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 1)


def test_a_finished_demo_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Said(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    assert cli._demo_folder(Said()) == Path("featherweight-demo") and not said
    for name in ("featherweight-demo", "featherweight-demo-2"):
        Path(name).mkdir()
        (Path(name) / "report.html").write_text("")
    Path("featherweight-demo-3").mkdir()
    assert cli._demo_folder(Said()) == Path("featherweight-demo-3")
    assert said == ["featherweight-demo holds a finished demo; writing to featherweight-demo-3"]


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """At least 8x smaller and 2x faster at no more than 0.5 points lost, with nothing cached."""
    process = start("demo", "--json", cwd=tmp_path, env=os.environ | {"FEATHERWEIGHT_CACHE": str(tmp_path / "cache")})
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    found = json.loads(stdout)
    value = {(r["subject"], r["name"], r["conditions"].get("batch")): r["value"] for r in found["readings"]}
    assert value["original", "file_bytes", None] >= 8 * value["compressed", "file_bytes", None]
    assert value["original", "p50_ms", 1] >= 2 * value["compressed", "p50_ms", 1]
    (lost,) = (r["value"] for r in found["readings"] if r["name"] == "drop")
    assert lost <= 0.5


# -- pure parts -------------------------------------------------------------------------------------------------------
def test_names() -> None:
    assert names(" accuracy, size,,latency ") == ["accuracy", "size", "latency"] and names(None) is None


def test_the_table_holds_every_figure_and_in_detail_the_intervals(done: Path) -> None:
    """The rows themselves are the report's, and tested there."""
    run = Run.model_validate_json((done / "run.json").read_text())
    shown = {details: printed(gains_table(run, details)) for details in (False, True)}
    assert "latency p95" in shown[True] and "latency p95" not in shown[False]
    for text in ("artifact on disk", "latency p50, batch 1, 1 thread", "top1, test, n = 200", "smaller", "change"):
        assert text in shown[False]
    assert " to " in shown[True] and " to " not in shown[False]


def printed(table: Table) -> str:
    out = Console(width=140, file=io.StringIO())
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_an_interruption_that_a_destructor_swallows_is_repeated_by_the_next_progress(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with Bars(console(stderr=True)) as progress:
        with contextlib.suppress(KeyboardInterrupt):  # where the exception is dropped depends on the interpreter
            Swallows()
        with pytest.raises(KeyboardInterrupt):
            progress.say("going on")
    assert signal.getsignal(signal.SIGINT) is before and sys.unraisablehook is hook
    assert "Traceback" not in capfd.readouterr().err
