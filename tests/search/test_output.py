"""Whose an output folder is, and what happens to it when things go wrong."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.core.errors import OutputError
from featherweight.core.files import disk_message, write_text
from featherweight.search.output import BASELINE, JOB, claim, disk_guard, finished, work_folder

THIS = {"run": "apply", "seed": 0}


def test_a_new_folder_is_made_and_held(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with claim(out, THIS) as folder:
        assert json.loads((folder / JOB).read_text()) == THIS
        work_folder(folder, "candidate").mkdir()
        write_text(folder / "run.json", "{}")
    assert finished(out) and not (out / ".work").exists()


def test_the_same_job_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, THIS):
        (out / "study.db").touch()
    (out / ".artifact.x1.part").mkdir()
    (out / ".run.json.x2.part").touch()
    work_folder(out, "candidate").mkdir()
    (out / BASELINE).touch()
    with claim(out, THIS):
        assert not (out / ".work").exists() and (out / BASELINE).exists()
        assert not list(out.glob(".*.part"))


@pytest.mark.parametrize("content", ["notes.txt", "model.onnx", "run.json"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("mine")
    with pytest.raises(OutputError, match="is not empty; choose another"), claim(tmp_path, THIS):
        pytest.fail("it was claimed")
    assert [path.name for path in tmp_path.iterdir()] == [content]


def test_a_folder_of_another_job_says_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, THIS):
        (out / "study.db").touch()
    with pytest.raises(OutputError, match=r"another run \(it differs in: seed\)"), claim(out, {**THIS, "seed": 1}):
        pytest.fail("it was claimed")


def test_a_damaged_job_file(tmp_path: Path) -> None:
    (tmp_path / JOB).write_text("{")
    with pytest.raises(OutputError, match="cannot be read"), claim(tmp_path, THIS):
        pytest.fail("it was claimed")


def test_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"), claim(tmp_path / "file", THIS):
        pytest.fail("it was claimed")
    with pytest.raises(OutputError, match="not a directory"), claim(tmp_path / "file" / "out", THIS):
        pytest.fail("it was claimed")


def test_what_failed_at_once_leaves_no_trace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no"), claim(out, THIS):
        work_folder(out, "candidate").mkdir()
        raise ValueError("no")
    assert not out.exists()
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(ValueError, match="no"), claim(tmp_path / "empty", THIS):
        raise ValueError("no")
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_failed_later_is_kept_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no"), claim(out, THIS):
        (out / "study.db").touch()
        raise ValueError("no")
    assert (out / JOB).exists() and (out / "study.db").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from featherweight.search.output import claim\n"
        f"with claim(Path(sys.argv[1]), {THIS!r}): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(OutputError, match="another run is working"), claim(tmp_path / "out", THIS):
            pytest.fail("it was claimed")
        other.kill()
    with claim(tmp_path / "out", THIS):
        pass  # the lock ends with the process, however that ends


def test_a_full_disk_becomes_one_line_however_deep_it_lies(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left on device; free some space"), disk_guard(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the exporter failed") from error
    with pytest.raises(OutputError, match="no space left"), disk_guard(tmp_path):
        raise RuntimeError("(sqlite3.OperationalError) database or disk is full")


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_guard(tmp_path):
        raise KeyError("x")
    with pytest.raises(PermissionError), disk_guard(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.npz"))
    with pytest.raises(OutputError, match="permission denied; choose a folder"), disk_guard(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out" / "artifact" / "model.onnx"))


def test_an_error_while_another_was_handled_is_not_taken_for_it() -> None:
    def mistaken() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise KeyError("a mistake") from None

    def careless() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise KeyError("a mistake")  # noqa: B904

    for raising in (mistaken, careless):
        with pytest.raises(KeyError) as caught:
            raising()
        assert disk_message(caught.value) is None
