"""A character model of titles: textgenrnn's LSTM (Woolf 2017)."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..core.task import Task, ready_made
from .metrics import bits_per_character
from .source import Source

VERSION = 1
WINDOW = 40
WEIGHTS, VOCABULARY, TITLES = (
    f"textgenrnn/{name}" for name in ("model.safetensors", "vocab.json", "hacker_news_2000.txt")
)
EDGE = "<s>"  # begins and ends a title


class Titles:
    """A map-style data set of titles; a title of n characters is n + 1 inputs (the last 40 ids, padded with 0 at the left) and their next ids."""

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


@ready_made("titles-lstm")
def titles_lstm() -> Task:
    """Two LSTM layers that write titles character by character (textgenrnn): 462,717 parameters, 150 Hacker News titles, 2.560 bits a character."""
    source = Source("titles-lstm", WEIGHTS, VOCABULARY, TITLES, "nets.py")
    vocabulary = json.loads(source.path(VOCABULARY).read_text(encoding="utf-8"))
    lines = source.path(TITLES).read_text(encoding="utf-8").splitlines()[1:]
    titles = [encoded(line, vocabulary) for line in lines]
    return Task(
        name="titles-lstm",
        model=lambda: source.weights(source.module("nets").CharLSTM(), WEIGHTS),
        train=Titles(titles[400:]),
        validate=Titles(titles[150:400]),
        test=Titles(titles[:150]),
        metric=bits_per_character(),
        inputs=lambda batch: {"x": batch["x"]},
        batch_size=16,
        fingerprint=source.fingerprint(VERSION),
        notes="Hacker News titles (the network was trained on Reddit's): the first 150 test, the next 250 validate, the others train.",
    )


def encoded(title: str, vocabulary: dict[str, int]) -> Tensor:
    """The ids of a title with an edge at both ends; characters that the vocabulary lacks are left out."""
    return torch.tensor([vocabulary[item] for item in (EDGE, *title, EDGE) if item in vocabulary])
