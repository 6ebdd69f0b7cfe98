"""Soft weights: what they are stored as, and folding that does not touch the original."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core.encoding import Affine, Encoding, Sparse, spread
from featherweight.core.soft import Link, Mask, chains, copied, encodings, fold


@pytest.fixture
def masked() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", Mask(torch.rand(3, 4) > 0.5))
    return model


def test_an_affine_weight_decodes_per_tensor_and_per_channel():
    values = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8)
    whole = Affine(values, torch.tensor(0.5), torch.tensor(2, dtype=torch.uint8))
    assert whole.decode().tolist() == [[-1.0, 0.0], [1.0, 2.0]] and whole.form == "uint8"
    columns = Affine(values.to(torch.int8), torch.tensor([1.0, 0.1]), torch.tensor([0, 6], dtype=torch.int8), 1, bits=4)
    assert torch.allclose(columns.decode(), torch.tensor([[0.0, -0.4], [4.0, 0.0]])) and columns.form == "int4"


def test_entries_spread_along_their_axis():
    entry, like = torch.arange(3.0), torch.zeros(2, 3, 4)
    assert spread(entry, like, 1).shape == (1, 3, 1) and spread(torch.tensor(1.0), like, None).dim() == 0


def test_an_encoding_must_say_what_it_is():
    for ask in (lambda: Encoding().form, Encoding().decode):
        with pytest.raises(NotImplementedError, match="Encoding must"):
            ask()


def test_a_mask_is_stored_sparse_and_decodes_to_what_it_computes(masked):
    ((name, module, attribute, links),) = chains(masked)
    assert (name, module, attribute, [type(link) for link in links]) == ("0.weight", masked[0], "weight", [Mask])
    (encoding,) = encodings(masked).values()
    assert isinstance(encoding, Sparse) and encoding.form == "sparse"
    assert torch.equal(encoding.decode(), masked[0].weight)


def test_a_link_that_names_no_form_after_one_that_does_makes_the_weight_plain(masked):
    class Double(Link):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(masked[0], "weight", Double())
    assert encodings(masked) == {}


def test_a_link_that_changes_nothing_keeps_the_form_of_the_one_before(masked):
    class Same(Link):
        def forward(self, weight):
            return weight.clone()

    before = encodings(masked)["0.weight"]
    parametrize.register_parametrization(masked[0], "weight", Same())
    after = encodings(masked)["0.weight"]
    assert isinstance(after, Sparse) and torch.equal(after.decode(), before.decode())


def test_fold_gives_plain_values_and_leaves_the_model_alone(masked):
    x = torch.randn(5, 4)
    before, types = masked(x), [type(module) for module in masked.modules()]
    for _ in range(2):
        plain = fold(masked)
        assert type(plain[0]) is nn.Linear and not parametrize.is_parametrized(plain[0])
        assert torch.equal(plain(x), before)
        assert sorted(plain.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert torch.equal(plain[0].weight, masked[0].weight) and plain[0].weight.requires_grad
    assert [type(module) for module in masked.modules()] == types and torch.equal(masked(x), before)
    masked(x).sum().backward()
    assert masked[0].parametrizations.weight.original.grad is not None


def test_fold_of_a_copy_does_not_break_what_it_was_copied_from(masked):
    x = torch.randn(5, 4)
    before, other = masked(x), copy.deepcopy(masked)
    with torch.no_grad():
        other[0].parametrizations.weight.original.mul_(2)
    fold(other)
    assert torch.equal(masked(x), before) and parametrize.is_parametrized(other[0])
    assert not torch.equal(other(x), before)


def test_a_chain_on_a_second_weight_of_a_copy_does_not_break_the_original(masked):
    x = torch.randn(5, 4)
    before, other = masked(x), copied(masked)
    parametrize.register_parametrization(other[0], "bias", Mask(torch.zeros(3)))
    assert torch.equal(masked(x), before) and type(other[0]) is not type(masked[0])
    assert type(fold(other)[0]) is nn.Linear and fold(other)[0].bias.tolist() == [0.0] * 3


def test_frozen_weights_stay_frozen_when_folded(masked):
    masked.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in fold(masked).parameters())


def test_links_are_found_by_their_kind():
    assert Link.kinds["mask"] is Mask
    made = Link.kinds["mask"](**Mask(torch.tensor([[True, False]])).settings())
    assert made.keep.shape == (1, 2) and made.keep.all()
