"""Weights of a language model or encoder by LLM Compressor.

    python weights_llmcompressor.py MODEL TOKENS OUT --bits B --group G

MODEL is a folder as transformers saves it; TOKENS an .npz file of token sequences (see calibration.py); OUT gets
weights.safetensors, the rounded weights as floats by name, and figures.json: bits per weight with scales and zero
points, seconds of the processor.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from calibration import inputs_in
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast


def bits_of(module: Any, bits: int) -> float:
    """All bits of a layer: integers, scales in float16, zero points in as many bits as an integer."""
    zero = getattr(module, "weight_zero_point", None)
    return (
        bits * module.weight.numel() + 16 * module.weight_scale.numel() + (0 if zero is None else bits * zero.numel())
    )


def schemes(model: torch.nn.Module, bits: int, group: int, observer: str) -> dict[str, QuantizationScheme]:
    """Groups of `group`, and of its nearest divisor where it does not divide: as featherweight takes them."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            columns = module.in_features
            divisors = [size for size in range(1, columns + 1) if columns % size == 0]
            found.setdefault(min(divisors, key=lambda size: abs(math.log(size / group))), []).append(name)
    return {
        f"group_{size}": QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(
                num_bits=bits, symmetric=False, strategy="group", group_size=size, observer=observer
            ),
        )
        for size, names in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--observer", default="mse", help="minmax, or mse: searched clipping")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = model_in(given.model)
    sequences = [batch["input_ids"][0].tolist() for batch in inputs_in(str(given.tokens))]
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    groups = schemes(model, given.bits, given.group, given.observer)
    kind = GPTQModifier if given.method == "gptq" else QuantizationModifier
    modifier = kind(config_groups=groups, ignore=["lm_head"])
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
    done = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    total = sum(bits_of(module, given.bits) for module in done.values())
    count = sum(module.weight.numel() for module in done.values())
    rounded = {f"{name}.weight": on_grid(module).contiguous() for name, module in done.items()}
    save_file(rounded, given.out / "weights.safetensors")
    figures = {"bits_per_weight": total / count, "weights": count, "cpu_seconds": seconds}
    (given.out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def model_in(folder: Path) -> Any:
    """The model of a folder: with its head where it is a language model, else the encoder without its pooler."""
    if any("CausalLM" in name for name in AutoConfig.from_pretrained(folder).architectures or ()):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)


def unused_tokenizer() -> PreTrainedTokenizerFast:
    """`oneshot` wants one even for data that are tokens already."""
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def on_grid(module: Any) -> torch.Tensor:
    """The weight of a layer, rounded to its own grid: what would be stored."""
    if hasattr(module, "weight_g_idx"):
        raise NotImplementedError("groups that are not neighbours")
    zero = getattr(module, "weight_zero_point", None)
    return fake_quantize(module.weight.detach(), module.weight_scale, zero, module.quantization_scheme.weights)


if __name__ == "__main__":
    main()
