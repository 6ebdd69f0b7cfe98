"""A character model of titles: textgenrnn's LSTM (Woolf 2017)."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..core.task import Task, ready_made
from .metrics import bits_per_character
from .source import DATA, Source
from .splits import apart

VERSION = 1
WINDOW = 40
WEIGHTS, VOCABULARY, TITLES = (
    f"textgenrnn/{name}" for name in ("model.safetensors", "vocab.json", "hacker_news_2000.txt")
)
EDGE = "<s>"  # begins and ends a title


class Titles:
    """A map-style data set of titles as ids.

    A title of n characters is n + 1 inputs (the 40 ids before it, padded with 0 at the left) and as many next ids.
    """

    def __init__(self, titles: list[Tensor]):
        self.titles = titles

    def __len__(self) -> int:
        return len(self.titles)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        chosen = [self.titles[place] for place in index.tolist()]
        return {
            "x": torch.cat([windows(title) for title in chosen]),
            "labels": torch.cat([title[1:] for title in chosen]),
            "lengths": torch.tensor([len(title) - 1 for title in chosen]),
        }


def windows(ids: Tensor) -> Tensor:
    """What precedes each of `ids` but the first: (n - 1) x WINDOW, padded with 0 at the left."""
    return torch.nn.functional.pad(ids[:-1], (WINDOW - 1, 0)).unfold(0, WINDOW, 1)


@ready_made("titles-lstm", variables=(DATA,))
def titles_lstm() -> Task:
    """A character LSTM of titles (textgenrnn, 462,717 parameters), 150 Hacker News titles, 2.560 bits a character."""
    source = Source("titles-lstm", WEIGHTS, VOCABULARY, TITLES, "nets.py")
    vocabulary = json.loads(source.path(VOCABULARY).read_text(encoding="utf-8"))
    lines = source.path(TITLES).read_text(encoding="utf-8").splitlines()[1:]
    test, validate = lines[:150], lines[150:400]
    validate = [validate[place] for place in apart(validate, test)]
    train = [lines[place] for place in apart(lines, test, validate)]
    return Task(
        name="titles-lstm",
        model=lambda: source.weights(source.module("nets").CharLSTM(), WEIGHTS),
        train=titles(train, vocabulary),
        validate=titles(validate, vocabulary),
        test=titles(test, vocabulary),
        metric=bits_per_character(),
        inputs=lambda batch: {"x": batch["x"]},
        batch_size=16,
        fingerprint=source.fingerprint(VERSION),
        notes="Hacker News titles (the network was trained on Reddit's): the first 150 test, 249 of the next 250 "
        "validate, the others train (the first of them calibrate); a title that recurs is in one split only.",
    )


def titles(lines: list[str], vocabulary: dict[str, int]) -> Titles:
    return Titles([encoded(line, vocabulary) for line in lines])


def encoded(title: str, vocabulary: dict[str, int]) -> Tensor:
    """The ids of a title with an edge at both ends; characters that the vocabulary lacks are left out."""
    return torch.tensor([vocabulary[item] for item in (EDGE, *title, EDGE) if item in vocabulary])
