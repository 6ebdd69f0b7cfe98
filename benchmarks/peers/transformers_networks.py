"""Small networks of `transformers`, from configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from networks import NETWORKS, Example, Network
from torch import Tensor, nn

WORDS = 50
QKV = {"q_proj": 4, "k_proj": 4, "v_proj": 4}
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 64, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}
PICTURES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Only(nn.Module):
    """A model of `transformers` whose inputs have names, and which gives tensors alone."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output


class Words(Only):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.output)


class Causal(Only):
    def forward(self, input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids), self.output)


class Pixels(Only):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return getattr(self.model(pixel_values=pixel_values), self.output)


class Pairs(Only):
    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids), self.output)


class Speech(Only):
    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_features=input_features, decoder_input_ids=decoder_input_ids), self.output)


class Both(Only):
    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
        return getattr(self.model(**given), self.output)


def words() -> Example:
    found = torch.randint(3, WORDS, (2, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": found, "attention_mask": mask}


def causal() -> Example:
    return {"input_ids": words()["input_ids"]}


def pixels() -> Example:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


def pairs() -> Example:
    return {**causal(), "decoder_input_ids": causal()["input_ids"][:, :6]}


def speech() -> Example:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))
    return {"input_features": features, "decoder_input_ids": causal()["input_ids"][:, :6]}


def both() -> Example:
    return {**words(), **pixels()}


def add(
    name: str,
    wrap: type[Only],
    example: Callable[[], Example],
    config: Callable[[], Any],
    model: str,
    heads: dict[str, int] | None = None,
    output: str = "logits",
    refused: str = "",
) -> None:
    """Put the architecture `name` into the zoo: the class `model` of `transformers` with this configuration."""
    NETWORKS[name] = Network(
        lambda: wrap(getattr(transformers, model)(config()), output), example, heads or {}, refused
    )


def configured(kind: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{kind}Config")(**settings)


BERT_HEADS = {"query": 4, "key": 4, "value": 4}
for kind in ("Bert", "Roberta", "Electra"):
    config = configured(kind, **SIZES, intermediate_size=64, pad_token_id=1)
    add(
        kind.replace("Bert", "BERT").replace("berta", "BERTa"),
        Words,
        words,
        config,
        f"{kind}ForSequenceClassification",
        BERT_HEADS,
    )
add(
    "ALBERT",
    Words,
    words,
    configured("Albert", **SIZES, embedding_size=16, intermediate_size=64, num_hidden_groups=1),
    "AlbertForSequenceClassification",
    BERT_HEADS,
)
add(
    "DistilBERT",
    Words,
    words,
    configured("DistilBert", vocab_size=WORDS, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "DistilBertForSequenceClassification",
    {"q_lin": 4, "k_lin": 4, "v_lin": 4},
)
VIT = {**PICTURES, "image_size": 32, "patch_size": 8}
add("ViT", Pixels, pixels, configured("ViT", **VIT), "ViTForImageClassification", BERT_HEADS | QKV)
add("DeiT", Pixels, pixels, configured("DeiT", **VIT), "DeiTForImageClassification", BERT_HEADS | QKV)
add(
    "Swin",
    Pixels,
    pixels,
    configured("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4),
    "SwinForImageClassification",
)
add(
    "SegFormer",
    Pixels,
    pixels,
    configured(
        "Segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        num_labels=4,
    ),
    "SegformerForSemanticSegmentation",
)
add(
    "ConvNeXtV2",
    Pixels,
    pixels,
    configured("ConvNextV2", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "ConvNextV2ForImageClassification",
    refused="pwconv1: the operator mean runs over it",  # its norm of global responses divides by their mean
)
add(
    "RegNet",
    Pixels,
    pixels,
    configured("RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8),
    "RegNetForImageClassification",
)
add(
    "GPT-2",
    Causal,
    causal,
    configured(
        "GPT2", vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=1
    ),
    "GPT2LMHeadModel",
)
add("GPT-NeoX", Causal, causal, configured("GPTNeoX", **DECODER), "GPTNeoXForCausalLM")
add(
    "OPT",
    Causal,
    causal,
    configured(
        "OPT",
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        use_cache=False,
    ),
    "OPTForCausalLM",
    QKV,
)
add(
    "BLOOM",
    Causal,
    causal,
    configured("Bloom", vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4, use_cache=False),
    "BloomForCausalLM",
)
GROUPED = {**DECODER, "num_key_value_heads": 2}
GROUPED_HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
add("Llama, grouped queries", Causal, causal, configured("Llama", **GROUPED), "LlamaForCausalLM", GROUPED_HEADS)
add("Mistral", Causal, causal, configured("Mistral", **GROUPED, sliding_window=4), "MistralForCausalLM", GROUPED_HEADS)
add("Qwen2, biases", Causal, causal, configured("Qwen2", **GROUPED), "Qwen2ForCausalLM", GROUPED_HEADS)
add(
    "Qwen3, norms of heads",
    Causal,
    causal,
    configured("Qwen3", **GROUPED, head_dim=8),
    "Qwen3ForCausalLM",
    GROUPED_HEADS,
)
add("Gemma", Causal, causal, configured("Gemma", **GROUPED, head_dim=8), "GemmaForCausalLM", GROUPED_HEADS)
add("Phi", Causal, causal, configured("Phi", **DECODER), "PhiForCausalLM", QKV)
add("Phi-3, one qkv layer", Causal, causal, configured("Phi3", **GROUPED, pad_token_id=0), "Phi3ForCausalLM")
add(
    "Mixtral, experts",
    Causal,
    causal,
    configured("Mixtral", **GROUPED, num_local_experts=4),
    "MixtralForCausalLM",
    GROUPED_HEADS,
)
add(
    "T5",
    Pairs,
    pairs,
    configured(
        "T5",
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    ),
    "T5ForConditionalGeneration",
    {"q": 4, "k": 4, "v": 4},
)
SEQUENCES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "use_cache": False,
    "vocab_size": WORDS,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
add("BART", Pairs, pairs, configured("Bart", **SEQUENCES, **TOKENS), "BartForConditionalGeneration", QKV)
add(
    "Whisper",
    Speech,
    speech,
    configured(
        "Whisper",
        **SEQUENCES,
        **TOKENS,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        begin_suppress_tokens=None,
    ),
    "WhisperForConditionalGeneration",
    QKV,
)
CLIP_TEXT = {
    **PICTURES,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
add(
    "CLIP",
    Both,
    both,
    configured("CLIP", text_config=CLIP_TEXT, vision_config=VIT, projection_dim=24),
    "CLIPModel",
    QKV,
    "logits_per_image",
)
