"""Whatever a user gets wrong ends in one clear line and exit code 2, and in JSON where that was asked for."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from featherweight.cli import main
from featherweight.core import files
from featherweight.core.target import Target

TASKS = str(Path(__file__).parent / "tiny_tasks.py")


def fails(capfd: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail; check the form of the failure and return its message."""
    assert main([*argv, "--json"]) == code
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("featherweight: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err, err
    answer = json.loads(out)
    message = lines[0].removeprefix("featherweight: ")
    assert answer["error"] == message
    return message


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (f"{TASKS}:nothing_here", "has no 'nothing_here'"),
        ("no_such_file.py:task", "there is no file no_such_file.py"),
        ("no_such_module_anywhere:task", "no_such_module_anywhere cannot be imported"),
        ("zoo:no-such-task", "there is no task zoo:no-such-task; the zoo holds: "),
        ("just-a-word", "write file.py:function, package.module:function or zoo:NAME"),
        (f"{TASKS}:raises", "ValueError: the labels are on the other disk"),
        (f"{TASKS}:model_raises", "FileNotFoundError: weights.pt"),
        (f"{TASKS}:gives_a_number", "gives int, not a Task"),
        (f"{TASKS}:wrong_shape", "split 'test', a batch of shapes (64, 64), (64,): the model fails on it"),
        (f"{TASKS}:no_validation", "'validate'"),
        (f"{TASKS}:nan_weight", "the weight 'second.weight' holds NaN"),
        (f"{TASKS}:nan_data", "a batch of the split 'validate' holds NaN"),
    ],
)
def test_a_bad_task(spec: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert words in fails(capfd, "compress", spec, "--max-drop", "1", "--trials", "1", "--out", str(out))
    assert not (out / "artifact").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [{kind: prune.telepathy}]", "there is no method 'prune.telepathy'; the methods are: "),
        ("steps: [{kind: quantize.static, colour: red}]", "quantize.static: there is no setting 'colour'"),
        ("steps: [{kind: prune.weights, sparsity: 1.5}]", "prune.weights: sparsity=1.5: input should be less than"),
        ("steps: [{kind: prune.structured, keep: no}]", "prune.structured: keep=False"),
        (
            "steps: [{kind: quantize.static}, {kind: prune.structured}]",
            "step 2 (prune.structured) needs a model that is still",
        ),
        ("steps: []", "'steps' must be a list of at least one step"),
        ("steps: [quantize.static]", "step 1 must be a mapping with a 'kind'"),
        ("step: [{kind: quantize.static}]", "there is no entry 'step' in a recipe"),
        ("- quantize.static", "a recipe is a mapping with 'steps'"),
        ("steps: [{kind: quantize.static}", "is not YAML"),
    ],
)
def test_a_bad_recipe(text: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = recipe(tmp_path, text)
    assert words in fails(capfd, "apply", path, f"{TASKS}:bars", "--out", str(out))
    assert not out.exists()


def test_a_recipe_that_does_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = fails(capfd, "apply", "no-such-recipe", f"{TASKS}:bars", "--out", str(tmp_path / "out"))
    assert "there is no recipe file no-such-recipe; the named recipes are: " in message


def test_a_step_that_would_change_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "steps: [{kind: prune.weights, only: no-such-layer}]")
    assert "changed nothing" in fails(capfd, "apply", path, f"{TASKS}:bars", "--out", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            "kind: adapt.lora, only: nowhere",
            "adapt.lora: there is no linear layer 'nowhere'; the first of the model",
        ),
        ("kind: adapt.lora, rank: 1000", "adapt.lora: rank=1000 is more than any chosen layer has (at most "),
        ("kind: adapt.lora, rank: 0", "step 1: adapt.lora: rank=0: input should be greater than or equal to 1"),
        ("kind: adapt.ia3, inputs: [nowhere]", "adapt.ia3: there is no linear layer 'nowhere'; "),
        (
            "kind: adapt.bottleneck, size: 4000",
            "adapt.bottleneck: size=4000 is no bottleneck behind layers of",
        ),
        ("kind: substitute.resolution, factor: 0.01", "with factor=0.01 images of 8 x 8 become images of 0 x 0; give"),
    ],
)
def test_steps_that_do_not_fit_the_model(
    settings: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, f"steps: [{{{settings}}}]")
    message = fails(capfd, "apply", path, f"{TASKS}:bars", "--out", str(tmp_path / "out"))
    assert words in message and "\n" not in message


