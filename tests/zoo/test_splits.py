"""Orders and augmentation: what they promise, on random input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.zoo.splits import apart, balanced_order, random_order, shifted, unit_range


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 5))
def test_every_prefix_of_a_balanced_order_holds_the_classes_in_their_shares(labels, seed):
    labels = torch.tensor(labels)
    order = balanced_order(labels, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    for label in labels.unique():
        share = (labels == label).double().mean()
        places = torch.arange(1, len(labels) + 1)
        assert ((labels[order] == label).cumsum(0) - share * places).abs().max() <= 2.5


def test_orders_depend_on_the_seed_alone():
    labels = torch.arange(300) % 10
    torch.manual_seed(1)
    one = balanced_order(labels, 3), random_order(300, 3)
    torch.manual_seed(2)
    again, other = (balanced_order(labels, 3), random_order(300, 3)), (balanced_order(labels, 4), random_order(300, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not any(torch.equal(a, b) for a, b in zip(one, other))


def test_shifted_is_a_crop_of_the_padded_image_or_of_its_mirror():
    images = torch.randint(1, 255, (60, 3, 6, 5), dtype=torch.uint8)
    moved = shifted(2, flip=True)(images, torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    mirrored = 0
    for before, after in zip(images, moved):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        crops = [padded[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
        straight = any(torch.equal(after, crop) for crop in crops)
        mirror = any(torch.equal(after.flip(2), crop) for crop in crops)
        assert straight or mirror
        mirrored += mirror
    assert 15 < mirrored < 45


def test_without_flip_nothing_is_mirrored_and_reach_zero_changes_nothing():
    images = torch.rand(20, 1, 8, 8)
    assert torch.equal(shifted(0)(images, torch.Generator().manual_seed(0)), images)


def test_unit_range_reaches_both_ends():
    assert unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]


def test_apart_leaves_out_what_is_in_another_part():
    assert apart(["a", "b", "c", "b", "d"], ["b"], ["d", "e"]) == [0, 2]
