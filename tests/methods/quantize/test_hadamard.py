"""Random rotations: orthogonal at every size, flat, and they leave equal entries alone where they must."""

import pytest
import torch

from featherweight.methods.quantize.hadamard import peak, random_rotation, turned

SIZES = (1, 2, 3, 8, 12, 28, 43, 64, 172, 384)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ones", [False, True])
def test_it_is_orthogonal_and_random(size, ones):
    found = random_rotation(size, generator(), ones)
    assert found.dtype == torch.float64 and found.shape == (size, size)
    assert torch.allclose(found @ found.mT, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, random_rotation(size, generator(), ones))
    if size >= 8:
        assert not torch.equal(found, random_rotation(size, generator(1), ones))


@pytest.mark.parametrize("size", SIZES)
def test_with_ones_a_vector_of_equal_entries_stays(size):
    vector = torch.full((size,), 2.5, dtype=torch.float64)
    assert torch.allclose(random_rotation(size, generator(), ones=True) @ vector, vector, atol=1e-12)


def test_powers_of_two_are_hadamard_matrices_and_keeping_ones_costs_little():
    found = random_rotation(256, generator())
    assert torch.allclose(found.abs(), torch.full_like(found, 1 / 16), atol=1e-12)
    off = random_rotation(256, generator(), ones=True).abs() - 1 / 16
    assert float(off.abs().max()) < 0.08 and float(off.square().mean().sqrt()) < 0.01


def test_turning_is_a_product_with_the_blocks():
    weight, rotation = torch.randn(5, 12, 3, generator=generator()), random_rotation(4, generator())
    whole = torch.block_diag(rotation, rotation, rotation).float()
    want = torch.einsum("ij,ajb->aib", whole, weight)
    assert torch.allclose(turned(weight, 1, rotation), want, atol=1e-6)
    assert torch.allclose(turned(turned(weight, 1, rotation), 1, rotation.mT), weight, atol=1e-6)


@pytest.mark.parametrize("size", [64, 96])
def test_outliers_are_spread(size):
    weight = torch.randn(48, size, generator=generator())
    weight[:, 7] *= 40
    before, after = peak(weight), peak(turned(weight, 1, random_rotation(size, generator())))
    assert before > 15 and after < before / 3


def test_peak_is_the_largest_entry_over_the_root_mean_square():
    assert peak(torch.tensor([3.0, -4.0, 0.0, 0.0])) == pytest.approx(1.6)
    assert peak(torch.zeros(4)) == 0
