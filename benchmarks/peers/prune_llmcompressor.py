"""A language model pruned by LLM Compressor: python prune_llmcompressor.py MODEL TOKENS OUT --score S --pattern P.

MODEL is a folder as transformers saves it; TOKENS an .npz file of token sequences (see calibration.py); OUT gets
weights.safetensors, the pruned weights by name, and figures.json: weights, those that are zero, seconds of the
processor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from calibration import inputs_in
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from weights_llmcompressor import unused_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--score", choices=["wanda", "sparsegpt"], required=True)
    parser.add_argument("--pattern", default="0:0", help="n:m, or 0:0 for single weights")
    parser.add_argument("--sparsity", type=float, default=0.5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    sequences = [batch["input_ids"][0].tolist() for batch in inputs_in(str(given.tokens))]
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    kind = SparseGPTModifier if given.score == "sparsegpt" else WandaPruningModifier
    modifier = kind(sparsity=given.sparsity, mask_structure=given.pattern, targets=["Linear"], ignore=["re:.*lm_head"])
    started = time.process_time()
    oneshot(
        model=model,
        dataset=data,
        processor=unused_tokenizer(),
        recipe=[modifier],
        num_calibration_samples=len(data),
        max_seq_length=max(map(len, sequences)),
        shuffle_calibration_samples=False,
    )
    seconds = time.process_time() - started
    pruned = {
        f"{name}.weight": module.weight.detach().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    save_file(pruned, given.out / "weights.safetensors")
    figures = {
        "weights": sum(weight.numel() for weight in pruned.values()),
        "zeros": sum(int((weight == 0).sum()) for weight in pruned.values()),
        "cpu_seconds": seconds,
    }
    (given.out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
