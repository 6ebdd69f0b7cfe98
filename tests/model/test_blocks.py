"""Blocks of a row: which can be taken out, and that taking out is the same as silencing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.model.blocks import disagreement, find_blocks, outputs_of, remove_blocks, silenced


class Residual(nn.Module):
    """x + two layers of x where the widths agree, else two layers of x."""

    def __init__(self, width: int = 6, out: int | None = None):
        super().__init__()
        self.a, self.b = nn.Linear(width, 9), nn.Linear(9, out or width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return x + y if x.shape == y.shape else y


class Numbered(nn.Module):
    """Blocks that are used by number: what comes after the loop needs as many as there were."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for place in range(3):
            x = self.blocks[place](x)
        return x


class Twice(nn.Module):
    """A row that is gone through twice, and one that hands two tensors on."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(Residual(), Residual())
        self.pairs = nn.ModuleList(Pair() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x = self.row(self.row(x))
        for pair in self.pairs:
            x, y = pair(x=x, y=y)
        return x + y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.inner(x), y


def rows() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        Residual(), Residual(), nn.Sequential(Residual(), Residual(6, 8), Residual(8)), nn.Sequential(nn.Linear(8, 3))
    ).eval()


X = {"input": torch.linspace(-1, 1, 12).reshape(2, 6)}


def test_rows_within_rows_are_opened_and_what_changes_its_form_is_named():
    found = find_blocks(rows(), X)
    assert found.blocks == ["0", "1", "2.0", "2.2"]
    assert found.left == {"2.1": "it turns (6,) into (8,)", "3": "it turns (8,) into (3,)"}


def test_silenced_equals_removed_and_the_model_is_as_before():
    model = rows()
    before = model(X["input"])
    with silenced(model, ["1", "2.2"]):
        silent = model(X["input"])
    smaller = remove_blocks(copy.deepcopy(model), ["1", "2.2"])
    assert torch.equal(silent, smaller(X["input"]))
    assert not torch.allclose(silent, before)
    assert torch.equal(model(X["input"]), before)
    assert [len(smaller), len(smaller[1])] == [3, 2]


def test_known_outputs_are_given_again_and_not_computed():
    model, computed = rows(), []
    with outputs_of(model, ["0", "1", "2.0"]) as known:
        model(X["input"])
    assert list(known) == ["0", "1", "2.0"]
    with silenced(model, ["2.0"]):
        want = model(X["input"])
    for name in ("0", "1", "2.0"):
        model.get_submodule(name).a.register_forward_hook(lambda *_: computed.append(1))
    with silenced(model, ["2.0"], known):
        assert torch.equal(model(X["input"]), want)
    assert not computed


class InPlace(Residual):
    """Adds to its input itself: what was handed in is changed afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.b(torch.relu(self.a(x)))
        return x


def test_blocks_that_work_in_place_are_silenced_and_known_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(InPlace(), InPlace(), InPlace()), nn.Linear(6, 3)).eval()
    names = ["1.0", "1.1", "1.2"]
    assert find_blocks(model, X).blocks == names
    with torch.no_grad():
        with outputs_of(model, names) as known:
            model(X["input"])
        for place, name in enumerate(names):
            want = remove_blocks(copy.deepcopy(model), [name])(X["input"])
            for given in ({}, {each: known[each] for each in names[: place + 1]}):
                with silenced(model, [name], given):
                    assert torch.equal(model(X["input"]), want), name


def test_blocks_with_names_keep_them():
    model = nn.Sequential(
        OrderedDict(stem=nn.Linear(6, 6), one=Residual(), two=Residual(), head=nn.Linear(6, 3))
    ).eval()
    found = find_blocks(model, X)
    assert found.blocks == ["one", "two"]
    remove_blocks(model, ["one"])
    assert list(model.state_dict()) == [
        f"{name}.{kind}" for name in ("stem", "two.a", "two.b", "head") for kind in ("weight", "bias")
    ]


def test_a_row_used_by_number_is_named():
    found = find_blocks(Numbered().eval(), {"x": X["input"]})
    assert found.blocks == []
    assert set(found.left) == {"blocks.0", "blocks.1", "blocks.2"}
    assert all(reason.startswith("its removal breaks the model") for reason in found.left.values())


def test_a_row_used_twice_is_named_and_pairs_are_handed_on():
    found = find_blocks(Twice().eval(), {"x": X["input"]})
    assert found.blocks == ["pairs.0", "pairs.1"]
    assert found.left == dict.fromkeys(("row.0", "row.1"), "it runs 2 times in one pass")


def test_a_disagreement_is_found():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(), Residual()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x * len(self.blocks)

    assert "differ by" in disagreement(Last().eval(), ["blocks.0"], {"x": X["input"]})


TRANSFORMERS = {
    "Bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1},
    "Llama": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "use_cache": False,
    },
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_transformers_can_be_taken_out(name: str):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **TRANSFORMERS[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    example = {"input_ids": torch.randint(0, 50, (2, 7))}
    found = find_blocks(model, example)
    assert len(found.blocks) == 3
    assert disagreement(model, [found.blocks[0], found.blocks[2]], example) == ""


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_cache_of_keys_and_values_holds_what_the_layers_that_are_left_say(kind: str):
    """Without the first layer, whose entry says how long the text is, and with fewer layers than entries."""
    transformers = pytest.importorskip("transformers")
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **{**TRANSFORMERS[kind], **tokens})
    model: Any = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # far from uniform, so that the likeliest word is sure
        parameter.data *= 3 if parameter.dim() > 1 else 1
    ids = torch.randint(3, 50, (1, 6))
    names = find_blocks(model, {"input_ids": ids}).blocks
    remove_blocks(model, names[:1])
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    cached, plain = (model.generate(ids, use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, plain)


def test_layers_keep_their_kind_of_mask():
    transformers = pytest.importorskip("transformers")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    settings = {**TRANSFORMERS["Llama"], "sliding_window": 3, "use_sliding_window": True, "layer_types": kinds}
    torch.manual_seed(0)
    model: Any = transformers.Qwen2Model(transformers.Qwen2Config(vocab_size=50, **settings)).eval()
    example = {"input_ids": torch.randint(0, 50, (2, 9))}
    assert find_blocks(model, example).blocks == ["layers.0", "layers.1", "layers.2"]
    remove_blocks(model, ["layers.0"])
    assert (model.config.layer_types, model.config.num_hidden_layers) == (kinds[1:], 2)
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1]
