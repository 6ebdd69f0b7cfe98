"""A small language model of the Llama layout on TinyStories (Eldan and Li, arXiv:2305.07759)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.outputs import first
from ..core.task import Task, labels, ready_made
from . import huggingface
from .metrics import perplexity
from .source import DATA, Source

VERSION = 1
TEXTS, FOLDER = "text/tinystories_850.json", "stories260K"
CONTEXT, PADDING = 512, -100


class Texts:
    """A map-style data set of token sequences.

    A batch is padded at the right, where a causal model does not look, and labelled -100 there.
    """

    def __init__(self, tokens: list[Tensor]):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows = [self.tokens[place] for place in index.tolist()]
        targets = pad_sequence(rows, batch_first=True, padding_value=PADDING)
        return {"input_ids": pad_sequence(rows, batch_first=True), "labels": targets}


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of each next token; padding does not count."""
    logits, target = first(output)[:, :-1], labels(batch)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=PADDING)


@ready_made("stories260k", variables=(DATA,), packages=("transformers",))
def stories260k() -> Task:
    """A Llama-layout language model (stories260K of llama2.c, 260,032 parameters), 150 stories, perplexity 4.0775."""
    parts = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    source = Source("stories260k", TEXTS, *(f"{FOLDER}/{part}" for part in parts))
    stories = json.loads(source.path(TEXTS).read_text(encoding="utf-8"))
    tokenizer = huggingface.pretrained("AutoTokenizer", source.path(FOLDER))
    tokens = [torch.tensor(ids) for ids in tokenizer(stories, truncation=True, max_length=CONTEXT)["input_ids"]]
    return Task(
        name="stories260k",
        model=lambda: language_model(source),
        train=Texts(tokens[:600]),
        validate=Texts(tokens[600:700]),
        test=Texts(tokens[700:]),
        loss=next_token_loss,
        metric=perplexity(),
        dynamic={"input_ids": {0: "batch", 1: "sequence"}},
        batch_size=8,
        calibration_limit=64,
        fingerprint=source.fingerprint(VERSION),
        notes="Stories 0-599 train (the first 64 calibrate), 600-699 validate, 700-849 test; at most 512 tokens "
        "of each. All come from the training part of TinyStories, so the original network may have seen them.",
    )


def language_model(source: Source) -> nn.Module:
    """The model of the local Hugging Face folder; it gives its logits and nothing else."""
    model = huggingface.model("AutoModelForCausalLM", source.path(FOLDER))
    model.config.use_cache = False
    return model
