"""The tasks of the benchmark of adapters: sentences to classify on MiniLM, and a story teller on other texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from featherweight.core.context import Context
from featherweight.core.fit import Schedule, fit
from featherweight.core.metric import top1
from featherweight.core.task import Task
from featherweight.zoo import huggingface
from featherweight.zoo.metrics import perplexity
from featherweight.zoo.minilm import encoder, model_folder
from featherweight.zoo.source import Source
from featherweight.zoo.stories import FOLDER, Texts, language_model, next_token_loss

STYLES = {
    "shakespeare": "text/tiny_shakespeare.txt",
    "wikipedia": "text/wikitext2_valid.txt",
    "headlines": "textgenrnn/hacker_news_2000.txt",
}
PARTS = ("train", "dev", "test")
LONGEST, WINDOW = 64, 128  # tokens: of a sentence, of a piece of text
PIECES = (480, 60, 120)  # to train on, to validate, to test


class Sentences:
    """A map-style data set of labelled sentences as token ids; a batch is padded to its longest."""

    def __init__(self, tokens: Sequence[Tensor], labels: Tensor):
        self.tokens, self.labels = list(tokens), labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows = [self.tokens[place] for place in index.tolist()]
        masks = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": self.labels[index],
        }


class Classifier(nn.Module):
    """An encoder of sentences and a linear layer: N x T token ids to N x classes."""

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask))


def class_loss(output: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch["labels"])


@functools.cache
def sentiment(limit: int | None = None, head_epochs: float = 3.0) -> Task:
    """SST-2 on MiniLM: the encoder as it comes, under a linear layer that was trained on it alone."""
    source = Source("sst2-minilm", *(f"text/sst2/{part}.tsv" for part in ("train", "dev", "test")))
    tokenizer = huggingface.pretrained("AutoTokenizer", model_folder())
    train, dev, test = (_sentences(source.path(f"text/sst2/{part}.tsv"), tokenizer, limit) for part in PARTS)
    torch.manual_seed(0)
    model = Classifier(encoder(model_folder()), 384, 2)
    free = {0: "batch", 1: "sequence"}
    splits = {"train": train, "validate": dev, "test": test}
    settings: dict[str, Any] = {
        "loss": class_loss,
        "metric": top1(),
        "dynamic": {"input_ids": free, "attention_mask": free},
        "batch_size": 32,
        "calibration_limit": 128,
        "fingerprint": source.fingerprint(1),
    }
    start = Task(name="sst2-minilm", model=model, **splits, **settings)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    ctx = Context(start, device=torch.device("cpu"))
    fit(model, ctx, Schedule(epochs=head_epochs, lr=3e-3), during=_encoder_at_rest)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(True)
    return Task(name="sst2-minilm", model=model.eval(), **splits, **settings)


def _encoder_at_rest(model: nn.Module, _done: float) -> None:
    model.encoder.eval()


def _sentences(file: Any, tokenizer: Any, limit: int | None) -> Sentences:
    rows = [line.rpartition("\t") for line in file.read_text(encoding="utf-8").splitlines() if "\t" in line]
    rows = rows[:limit]
    ids = tokenizer([text for text, _, _ in rows], truncation=True, max_length=LONGEST)["input_ids"]
    return Sentences([torch.tensor(each) for each in ids], torch.tensor([int(label) for _, _, label in rows]))


@functools.cache
def style(name: str, limit: int | None = None) -> Task:
    """The language model of `zoo:stories260k` on another text, in pieces of equal length that do not overlap."""
    source = Source("stories260k", STYLES[name], f"{FOLDER}/config.json", f"{FOLDER}/model.safetensors")
    tokenizer = huggingface.pretrained("AutoTokenizer", source.path(FOLDER))
    text = source.path(STYLES[name]).read_text(encoding="utf-8")[:700_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    pieces = list(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = [pieces[place] for place in order]
    counts = [count if limit is None else min(count, limit) for count in PIECES]
    ends = [sum(counts[: place + 1]) for place in range(3)]
    return Task(
        name=f"stories260k on {name}",
        model=lambda: language_model(source),
        train=Texts(pieces[: ends[0]]),
        validate=Texts(pieces[ends[0] : ends[1]]),
        test=Texts(pieces[ends[1] : ends[2]]),
        loss=next_token_loss,
        metric=perplexity(),
        dynamic={"input_ids": {0: "batch", 1: "sequence"}},
        batch_size=8,
        calibration_limit=32,
        fingerprint=source.fingerprint(1),
    )
