"""Coupled dimensions of whole architectures: transformers with random weights, the networks of FEATHERWEIGHT_DATA."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tasks import one_thread  # noqa: F401
from torch import Tensor, nn

from featherweight.core.context import count_parameters
from featherweight.model.cut import disagreement, remove
from featherweight.model.groups import Coupling, couple

DATA = Path(os.environ.get("FEATHERWEIGHT_DATA", ""))


def nets() -> Any:
    """The module with the architectures of the data folder."""
    if "featherweight_data_nets" not in sys.modules:
        spec = importlib.util.spec_from_file_location("featherweight_data_nets", DATA / "nets.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["featherweight_data_nets"] = module
    return sys.modules["featherweight_data_nets"]


def lively(model: nn.Module) -> nn.Module:
    """Statistics of batch norms that are not those of a new network."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_(0, 0.1)
            elif "running_var" in name:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def halved(model: nn.Module, example: dict[str, Tensor]) -> tuple[Coupling, nn.Module]:
    """The coupling of `model`, and what is left of it without half of every group; checked."""
    coupling = couple(model, example)
    cut = {place: np.arange(0, len(coupling.groups[place]) - 1, 2) for place in coupling.free()}
    assert disagreement(model, coupling, cut, example) == ""
    return coupling, remove(copy.deepcopy(model), coupling, cut)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, float]
# architecture, input, number of groups, and the share of parameters that is left at most
CASES: dict[str, Case] = {
    "resnet20": (lambda: nets().CifarResNet(3), (2, 3, 32, 32), 12, 0.27),
    "resnet8": (lambda: nets().ResNet8(), (2, 3, 32, 32), 6, 0.27),
    "mobilenet": (lambda: nets().MobileNetV1_025(), (2, 3, 96, 96), 14, 0.29),
    "dscnn": (lambda: nets().DSCNN(), (2, 1, 49, 10), 5, 0.35),
    "autoencoder": (lambda: nets().AnomalyAE(), (2, 640), 9, 0.42),
    "dncnn": (lambda: nets().DnCNN(5), (2, 1, 16, 16), 4, 0.27),
    "fastestdet": (lambda: nets().FastestDet(), (2, 3, 64, 64), 34, 0.34),
    "kwt": (lambda: nets().KWT(layers=2), (2, 98, 40), 4, 0.71),
}


@pytest.mark.data
@pytest.mark.parametrize("name", CASES)
def test_architecture(name: str):
    factory, shape, groups, share = CASES[name]
    model = lively(factory())
    coupling, smaller = halved(model, {"x": torch.randn(shape)})
    assert len(coupling.groups) == groups
    assert count_parameters(smaller) / count_parameters(model) < share


@pytest.mark.data
def test_a_shortcut_that_pads_channels_follows():
    model: Any = lively(nets().CifarResNet(3))
    coupling, smaller = halved(model, {"x": torch.randn(2, 3, 32, 32)})
    assert (model.layer2[0].pad, model.layer3[0].pad) == (8, 16)
    assert (smaller.layer2[0].pad, smaller.layer3[0].pad) == (4, 8)
    assert (smaller.conv1.out_channels, smaller.layer3[2].conv2.out_channels) == (8, 32)
    assert len(coupling.repair) == 2


@pytest.mark.data
def test_what_cannot_be_removed_is_named():
    coupling = couple(lively(nets().KWT(layers=1)), {"x": torch.randn(2, 98, 40)})
    assert {coupling.groups[place].name for place in coupling.refused} == {"blocks.0.v.weight"}
    assert "breaks the model" in next(iter(coupling.refused.values()))
    assert coupling.fixed["blocks.0.fc2.weight", 0] == "the operator layer_norm runs over it"


def _bert(transformers: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    )


def _distilbert(transformers: Any) -> nn.Module:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    )


def _llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def _vit(transformers: Any) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


# what is left of the first layer's attention: the weight of a query (or of all three), and of a first linear layer
TRANSFORMERS: dict[str, tuple[Callable[[Any], nn.Module], dict[str, tuple[int, ...]]]] = {
    "bert": (
        _bert,
        {
            "bert.encoder.layer.0.attention.self.query.weight": (16, 32),
            "bert.encoder.layer.0.intermediate.dense.weight": (32, 32),
        },
    ),
    "distilbert": (
        _distilbert,
        {
            "distilbert.transformer.layer.0.attention.q_lin.weight": (16, 32),
            "distilbert.transformer.layer.0.ffn.lin1.weight": (32, 32),
        },
    ),
    "llama": (
        _llama,
        {
            "model.layers.0.self_attn.q_proj.weight": (16, 32),
            "model.layers.0.self_attn.k_proj.weight": (8, 32),
            "model.layers.0.self_attn.o_proj.weight": (32, 16),
            "model.layers.0.mlp.down_proj.weight": (32, 32),
        },
    ),
    "gpt2": (_gpt2, {"transformer.h.0.attn.c_attn.weight": (32, 48), "transformer.h.0.mlp.c_fc.weight": (32, 64)}),
    "vit": (_vit, {"vit.layers.0.attention.q_proj.weight": (16, 32)}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_loses_whole_heads_and_neurons(name: str):
    transformers = pytest.importorskip("transformers")
    factory, expected = TRANSFORMERS[name]
    model = factory(transformers).eval()
    example = {"input_ids": torch.randint(0, 50, (2, 10)), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    if name == "vit":
        example = {"pixel_values": torch.randn(2, 3, 32, 32)}
    coupling, smaller = halved(model, example)
    assert coupling.refused == {}
    shapes = {key: tuple(tensor.shape) for key, tensor in smaller.named_parameters()}
    assert {key: shapes.get(key) for key in expected} == expected
