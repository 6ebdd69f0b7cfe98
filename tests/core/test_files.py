"""Files that appear whole or not at all, whatever happens while they are written."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.core import files
from featherweight.core.errors import ArtifactError, OutputError
from featherweight.core.files import (
    disk_message,
    file_digest,
    folder_size,
    recover_folder,
    recover_folders,
    tensor_digest,
    value_digest,
    whole_file,
    whole_folder,
    write_json,
)
from featherweight.core.target import Artifact
from featherweight.model import skeleton


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_that_fails_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "deep" / "value.txt"
    with whole_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises((type(error), OutputError)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(path.parent) == ["value.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "result"
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("old")
    with pytest.raises((type(error), OutputError)), whole_folder(path) as temporary:
        (temporary / "b").write_text("half")
        raise error
    assert (path / "inner" / "a").read_text() == "old" and names(path) == ["inner"] and names(tmp_path) == ["result"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    for content in ("one", "two"):
        with whole_folder(tmp_path / "result") as temporary:
            (temporary / content).write_text(content)
            assert names(tmp_path / "result") == ["one"] if content == "two" else True
    assert names(tmp_path / "result") == ["two"] and names(tmp_path) == ["result"]
    assert (tmp_path / "result").stat().st_mode & 0o777 == 0o755


def test_what_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (whole_file, whole_folder):
        message = r"cannot write .*; choose a folder that can be written"
        with pytest.raises(OutputError, match=message) as caught, make(tmp_path / "file" / "below"):
            pass
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_in_one_line(tmp_path):
    message = "no space left on device; free some space or choose another folder"
    with pytest.raises(OutputError, match=message), whole_file(tmp_path / "value"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("make", [whole_file, whole_folder])
def test_errors_that_are_not_of_the_disk_pass_as_they_are(tmp_path, make):
    data = tmp_path / "data.npz"
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(data)),
        PermissionError(errno.EACCES, "Permission denied", str(data)),
        ConnectionError("the server hung up"),
    ):
        with pytest.raises(type(error)) as caught, make(tmp_path / "value"):
            raise error
        assert caught.value is error and names(tmp_path) == []
    message = "permission denied; choose a folder that can be written"
    with pytest.raises(OutputError, match=message), make(tmp_path / "value") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))


def test_what_the_disk_says_in_one_line(tmp_path):
    full, denied = OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "Permission denied", "/data/x")
    assert disk_message(full) == "cannot write: no space left on device; free some space or choose another folder"
    assert disk_message(RuntimeError("database or disk is full"), tmp_path).startswith(
        f"cannot write {tmp_path}: no sp"
    )
    assert disk_message(denied) == "cannot use /data/x: permission denied; check the path, and who may use it"
    assert disk_message(denied, tmp_path) is None and disk_message(FileNotFoundError(errno.ENOENT, "x", "y")) is None
    wrapped = RuntimeError("the exporter failed")
    wrapped.__cause__ = full
    assert "no space left" in disk_message(wrapped)


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path):
    with whole_folder(tmp_path / "result") as temporary:
        (temporary / "a").write_text("0")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not files._exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this system cannot exchange two names")
    missing, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if not os.path.exists(tmp_path / "result" / "a"):  # noqa: PTH110  quicker than a Path
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for count in range(200):
        with whole_folder(tmp_path / "result") as temporary:
            (temporary / "a").write_text(str(count))
    stop.set()
    watcher.join()
    assert not missing and (tmp_path / "result" / "a").read_text() == "199"


KILLED_BETWEEN = """
import os, pathlib, sys
from featherweight.core import files
files._exchange = lambda *_: False
rename, seen = pathlib.Path.rename, []
def second_kills(self, target):
    seen.append(self)
    if len(seen) == 2:
        os.kill(os.getpid(), 9)
    return rename(self, target)
pathlib.Path.rename = second_kills
with files.whole_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
"""


def killed_between_the_renames(path):
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(path)]).returncode == -9
    assert not path.exists()


def test_where_names_cannot_be_exchanged_a_killed_replacement_is_undone(tmp_path):
    path = tmp_path / "result[1].2"  # brackets mean something to glob
    killed_between_the_renames(path)
    recover_folder(path)
    assert (path / "a").read_text() == "old"
    killed_between_the_renames(path)
    recover_folders(tmp_path)
    assert (path / "a").read_text() == "old"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("newer")
    assert (path / "a").read_text() == "newer" and not list(tmp_path.glob(".*.old"))


def test_whoever_opens_a_folder_next_undoes_a_killed_replacement(tmp_path):
    artifact, model = tmp_path / "artifact", tmp_path / "model"
    for path in (artifact, model):
        killed_between_the_renames(path)
    with pytest.raises(ArtifactError, match="manifest"):  # it holds no artifact, but what it held
        Artifact(artifact)
    with pytest.raises(ArtifactError):
        skeleton.load(model)
    assert (artifact / "a").read_text() == (model / "a").read_text() == "old"


def test_a_replacement_that_fails_leaves_the_old_one_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path, rename = tmp_path / "result", Path.rename
    for content in ("one", "two"):
        with whole_folder(path) as temporary:
            (temporary / content).write_text(content)
    assert names(path) == ["two"] and names(tmp_path) == ["result"]

    def fails(self, target):
        if self.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="input/output error"), whole_folder(path) as temporary:
        (temporary / "three").write_text("three")
    assert names(path) == ["two"] and names(tmp_path) == ["result"]


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path):
    code = (
        "import os, pathlib, sys\nfrom featherweight.core.files import whole_file, whole_folder\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with whole_file(folder / 'value') as one, whole_folder(folder / 'result') as two:\n"
        "    one.write_text('half'); (two / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert not (tmp_path / "value").exists() and not (tmp_path / "result").exists()
    assert all(name.startswith(".") and name.endswith(".part") for name in names(tmp_path))


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5]})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n "b": [\n  1,\n  2.5\n ]\n}\n' and names(tmp_path) == ["a.json"]


def test_sizes_and_digests_of_files(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"12345")
    assert folder_size(tmp_path) == 8
    assert file_digest(tmp_path / "inner" / "a").startswith("ba7816bf8f01cfea")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)))
def test_a_value_has_one_digest_in_any_order(value):
    assert value_digest(value) == value_digest(dict(reversed(value.items())))


def test_tensor_digests_see_names_types_shapes_and_bits():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True)}
    assert tensor_digest(base) == tensor_digest(dict(reversed(base.items())))
    assert tensor_digest(base) == tensor_digest(
        {"a": torch.arange(6.0).reshape(3, 2).T.T.reshape(2, 3), "b": base["b"]}
    )
    others = [
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"] + torch.tensor([0.0, 0.0, 1e-6]), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({tensor_digest(item) for item in [base, *others]}) == 6
    assert tensor_digest({"e": torch.empty(0, 3)}) != tensor_digest({"e": torch.empty(3, 0)})


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_others_may_read_what_is_written(tmp_path):
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644
