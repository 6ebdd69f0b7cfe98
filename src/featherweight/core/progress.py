"""Progress of long work; silent unless the caller brings something that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Progress:
    """Shows nothing. The command line brings one that draws bars on standard error."""

    def track(self, items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
        """Pass `items` through, counting them against `total` under the heading `text`."""
        yield from items

    def say(self, text: str) -> None:
        """Tell the user one line."""