def test_an_unknown_target(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = fails(capfd, "compress", f"{TASKS}:bars", "--target", "toaster", "--out", str(tmp_path / "out"))
    assert "there is no target 'toaster'; the targets are: " in message


def test_a_target_that_is_not_installed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = type("Absent", (Target,), {"packages": ("no_such_runtime",), "extra": "absent", "__module__": __name__})
    monkeypatch.setitem(Target.kinds, "absent", absent)
    message = fails(capfd, "compress", f"{TASKS}:bars", "--target", "absent", "--out", str(tmp_path / "out"))
    assert message == "the target absent needs no_such_runtime; run: pip install 'featherweight[absent]'"


def test_a_folder_that_is_not_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for command in (["compress", "--trials", "1"], ["apply", "int8"]):
        message = fails(capfd, *command, f"{TASKS}:bars", "--out", str(tmp_path))
        assert str(tmp_path) in message and "not empty" in message
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for command in (["compress", "--trials", "1"], ["apply", "int8"]):
        assert "cannot write" in fails(capfd, *command, f"{TASKS}:bars", "--out", str(tmp_path / "file" / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    assert "Permission denied" in fails(capfd, "apply", "int8", f"{TASKS}:bars", "--out", str(tmp_path / "out"))


def small_disk(path: Path) -> bool:
    """Mount a file system of 40 kB at `path`; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    mounted = small_disk(tmp_path)
    if not mounted:
        monkeypatch.setattr(files, "_sync", full)
    try:
        message = fails(capfd, "apply", "int8", f"{TASKS}:bars", "--out", str(tmp_path / "out"))
        assert "no space left on device" in message.lower() and "cannot write" in message
        assert not (tmp_path / "out" / "artifact").exists()
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_bar_that_nothing_can_meet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bar = ["--max-drop", "0.5", "--max-size", "10", "--trials", "2"]
    message = fails(capfd, "compress", f"{TASKS}:bars", *bar, "--objective", "size", "--out", str(out))
    assert "10" in message
    answer = json.loads((out / "readings.json").read_text())
    assert answer["feasible"] is False and answer["verdict"] == message
    assert (out / "artifact" / "manifest.json").is_file() and (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("bar", "words"),
    [
        (["--max-drop", "-1"], "max_drop=-1.0: input should be greater than or equal to 0"),
        (["--max-size", "0"], "max_size=0: input should be greater than 0"),
        (["--max-latency", "nan"], "max_latency=nan: input should be a finite number"),
        (["--max-drop", "half"], "Invalid value for '--max-drop'"),
        (["--time", "soon"], "'soon' is no time; write 90s, 10m or 1h30m"),
        (["--time", "0"], "'0' is no time"),
        (["--trials", "0"], "Invalid value for '--trials'"),
        (["--objective", "beauty"], "'beauty' is not one of 'latency', 'size', 'energy', 'accuracy'"),
        (["--fastest"], "No such option: --fastest"),
    ],
)
def test_a_bad_bar(bar: list[str], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in fails(capfd, "compress", f"{TASKS}:bars", "--out", str(tmp_path / "out"), *bar)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compress"], "Missing argument 'TASK'"),
        (["compress", f"{TASKS}:bars"], "Missing option '--out'"),
        (["squash"], "No such command 'squash'"),
        (["report"], "Missing argument 'DIR'"),
    ],
)
def test_wrong_usage(argv: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in fails(capfd, *argv)


@pytest.mark.parametrize("command", ["measure", "report"])
def test_a_folder_without_a_run(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "empty") in fails(capfd, command, str(tmp_path / "empty"))
