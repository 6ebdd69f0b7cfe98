"""Write the report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from pydantic import ValidationError

from ..core.diagnosis import Diagnosis
from ..core.errors import OutputError
from ..core.files import write_text
from ..core.run import Run
from . import diagnosis, text
from .view import view

LIMIT = 2_000_000  # bytes of the page


def build(run: Run, path: Path) -> Path:
    """Write the report of `run` to `path`, whole or not at all, and return `path`.

    Raises `OutputError` if it cannot be written, or would not be small enough to be read.
    """
    path = Path(path)
    beside = Path(run.artifact or "artifact").name
    folder = beside if (path.parent / beside).is_dir() or not run.artifact else run.artifact
    page = render(run, folder)
    size = len(page.encode())
    if size >= LIMIT:
        raise OutputError(
            f"the report of this run would take {size:,} bytes, more than {LIMIT:,}; read run.json instead"
        )
    write_text(path, page)
    return path


def rebuild(folder: str | Path) -> Path:
    """Write report.html anew from the run.json in `folder`.

    Raises `OutputError` if that is missing, cannot be read or is of another format.
    """
    path = Path(folder) / "run.json"
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise OutputError(f"{folder} holds no run.json; give the output folder of compress, apply or demo") from error
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    try:
        run = Run.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise OutputError(
            f"{path} is of another format ({where}: {problem['msg']}); run the job again with this version"
        ) from error
    return build(run, Path(folder) / "report.html")


def build_diagnosis(found: Diagnosis, path: Path) -> Path:
    """Write the page of a diagnosis to `path`, whole or not at all, and return `path`. Raises `OutputError` if it
    cannot be written.
    """
    write_text(path, _page("diagnosis.html", diagnosis.view(found)))
    return path


def render(run: Run, folder: str = "artifact") -> str:
    """The page as text; `folder` is where the artifact lies, seen from the page."""
    return _page("report.html", view(run, folder))


def _page(template: str, values: dict[str, Any]) -> str:
    """A template laid out with `values`; its script and its style are in it."""
    script, style = (_asset(name) for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    given = {"script": Markup(script), "style": Markup(style), "script_digest": digest}
    return _environment().get_template(template).render(values | given)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clip": text.clip,
        "label": text.label,
        "amount": text.amount,
        "number": text.number,
        "duration": text.duration,
    }
    environment.filters |= {
        "step": text.step,
        "recipe": text.recipe,
        "size": text.size,
        "count": text.count,
        "interval": text.interval,
        "moment": text.moment,
    }
    return environment


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()
