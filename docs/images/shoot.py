"""Take the pictures of a real report that the README shows: `python docs/images/shoot.py DIR`.

DIR is what `featherweight demo` left. Needs chromium. Writes report.png (the head of the page) and search.png (the plot
and the front) beside this file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from featherweight.report.build import rebuild

HERE = Path(__file__).parent
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"]
QUIET += [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--force-device-scale-factor=1",
]
SEARCH = """
main > :not([aria-labelledby=search]), .top, footer, details { display: none !important; }
#search { margin-top: -40px; }
"""


def shoot(page: Path, picture: Path, height: int, style: str = "") -> None:
    """A picture of `page`, 1280 pixels wide, with `style` added to its own."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("chromium is not installed; run: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text(encoding="utf-8").replace("</style>", style + "</style>"), encoding="utf-8")
        size = [f"--window-size=1280,{height}", f"--user-data-dir={folder}/profile", f"--screenshot={picture}"]
        subprocess.run([browser, *QUIET, *size, copy.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    page = rebuild(sys.argv[1])
    shoot(page, HERE / "report.png", 1100)
    shoot(page, HERE / "search.png", 960, SEARCH)
