"""The data folder and the cache: what is found, kept, and refused."""

import pytest
import torch

from featherweight.core.data import Arrays
from featherweight.core.errors import FeatherweightError, OutputError, TaskError
from featherweight.core.fit import Training
from featherweight.core.task import Task, find_task, zoo
from featherweight.zoo import trained as module
from featherweight.zoo.source import Source, cached
from featherweight.zoo.trained import trained

EMBEDDED = {"digits"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def every_task() -> list[str]:
    from featherweight.core import registry

    registry.load("tasks")
    return sorted(zoo)


@pytest.mark.parametrize("name", sorted(set(every_task()) - EMBEDDED))
def test_without_the_data_folder_one_line_says_what_to_set(name, monkeypatch, tmp_path):
    monkeypatch.delenv("FEATHERWEIGHT_DATA", raising=False)
    with pytest.raises(TaskError, match=f"^zoo:{name} needs the data folder: set FEATHERWEIGHT_DATA to it$"):
        find_task(f"zoo:{name}")
    monkeypatch.setenv("FEATHERWEIGHT_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=f"^zoo:{name} needs [^\n]+, which is not in [^\n]+$"):
        find_task(f"zoo:{name}")


@pytest.mark.parametrize("name", every_task())
def test_every_task_says_in_one_sentence_what_it_is(name):
    text = zoo[name].function.__doc__
    assert text and text.strip().endswith(".") and "\n" not in text.strip()


def test_importing_the_zoo_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys; from featherweight.core import registry; registry.load('tasks'); "
        "print([name for name in ('sklearn', 'transformers', 'PIL', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cached_thing_is_made_once_per_key(cache):
    made = []

    def make():
        made.append(1)
        return {"a": torch.arange(6).view(2, 3).T}

    first, again = cached("thing", ["key", 1], make), cached("thing", ["key", 1], make)
    assert torch.equal(first["a"], again["a"]) and len(made) == 1
    cached("thing", ["key", 2], make)
    assert len(made) == 2
    assert len(list(cache.iterdir())) == 2


def test_a_failed_make_leaves_nothing_behind(cache):
    with pytest.raises(ZeroDivisionError):
        cached("thing", [], lambda: {"a": torch.tensor(1 // 0)})
    assert not cache.exists() or not list(cache.iterdir())


def test_a_damaged_cache_says_which_file_to_delete(cache):
    cached("thing", [], lambda: {"a": torch.ones(3)})
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OutputError, match=f"{path} is damaged; delete it"):
        cached("thing", [], lambda: {"a": torch.ones(3)})


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FeatherweightError, match="FEATHERWEIGHT_CACHE"):
        cached("thing", [], lambda: {"a": torch.ones(3)})


def test_a_fingerprint_follows_the_bytes_and_the_version(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_DATA", str(tmp_path))
    (tmp_path / "a").write_bytes(b"one")
    source = Source("thing", "a")
    one = source.fingerprint(1)
    assert source.fingerprint(1) == one != source.fingerprint(2)
    (tmp_path / "a").write_bytes(b"two")
    assert source.fingerprint(1) != one


def small_task() -> Task:
    inputs, labels = torch.randn(64, 4), torch.arange(64) % 2
    inputs[:, 0] += 4 * labels
    return Task(name="small", model=lambda: torch.nn.Linear(4, 2), train=Arrays(inputs, labels), fingerprint="small")


def test_training_happens_once_and_leaves_the_callers_randomness_alone(cache, monkeypatch):
    task, training = small_task(), Training(epochs=15, lr=0.05, batch_size=16)
    before = torch.get_rng_state(), torch.get_num_threads()
    one = trained(task, lambda: torch.nn.Linear(4, 2), training)()
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    assert not one.training
    monkeypatch.setattr(module, "fitted", None)  # a second training would fail
    again = trained(task, lambda: torch.nn.Linear(4, 2), training)()
    assert torch.equal(one.weight, again.weight)
    with torch.no_grad():
        right = one(task.train.tensors[0]).argmax(1) == task.train.tensors[1]
    assert right.float().mean() > 0.9


def test_other_settings_train_anew_and_the_same_seed_gives_the_same_weights(cache, tmp_path, monkeypatch):
    task, training = small_task(), Training(epochs=2, lr=0.05, batch_size=16)

    def make() -> torch.nn.Module:
        return torch.nn.Linear(4, 2)

    one, other = trained(task, make, training)(), trained(task, make, training, seed=1)()
    assert not torch.equal(one.weight, other.weight)
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "fresh"))
    assert torch.equal(trained(task, make, training)().weight, one.weight)
