"""GPTQ of one linear layer with LLM Compressor, in its own environment: python gptq_llmcompressor.py DATA OUT ...

DATA is a folder with weight.npy [rows, columns] and inputs.npy [n, columns]; OUT gets weight.npy, the rounded one, and
figures.json. The modifier is driven through its own events, as `oneshot` drives it, without a model around the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier
from measured import layer, measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--observer", default="minmax", help="minmax, or mse: searched clipping")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    weights = QuantizationArgs(
        num_bits=given.bits, symmetric=False, strategy="group", group_size=given.group, observer=given.observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(config_groups={"group_0": scheme}, targets=["Linear"])
    linear, inputs = layer(given.data)
    model = torch.nn.Sequential(linear)
    state, event = State(model=model), Event()

    def quantize() -> torch.Tensor:
        modifier.on_initialize(state)
        modifier.on_calibration_start(state, event)
        with torch.no_grad():
            model(inputs)
        modifier.on_sequential_epoch_end(state, event, [linear])
        modifier.on_calibration_end(state, event)
        modifier.on_finalize(state)
        return linear.weight.detach()

    measured(quantize, given.out)


if __name__ == "__main__":
    main()
