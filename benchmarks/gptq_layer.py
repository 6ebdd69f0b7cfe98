"""GPTQ of one linear layer with `quantize.weights`, in a process of its own: python -m benchmarks.gptq_layer DATA OUT.

DATA and OUT are as in benchmarks/peers/gptq_llmcompressor.py, whose other half this is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from featherweight.core.context import Context
from featherweight.core.step import step
from featherweight.core.task import Task

from .peers.measured import layer, measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--step", type=json.loads, required=True, help="quantize.weights and its settings, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    item = step(**given.step)
    linear, inputs = layer(given.data)
    model = nn.Sequential(linear)
    task = Task(name="layer", model=model, calibrate=[inputs])
    ctx = Context(task, device=torch.device("cpu"))

    def quantize() -> torch.Tensor:
        changed = item.apply(model, ctx)
        if "gptq" not in ctx.record.changed.get("0", ""):
            raise RuntimeError(f"the layer was not quantized by GPTQ: {ctx.record}")
        return changed[0].weight.detach()  # type: ignore[index]

    measured(quantize, given.out)


if __name__ == "__main__":
    main()
