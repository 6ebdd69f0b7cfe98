"""All that the page shows, as plain values: the template only lays it out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from ..core.files import value_digest
from ..core.reading import Reading
from ..core.run import Candidate, Run
from . import compare, diagnosis, layers, plot, snippet, stages, text

MOST_ROWS = 200  # rows of one list of candidates; run.json keeps all
MOST_NAMES = 200  # names in one list of evidence


@dataclass(frozen=True)
class Tried:
    """A candidate in words."""

    item: Candidate
    recipe: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """What the runtime says of how it runs the artifact under one heading: figures by name, or a list of names."""

    name: str
    figures: dict[str, str]
    names: list[str]
    total: int = 0


def view(run: Run, folder: str) -> dict[str, Any]:
    """The values that the template lays out; `folder` is where the artifact lies, seen from the page."""
    target = str(run.target.get("name", ""))
    found = compare.rows(run.readings, str(run.metric.get("name", "")), bool(run.metric.get("higher_is_better", True)))
    return {
        "run": run,
        "target": target,
        "state": state(run),
        "tiles": compare.tiles(run),
        "limits": compare.limits(run),
        "groups": compare.by_axis(found),
        "sources": sources(run.readings),
        "warnings": warnings(run),
        "plot": plot.plot(run),
        **candidates(run),
        "columns": stages.columns(run),
        "lines": stages.lines(run),
        "charts": stages.charts(run),
        "found": run.diagnosis,
        "diagnosis": "" if run.diagnosis is None else diagnosis.sentence(run.diagnosis),
        "prices": [] if run.diagnosis is None else diagnosis.lines(run.diagnosis),
        "layers": layers.lines(run.layers),
        "more_layers": max(0, len(run.layers) - layers.MOST),
        "totals": layers.totals(run.layers),
        "left": layers.left_alone(run.steps),
        "evidence": evidence(run.evidence),
        "has_artifact": any(reading.subject == "compressed" for reading in run.readings) and bool(run.artifact),
        "snippet": snippet.snippet(target, folder),
        "needs": snippet.needs(target),
        "recipe_yaml": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        "again": again(run),
        "digest": value_digest([record.step for record in run.steps]) if run.steps else "",
    }


def state(run: Run) -> tuple[str, str]:
    """How the run ended: a name for the style and a heading in words."""
    barred = compare.has_bar(run.budget)
    if (run.feasible or not barred) and compare.gained(run) is False:
        return "nothing", "Meets the bar, but nothing was gained" if barred else "Nothing was gained"
    if not barred:
        return "neutral", "Measured; no bar was set"
    if run.feasible:
        return "met", "Meets the bar"
    missed = any(limit.met is False for limit in compare.limits(run))
    return ("missed", "Does not meet the bar") if missed else ("neutral", "Not every limit of the bar was measured")


def sources(readings: list[Reading]) -> dict[tuple[str, str], str]:
    """Each runtime and machine that figures come from, with a letter to refer to it by."""
    found = dict.fromkeys((reading.runtime, reading.machine) for reading in readings)
    return {source: chr(ord("a") + place) if place < 26 else str(place) for place, source in enumerate(found)}


def warnings(run: Run) -> list[str]:
    """The warnings of the run and those of its steps that it does not repeat, each once."""
    steps = [
        f"{record.step.get('kind', 'step')}: {line}"
        for record in run.steps
        for line in record.warnings
        if line not in run.warnings
    ]
    return list(dict.fromkeys([*run.warnings, *steps]))[:MOST_NAMES]


def candidates(run: Run) -> dict[str, Any]:
    """The candidates in the lists that the page shows, and how many there were of each."""
    done = [item for item in run.candidates if item.state == "done"]
    lists = {
        "front": [item for item in done if item.front or item.chosen],
        "others": [item for item in done if not (item.front or item.chosen)],
        "failed": [item for item in run.candidates if item.state == "failed"],
        "refused": [item for item in run.candidates if item.state == "refused"],
    }
    by_latency = sorted(lists["front"], key=lambda item: (item.latency_ms is None, item.latency_ms or 0.0))
    shown = {**lists, "front": by_latency}
    axes = dict.fromkeys(name for item in done for name, _ in plot.facts(item, run) if name != "state")
    return {
        "tried": {name: [tried(item, run) for item in items[:MOST_ROWS]] for name, items in shown.items()},
        "counts": {name: len(items) for name, items in lists.items()},
        "candidate_columns": list(axes),
    }


def tried(item: Candidate, run: Run) -> Tried:
    """A candidate in words."""
    return Tried(item, text.recipe(item.recipe), dict(plot.facts(item, run)))


def evidence(given: dict[str, Any]) -> list[Evidence]:
    """What the runtime says: single figures together, then each table of figures, then each list of names."""
    single = {
        _name(name): _shown(value) for name, value in given.items() if not isinstance(value, dict | list) or not value
    }
    tables = [_table(_name(name), value) for name, value in given.items() if isinstance(value, dict) and value]
    lists = [
        Evidence(_name(name), {}, [str(item) for item in value[:MOST_NAMES]], len(value))
        for name, value in given.items()
        if isinstance(value, list) and value
    ]
    return [*tables, *([Evidence("", single, [])] if single else []), *lists]


def _table(name: str, value: dict[str, Any]) -> Evidence:
    return Evidence(name, {_name(key): _shown(item) for key, item in list(value.items())[:MOST_NAMES]}, [])


def _name(key: object) -> str:
    return str(key).replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return text.number(value) if _is_figure(value) else str(value)


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def again(run: Run) -> str:
    """The command that applies the recipe once more without a search; empty if the task has no name to call it by."""
    if not run.task:
        return ""
    words = ["featherweight", "apply", "recipe.yaml", run.task, "--target", str(run.target.get("name", ""))]
    return shlex.join([*words, "--seed", str(run.seed), "--out", "again"])
