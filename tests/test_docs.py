"""The documentation is true: its code runs, its links lead somewhere, and it names what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight import catalog

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [
    page for page in PAGES if re.search(r"^```(python|console)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
SEARCHING = {"README.md", "getting-started.md"}
ISSUE_PAGES = {"getting-started.md", "tasks.md", "methods.md", "targets.md", "architecture.md", "measuring.md"}


def test_every_page_is_there() -> None:
    assert {page.name for page in PAGES} >= ISSUE_PAGES
    assert {page.name for page in WITH_CODE} >= (ISSUE_PAGES - {"architecture.md"}) | {"README.md"}


def by_cost(page: Path) -> object:
    """The pages that search take a minute or two."""
    return pytest.param(page, marks=pytest.mark.slow) if page.name in SEARCHING else page


@pytest.mark.parametrize("page", map(by_cost, WITH_CODE), ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    environment = os.environ | {"FEATHERWEIGHT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(ROOT / "tests" / "run_page.py"), str(page)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-2]) >= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # code calls what it subscripts
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_every_method_target_and_axis() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in [*catalog.methods(), *catalog.targets(), *catalog.axes()]:
        assert entry["name"] in text, f"README.md does not name {entry['name']}"


def test_the_figures_of_the_readme_are_those_of_the_benchmark() -> None:
    measured = (ROOT / "README.md").read_text(encoding="utf-8").split("## Measured")[1].split("\n## ")[0]
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("## Against the best of the others")[1]
    summary = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert rows == summary and len(rows) > 2


def test_no_page_holds_a_path_of_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:home|root|work|Users)/", page.read_text(encoding="utf-8")), page.name
