"""Prefixes of recipes are computed once, kept whole, checked when read, and the least used go first."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_search import Heal, Narrow, Round, registered, task
from torch import nn

from featherweight.core import context
from featherweight.core.context import Context, fingerprint, run_step
from featherweight.core.progress import Progress
from featherweight.core.recipe import Recipe
from featherweight.core.step import Step
from featherweight.search import store as module
from featherweight.search.store import Store, build, prefix_key

FULL = Recipe([Narrow(keep=0.5), Heal(epochs=0.5), Round()])


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the steps that really ran, in order."""
    found: list[str] = []

    def counting(item: Step, model: nn.Module, ctx: Context) -> Any:
        found.append(item.kind)
        return run_step(item, model, ctx)

    monkeypatch.setattr(module, "run_step", counting)
    return found


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(task().test.tensors[0])


def test_a_prefix_is_computed_once(tmp_path: Path, ran: list[str]) -> None:
    with registered(Narrow, Heal, Round):
        first, records = build(FULL, Context(task()), Store(tmp_path))
        again, same = build(FULL, Context(task()), Store(tmp_path))
        build(Recipe([*FULL.steps[:2], Round(per_row=False)]), Context(task()), Store(tmp_path))
    assert ran == ["tiny.narrow", "tiny.heal", "tiny.round", "tiny.round"]
    assert torch.equal(outputs(first), outputs(again)) and fingerprint(first) == fingerprint(again)
    assert records == same and [record.step["kind"] for record in same] == ["tiny.narrow", "tiny.heal", "tiny.round"]


def test_an_interrupted_recipe_goes_on_from_its_prefix_and_ends_the_same(tmp_path: Path, ran: list[str]) -> None:
    with registered(Narrow, Heal, Round):
        calm, _ = build(FULL, Context(task()), Store(tmp_path / "calm"))
        build(Recipe(FULL.steps[:1]), Context(task()), Store(tmp_path / "cut"))
        resumed, _ = build(FULL, Context(task()), Store(tmp_path / "cut"))
    assert ran.count("tiny.narrow") == 2 and torch.equal(outputs(calm), outputs(resumed))


@pytest.mark.parametrize("file", ["model/tensors.safetensors", "model/skeleton.json", "entry.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, ran: list[str], file: str, damage: str) -> None:
    recipe, said = Recipe([Round()]), Said()
    with registered(Round):
        ctx = Context(task())
        before, _ = build(recipe, ctx, Store(tmp_path))
        path = tmp_path / prefix_key(recipe.steps, ctx) / file
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-9] + b"x" + content[-8:])
        after, _ = build(recipe, ctx, Store(tmp_path, progress=said))
    assert ran == ["tiny.round", "tiny.round"] and torch.equal(outputs(before), outputs(after))
    assert (damage == "gone" and file == "entry.json") or any("damaged" in line for line in said.lines)


def test_the_key_holds_all_that_decides_what_a_step_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = Context(task())
    key = prefix_key(FULL.steps, ctx)
    assert key == prefix_key(FULL.steps, Context(task()))
    others = [
        prefix_key(FULL.steps[:2], ctx),
        prefix_key((Narrow(keep=0.4), *FULL.steps[1:]), ctx),
        prefix_key(FULL.steps, Context(task(), seed=1)),
        prefix_key(FULL.steps, Context(task(), width_multiple=8)),
        prefix_key(FULL.steps, Context(replace(task(), calibration_limit=17))),
    ]
    monkeypatch.setattr(module, "code_digest", lambda: "a method was changed")
    others.append(prefix_key(FULL.steps, ctx))
    assert len({key, *others}) == len(others) + 1


def test_the_least_used_go_first(tmp_path: Path) -> None:
    with registered(Narrow):
        ctx = Context(task())
        recipes = [Recipe([Narrow(keep=keep)]) for keep in (0.3, 0.4, 0.5)]
        keys = [prefix_key(recipe.steps, ctx) for recipe in recipes]
        for recipe in recipes[:2]:
            build(recipe, ctx, Store(tmp_path))
        for age, key in enumerate(keys[:2]):
            os.utime(tmp_path / key, (time.time() - 100 + age,) * 2)
        build(recipes[0], ctx, Store(tmp_path))  # used again, so the other one is the older now
        size = sum(path.stat().st_size for path in (tmp_path / keys[0]).rglob("*") if path.is_file())
        build(recipes[2], ctx, Store(tmp_path, limit=int(size * 2.7)))
    assert not (tmp_path / keys[1]).exists()
    assert (tmp_path / keys[0]).exists() and (tmp_path / keys[2]).exists()


def test_a_cache_that_cannot_be_written_is_said_once_and_done_without(tmp_path: Path, ran: list[str]) -> None:
    (tmp_path / "file").touch()
    said = Said()
    with registered(Narrow, Round):
        model, _ = build(
            Recipe([Narrow(), Round()]), Context(task()), Store(tmp_path / "file" / "cache", progress=said)
        )
    assert outputs(model).shape == (300, 10) and ran == ["tiny.narrow", "tiny.round"]
    assert len([line for line in said.lines if "not kept" in line]) == 1


def test_nothing_half_written_is_taken_for_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(model: nn.Module, folder: Path) -> None:
        folder.mkdir()
        (folder / "skeleton.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.skeleton, "save", dies)
    with registered(Round), pytest.raises(KeyboardInterrupt):
        build(Recipe([Round()]), Context(task()), Store(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    assert Store().folder == tmp_path / "prefixes"
    monkeypatch.delenv("FEATHERWEIGHT_CACHE")
    assert Store().folder == Path.home() / ".cache" / "featherweight" / "prefixes"


def test_the_code_of_the_methods_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(context.__file__).parent.parent
    copy = tmp_path / "featherweight"
    for folder in module.CODE:
        shutil.copytree(home / folder, copy / folder)
    (copy / "search").mkdir()
    monkeypatch.setattr(module, "__file__", str(copy / "search" / "store.py"))
    module.code_digest.cache_clear()
    before = module.code_digest()
    (copy / "methods" / "new.py").write_text("x = 1\n")
    module.code_digest.cache_clear()
    assert module.code_digest() != before
    module.code_digest.cache_clear()
