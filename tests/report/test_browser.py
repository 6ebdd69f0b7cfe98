"""The page in a real browser: its script runs without an error, and does what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import sample_runs

from featherweight.report.build import render

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
QUIET += [
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=3000",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; run: apt-get install chromium")


def browse(source: str, folder: Path) -> tuple[str, str]:
    """The document after the scripts ran, and what the console said."""
    page = folder / "page.html"
    page.write_text(source, encoding="utf-8")
    command = [
        str(CHROMIUM),
        *QUIET,
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,2400",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(source: str, probe: str) -> str:
    """The page with a script of ours after its own; its policy is lifted, since it forbids all other scripts."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', source)
    assert policy
    return source.replace(policy[0], "").replace("</body>", f"<script>{probe}</script></body>")


@pytest.mark.parametrize("name", ["full", "empty"])
def test_the_script_runs_without_an_error_under_its_own_policy(name: str, tmp_path: Path) -> None:
    document, console = browse(render(sample_runs.ALL[name]()), tmp_path)
    assert 'data-script="ran"' in document
    assert console == ""
    assert "<title>broken" not in document


def test_the_policy_stops_a_script_that_is_not_the_page_s_own(tmp_path: Path) -> None:
    source = render(sample_runs.empty()).replace("</main>", "<script>document.title = 'broken'</script></main>")
    document, console = browse(source, tmp_path)
    assert "<title>broken" not in document
    assert "Content Security Policy" in console


PROBE = """
addEventListener("error", (event) => document.body.setAttribute("data-error", event.message));
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const tip = document.getElementById("tip");
const mark = document.querySelector('g.mark[data-number="9"]');
mark.dispatchEvent(new Event("mouseenter"));
say("hover", tip.hidden + "|" + tip.textContent);
mark.dispatchEvent(new Event("mouseleave"));
say("left", tip.hidden);
document.querySelector("g.mark.chosen").focus();
say("focus", tip.hidden + "|" + tip.textContent);
const table = document.querySelector("table.layers");
const names = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent);
const first = names();
table.querySelectorAll("thead button")[3].click();
say("ascending", names()[0]);
table.querySelectorAll("thead button")[3].click();
say("descending", names()[0] + "|" + table.querySelectorAll("th")[3].getAttribute("aria-sort"));
table.querySelectorAll("thead button")[0].click();
say("again", JSON.stringify(names()) === JSON.stringify(first));
dispatchEvent(new Event("beforeprint"));
say("print", document.querySelectorAll("details:not([open])").length);
dispatchEvent(new Event("afterprint"));
const wide = document.documentElement;
say("overflow", wide.scrollWidth > wide.clientWidth);
"""


def test_hovering_focusing_sorting_and_printing(tmp_path: Path) -> None:
    document, console = browse(probed(render(sample_runs.full()), PROBE), tmp_path)
    said = {
        name: unescape(value)
        for name, value in re.findall(r'data-(\w+)="([^"]*)"', document[document.index("<body") :][:6000])
    }
    assert console == "" and "error" not in said
    assert said["hover"].startswith("false|#9 prune.structured(keep=0.1, score=l2") and "41.20" in said["hover"]
    assert said["left"] == "true"
    assert said["focus"].startswith("false|#3 ") and "chosen" in said["focus"]
    assert said["ascending"] == "conv1.weight"
    assert said["descending"].startswith("layer3.") and said["descending"].endswith("|descending")
    assert said["again"] == "true" and said["print"] == "0" and said["overflow"] == "false"


def test_texts_of_the_plot_are_not_cut_off(tmp_path: Path) -> None:
    probe = """
    const cut = [];
    for (const svg of document.querySelectorAll(".plot svg, .small svg")) {
      const frame = svg.getBoundingClientRect();
      for (const word of svg.querySelectorAll("text")) {
        const box = word.getBoundingClientRect();
        const aside = box.left < frame.left - 1 || box.right > frame.right + 1;
        const away = box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
        if (box.width && (aside || away)) cut.push(word.textContent);
      }
    }
    document.body.setAttribute("data-cut", cut.join("|"));
    """
    for name in ("full", "lower_is_better"):
        document, _ = browse(probed(render(sample_runs.ALL[name]()), probe), tmp_path)
        assert re.search(r'data-cut="([^"]*)"', document)[1] == ""  # type: ignore[index]
