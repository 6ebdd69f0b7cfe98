"""The page as a whole: it needs nothing else, holds every figure, and carries what users wrote as text."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample_runs

from featherweight.core.errors import OutputError
from featherweight.core.run import Budget, Run
from featherweight.report import text
from featherweight.report.build import LIMIT, build, rebuild, render

VOID = {"meta", "link", "img", "br", "input", "hr", "line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its visible text; fails on tags that do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, class_: str = "") -> list[dict[str, str]]:
        return [
            given
            for name, given in self.elements
            if name == tag and set(class_.split()) <= set(given.get("class", "").split())
        ]


def plain(value: str) -> str:
    return " ".join(value.split())


@pytest.fixture(params=sample_runs.ALL)
def run(request: pytest.FixtureRequest) -> Run:
    return sample_runs.ALL[request.param]()


def test_every_run_gives_a_whole_page_that_needs_nothing_else(run: Run) -> None:
    source = render(run)
    page = Page(source)
    assert source.lower().startswith("<!doctype html>")
    assert len(source.encode()) < 200_000
    for tag, given in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}
        assert "src" not in given and "srcset" not in given and "data" not in given
        assert given.get("href", "#").startswith("#")
    assert "default-src 'none'" in source
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"https?://", source)
    script = source[source.index("<script>") : source.index("</script>")]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|innerHTML|eval\(", script)


def test_links_inside_the_page_lead_somewhere(run: Run) -> None:
    page = Page(render(run))
    names = [given["id"] for _, given in page.elements if "id" in given]
    assert len(names) == len(set(names))
    targets = {given["href"][1:] for given in page.all("a")}
    targets |= {given["data-of"] for given in page.all("button", "copy")}
    targets |= {given["aria-labelledby"] for given in page.all("section") if "aria-labelledby" in given}
    assert targets <= set(names)


def test_verdict_stands_at_the_top_and_its_state_is_said_in_words() -> None:
    said = {"full": "Meets the bar", "infeasible": "Does not meet the bar", "applied": "Measured; no bar was set"}
    for name, words in (said | {"gained_nothing": "Meets the bar, but nothing was gained"}).items():
        run = sample_runs.ALL[name]()
        source = render(run)
        found = Page(source).text
        assert words in found and plain(run.verdict) in found
        assert source.index("<h1") < source.index("<h2")


def test_a_limit_that_was_not_measured_is_not_called_missed() -> None:
    run = sample_runs.full()
    kept = [reading for reading in run.readings if reading.name != "file_bytes"]
    run = run.model_copy(update={"budget": Budget(max_drop=5.0, max_size=10**9), "readings": kept, "feasible": False})
    found = Page(render(run)).text
    assert "Not every limit of the bar was measured" in found and "Does not meet the bar" not in found


def test_every_reading_is_there_with_interval_n_kind_split_and_conditions() -> None:
    run = sample_runs.full()
    page = Page(render(run))
    found = page.text
    for reading in run.readings:
        unit = "points" if reading.name == "drop" else reading.unit
        assert plain(text.amount(reading.value, unit)) in found, reading
        assert any(given.get("title") == f"{reading.value} {reading.unit}" for given in page.all("span")), reading
        if reading.low is not None and reading.high is not None:
            assert plain(text.interval(reading.low, reading.high, unit)) in found
    assert {given["data-name"] for given in page.all("tr") if "data-name" in given} == {
        item.name for item in run.readings
    }
    for words in (
        "10,000",
        "modelled",
        "model Horowitz 2014, 45 nm",
        "batch 32, 1 thread",
        sample_runs.MACHINE,
        sample_runs.RUNTIME,
    ):
        assert words in found


def test_figures_of_several_machines_say_which_is_whose() -> None:
    run = sample_runs.full()
    other = run.readings[0].model_copy(
        update={"machine": "a phone, 8 cores", "runtime": "onnxruntime 1.22.0", "value": 80.25}
    )
    found = Page(render(run.model_copy(update={"readings": [*run.readings, other]}))).text
    assert "b onnxruntime 1.22.0 on a phone, 8 cores" in found
    assert "80.25 %" in found and "87.82 %" in found


def test_what_users_wrote_stays_text() -> None:
    nasty = sample_runs.NASTY
    run = sample_runs.full()
    wide = run.readings[0].model_copy(
        update={
            "axis": nasty,
            "name": nasty,
            "unit": nasty,
            "machine": nasty,
            "runtime": nasty,
            "conditions": {nasty: nasty},
        }
    )
    changes = {
        "task": nasty, "task_name": nasty, "verdict": nasty, "command": nasty, "artifact": nasty, "created": nasty,
        "target": {"name": nasty}, "versions": {nasty: nasty},
        "metric": {"name": nasty, "unit": nasty, "higher_is_better": True},
        "evidence": {nasty: nasty, "list": [nasty], "table": {nasty: {nasty: nasty}}},
        "readings": [*run.readings, wide],
        "layers": [layer.model_copy(update={"name": nasty, "form": nasty}) for layer in run.layers],
        "stages": [stage.model_copy(update={"after": nasty}) for stage in run.stages],
        "candidates": [
            item.model_copy(update={"recipe": {"steps": [{"kind": nasty, nasty: [nasty]}]}}) for item in run.candidates
        ],
    }  # fmt: skip
    source = render(run.model_copy(update=changes))
    page = Page(source)
    assert page.all("img") == [] and len(page.all("script")) == 1
    assert not [given for _, given in page.elements if any(name.startswith("on") for name in given)]
    assert plain(nasty) in page.text and "49" not in re.findall(r"\{\{ ?(\d+) ?\}\}", page.text)
    assert "{{ 7*7 }}" in page.text


def test_plot_marks_carry_recipe_and_figures() -> None:
    run = sample_runs.full()
    marks = Page(render(run)).all("g", "mark")
    measured = [item for item in run.candidates if item.state == "done"]
    assert len(marks) == len(measured) + 1
    for item in measured:
        (mark,) = [mark for mark in marks if mark["data-number"] == str(item.number)]
        facts = dict(json.loads(mark["data-facts"]))
        assert facts["size"] == text.size(item.bytes or 0) and facts["latency"] == text.amount(
            item.latency_ms or 0, "ms"
        )
        assert mark["data-title"] == f"#{item.number} {text.recipe(item.recipe)}"
        assert mark["tabindex"] == "0" and facts["size"] in mark["aria-label"]
    assert [mark["data-number"] for mark in marks if "chosen" in mark["class"].split()] == ["3"]
    assert sum("front" in mark["class"].split() for mark in marks) == 5
    assert sum("original" in mark["class"].split() for mark in marks) == 1


def test_every_candidate_is_in_a_table_and_every_reason_is_given() -> None:
    run = sample_runs.full()
    found = Page(render(run)).text
    for item in run.candidates:
        assert f"#{item.number} {plain(text.recipe(item.recipe))}" in found
        assert plain(item.reason) in found


def test_steps_layers_and_what_was_left_alone() -> None:
    run = sample_runs.full()
    page = Page(render(run))
    assert len(page.all("span", "badge nothing")) == 1
    for layer in run.layers:
        assert layer.name in page.text
    for record in run.steps:
        for left in record.left:
            assert plain(left.layer) in page.text and left.reason in page.text
    assert "64×64×3×3 → 40×40×3×3" in page.text
    assert "QLinearConv 19" in page.text
    for warning in [*run.warnings, *run.steps[0].warnings]:
        assert plain(warning) in page.text


def test_recipe_command_seed_versions_and_digest_are_given() -> None:
    run = sample_runs.full()
    found = Page(render(run)).text
    for words in (
        run.command,
        "seed 0",
        "torch 2.13.0",
        "keep: 0.42",
        "featherweight apply recipe.yaml zoo:cifar10-resnet20 --target onnxruntime",
    ):
        assert words in found
    assert re.search(r"digest of the recipe [0-9a-f]{64}", found)


def test_what_is_missing_is_said() -> None:
    assert "No recipe came as far as being measured" in Page(render(sample_runs.infeasible())).text
    assert "What the search tried" not in Page(render(sample_runs.applied())).text
    found = Page(render(sample_runs.empty())).text
    assert "Nothing was measured in this run" in found and "This run left no compressed artifact to run" in found


def test_a_huge_run_stays_readable_and_small() -> None:
    run = sample_runs.full()
    long = "x" * 3000
    many = [
        item.model_copy(update={"number": number, "reason": long, "recipe": {"steps": [{"kind": long}] * 5}})
        for number in range(30)
        for item in run.candidates
    ]
    changes = {
        "candidates": many,
        "layers": [
            layer.model_copy(update={"name": f"{long}{number}"}) for number in range(40) for layer in run.layers
        ],
        "evidence": {f"list {number}": [long] * 5000 for number in range(5)},
        "warnings": [f"{number} {long}" for number in range(500)],
        "steps": [
            record.model_copy(update={"changed": {f"{number}{long}": long for number in range(3000)}})
            for record in run.steps
        ],
    }
    source = render(run.model_copy(update=changes))
    assert len(source.encode()) < LIMIT
    assert "smaller ones are in run.json" in source and "more in run.json" in source


def test_too_large_a_report_is_an_error_not_a_half_file(tmp_path: Path) -> None:
    one = sample_runs.full().readings[0]
    run = sample_runs.full().model_copy(
        update={"readings": [one.model_copy(update={"name": f"figure {number}"}) for number in range(9000)]}
    )
    with pytest.raises(OutputError, match=r"read run\.json instead"):
        build(run, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_build_writes_the_file_whole_and_others_may_read_it(tmp_path: Path) -> None:
    path = build(sample_runs.full(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render(sample_runs.full())
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o044 == 0o044


def test_build_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        build(sample_runs.full(), tmp_path / "file" / "report.html")


def test_rebuild_reads_what_a_run_left(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(sample_runs.full().model_dump_json(), encoding="utf-8")
    assert rebuild(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(sample_runs.full())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no run.json"),
        ("{", "is of another format"),
        ('{"task": 3}', "is of another format"),
        ('{"format": 99}', "is of another format"),
        (b"\xff\xfe\x00", "cannot be read: it is not text"),
    ],
)
def test_rebuild_refuses_in_one_line(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OutputError, match=words) as caught:
        rebuild(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_the_report_loads_no_torch() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'optuna'}"
    code = f"import sys, featherweight.report.build; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rendering_twice_gives_the_same_page() -> None:
    assert render(sample_runs.full()) == render(sample_runs.full())
    assert html.unescape(render(sample_runs.full())).count("featherweight report</title>") == 1
