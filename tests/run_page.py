"""Run the code of one page of the documentation: `python run_page.py PAGE.md`, in an empty folder.

Python blocks share one namespace. A block whose first line is a comment with a file name is also written to that file.
Lines of console blocks that begin with `$ featherweight` are run, and must end with exit code 0.
"""

import re
import shlex
import sys
from pathlib import Path

from featherweight.cli import main

BLOCK = re.compile(r"^```(python|console|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")


def blocks(text: str) -> list[tuple[int, str, str]]:
    """Line, language and code of every block that is to be run."""
    return [(text[: match.start()].count("\n") + 2, match[1], match[2]) for match in BLOCK.finditer(text)]


def run(path: Path) -> int:
    """Run every block in order; give how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    sys.path.insert(0, str(Path.cwd()))
    found = blocks(path.read_text(encoding="utf-8"))
    for line, language, code in found:
        print(f"-- {path.name}:{line} {language}", flush=True)
        named = FILE.match(code)
        if named:
            Path(named[1]).write_text(code, encoding="utf-8")
        if language == "python" and not named:
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        if language == "console":
            commands(code, f"{path.name}:{line}")
    return len(found)


def commands(code: str, where: str) -> None:
    for command in re.findall(r"^\$ featherweight (.*)$", code, re.MULTILINE):
        result = main(shlex.split(command))
        if result != 0:
            raise SystemExit(f"{where}: featherweight {command} ended with exit code {result}")


if __name__ == "__main__":
    print(run(Path(sys.argv[1])), "blocks")
