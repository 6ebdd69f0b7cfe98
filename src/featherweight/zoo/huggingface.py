"""Models and tokenizers of local Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.registry import need


def pretrained(kind: str, folder: Path, **settings: Any) -> Any:
    """What `folder` holds as transformers' class `kind` ("AutoTokenizer", "AutoModel"...); nothing is fetched.

    Raises `MissingExtra` if transformers is not installed.
    """
    transformers = need("transformers", "zoo")
    with quiet(transformers.utils.logging):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, **settings)


def model(kind: str, folder: Path, **settings: Any) -> Any:
    """A model in evaluation mode whose attention is written out in plain operators, which every exporter knows."""
    return pretrained(kind, folder, attn_implementation="eager", **settings).eval()


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Let transformers report errors only, and draw no bars, inside the block."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
