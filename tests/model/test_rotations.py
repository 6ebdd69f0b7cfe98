"""Which bases a graph leaves free: rule by rule, each checked by rotating."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.core.outputs import relative_difference
from featherweight.methods.quantize.hadamard import random_rotation
from featherweight.methods.quantize.rotate import rotated
from featherweight.model.groups import tensors
from featherweight.model.rotations import free_bases


class Between(nn.Module):
    """Two linear layers, 5 to 12 and 12 to 3, with `middle` between them; an extra parameter for it to use."""

    def __init__(self, middle, extra: tuple[int, ...] = (12,)) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 12), nn.Linear(12, 3)
        self.extra, self.middle = nn.Parameter(torch.rand(extra) + 0.5), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.middle(x=self.one(x), extra=self.extra))


def functions():
    f = nn.functional
    return {
        "nothing": (lambda x, extra: x, 12, False),
        "a factor": (lambda x, extra: -x * 0.3 / 2, 12, False),
        "a factor per position": (lambda x, extra: x * torch.sigmoid(x.square().sum(-1, keepdim=True)), 12, False),
        "a sum with a parameter": (lambda x, extra: x + extra, 12, False),
        "a number is added": (lambda x, extra: x + 1.5, 12, True),
        "a mean is taken off": (lambda x, extra: x - x.mean(-1, keepdim=True), 12, True),
        "a mean over positions": (lambda x, extra: x - x.mean(1, keepdim=True), 12, False),
        "a root mean square": (lambda x, extra: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), 12, False),
        "a square by itself": (lambda x, extra: x / (x * x).sum(-1, keepdim=True), 12, False),
        "a length": (lambda x, extra: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), 12, False),
        "rms_norm": (lambda x, extra: f.rms_norm(x, (12,)), 12, False),
        "layer_norm with a gain that moves": (lambda x, extra: f.layer_norm(x, (12,), extra), 12, True),
        "a gain that moves": (lambda x, extra: extra * x, 12, False),
        "heads": (lambda x, extra: x.view(*x.shape[:2], 3, 4).transpose(1, 2).transpose(1, 2).flatten(2), 4, False),
        "halves": (lambda x, extra: torch.cat([x[..., 6:], x[..., :6]], -1), 6, False),
        "uneven parts": (lambda x, extra: torch.cat(x.split([8, 4], -1), -1), 4, False),
        "repeated heads": (
            lambda x, extra: x.view(2, 7, 3, 1, 4).expand(2, 7, 3, 2, 4)[:, :, :, 1].reshape(2, 7, 12), 4, False,
        ),
        "itself, in products": (lambda x, extra: (x @ x.mT) @ x, 12, False),
        "one position": (lambda x, extra: x[:, 2:3].expand(2, 7, 12), 12, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(functions()))
def test_what_is_free_turns_in_blocks_and_nothing_changes(name):
    middle, block, ones = functions()[name]
    torch.manual_seed(0)
    model, inputs = Between(middle).double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    free = free_bases(model, {"x": inputs})
    found = [basis for basis in free.bases if ("one.weight", 0) in basis.places]
    assert [(basis.block, basis.ones) for basis in found] == [(block, ones)], free.fixed
    assert {("one.weight", 0), ("one.bias", 0), ("two.weight", 1)} <= set(found[0].places)
    rotation = random_rotation(block, torch.Generator().manual_seed(1), ones)
    values = rotated(tensors(model), {found[0]: rotation})
    assert not torch.allclose(values["one.weight"], model.one.weight)
    with torch.no_grad():
        assert relative_difference(model(inputs), functional_call(model, values, (inputs,))) < 1e-12


FIXED = {
    "relu": (lambda x, extra: torch.relu(x), "relu looks at its single entries"),
    "a gain before relu": (lambda x, extra: torch.relu(extra * x), "relu looks at its single entries"),
    "a gain used twice": (lambda x, extra: extra * (extra * x), "the gain extra is used more than once"),
    "a gain whose output is added": (lambda x, extra: extra * x + x, "its output goes into add as well"),
    "a product of two": (lambda x, extra: x * (x + 1), "mul multiplies entry by entry"),
    "a division": (lambda x, extra: 1 / (x + 9), "looks at its single entries"),
    "squares that are added": (lambda x, extra: x + x * x, "its squares are added to something"),
    "single entries": (lambda x, extra: torch.cat([x[..., 1:], x[..., :1]], -1), "it is cut into single entries"),
    "merged with positions": (lambda x, extra: x.mT.reshape(2, 7, 12), "a reshape merges it with others"),
    "no rule": (lambda x, extra: torch.cumsum(x, -1), "cumsum looks at its single entries"),
    "a constant": (lambda x, extra: x + torch.arange(12.0), "arange looks at its single entries"),
}


@pytest.mark.parametrize("name", list(FIXED))
def test_what_looks_at_single_entries_is_fixed_and_says_so(name):
    middle, reason = FIXED[name]
    free = free_bases(Between(middle).eval(), {"x": torch.randn(2, 7, 5)})
    assert reason in free.fixed["one.weight", 0] and ("two.weight", 1) in free.fixed
    assert not any(("one.weight", 0) in basis.places for basis in free.bases)


def test_convolutions_turn_their_channels_and_batch_norm_keeps_them():
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 3, 1)).eval()
    inputs = torch.randn(2, 2, 6, 6)
    free = free_bases(plain, {"input": inputs})
    assert [set(basis.places) for basis in free.bases] == [{("0.weight", 0), ("0.bias", 0), ("1.weight", 1)}]
    values = rotated(tensors(plain), {free.bases[0]: random_rotation(8, torch.Generator().manual_seed(1))})
    with torch.no_grad():
        assert relative_difference(plain(inputs), functional_call(plain, values, (inputs,))) < 1e-6
    normed = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)).eval()
    assert "batch_norm looks at" in free_bases(normed, {"input": inputs}).fixed["0.weight", 0]
    depthwise = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1, groups=8)).eval()
    assert "conv2d looks at" in free_bases(depthwise, {"input": inputs}).fixed["0.weight", 0]


def test_parameters_that_are_kept_fix_what_they_meet():
    model = Between(functions()["nothing"][0])
    free = free_bases(model, {"x": torch.randn(2, 7, 5)}, keep={"two.weight": "two is excluded"})
    assert not free.bases and free.fixed["one.weight", 0] == "two is excluded"


def test_fused_queries_keys_and_values_turn_together():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 40, norm_first=True, batch_first=True).double().eval()
    inputs = torch.randn(2, 5, 24, dtype=torch.float64)
    free = free_bases(layer, {"src": inputs})
    found = next(basis for basis in free.bases if ("self_attn.in_proj_weight", 0) in basis.places)
    assert found.block == 8 and ("self_attn.out_proj.weight", 1) in found.places
    values = rotated(tensors(layer), {found: random_rotation(8, torch.Generator().manual_seed(1))})
    with torch.no_grad():
        assert relative_difference(layer(inputs), functional_call(layer, values, (inputs,))) < 1e-12
