"""The losses of distillation against the formulas of their papers, written out input by input in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tasks import one_thread  # noqa: F401

from featherweight.core.fit import soft_cross_entropy
from featherweight.methods.distill.hidden import (
    attention_transfer,
    contrastive,
    cosine_distance,
    hint,
    pooled,
    positions,
    relational,
    resized,
)
from featherweight.methods.distill.losses import by_correlation, decoupled

seeds, temperatures = st.integers(0, 10**6), st.floats(1, 8)
close = {"rel": 1e-4, "abs": 1e-5}
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=generator) for shape in shapes]


def softmax(row: np.ndarray) -> np.ndarray:
    grown = np.exp(row - row.max())
    return grown / grown.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Of q from p."""
    return float(sum(a * math.log(a / b) for a, b in zip(p, q)))


# -- scores ----------------------------------------------------------------------------------------------------------
@given(seeds, temperatures, st.floats(0, 4), st.floats(0, 8))
@few
def test_decoupled_is_that_of_its_paper(seed, temperature, alpha, beta):
    student, teacher = drawn(seed, (6, 5), (6, 5))
    target = torch.arange(6) % 5
    total = 0.0
    for s, t, c in zip(student.double().numpy(), teacher.double().numpy(), target.tolist()):
        p, q = softmax(t / temperature), softmax(s / temperature)
        of_target = divergence(np.array([p[c], 1 - p[c]]), np.array([q[c], 1 - q[c]]))
        among = divergence(np.delete(p, c) / (1 - p[c]), np.delete(q, c) / (1 - q[c]))
        total += (alpha * of_target + beta * among) * temperature**2 / 6
    assert float(decoupled(student, teacher, target, temperature, alpha, beta)) == pytest.approx(total, **close)


@given(seeds, temperatures)
@few
def test_hintons_divergence_is_the_decoupled_one_weighted_by_the_teachers_doubt(seed, temperature):
    """Equation 7: KD = TCKD + (1 - p_t) NCKD, for each input."""
    student, teacher = drawn(seed, (1, 7), (1, 7))
    doubt = 1 - float(torch.softmax(teacher.double() / temperature, -1)[0, 2])
    found = decoupled(student, teacher, torch.tensor([2]), temperature, 1.0, doubt)
    assert float(found) == pytest.approx(float(soft_cross_entropy(student, teacher, temperature)), **close)


def test_decoupled_stays_finite_where_a_probability_is_nought():
    student, teacher = torch.tensor([[200.0, -200.0, 0.0]]).requires_grad_(), torch.tensor([[300.0, 0.0, -300.0]])
    loss = decoupled(student, teacher, torch.tensor([0]), 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@given(seeds, temperatures, st.floats(0, 3), st.floats(0, 3))
@few
def test_by_correlation_is_that_of_its_paper(seed, temperature, inter, intra):
    student, teacher = drawn(seed, (6, 4), (6, 4))
    q, p = (np.array([softmax(row) for row in each.double().numpy() / temperature]) for each in (student, teacher))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T)])
    wanted = (inter * rows + intra * columns) * temperature**2
    assert float(by_correlation(student, teacher, temperature, inter, intra)) == pytest.approx(
        wanted, rel=1e-3, abs=1e-4
    )


# -- features --------------------------------------------------------------------------------------------------------
@given(seeds)
@few
def test_a_hint_is_the_share_of_the_teachers_variance_that_is_missed(seed):
    student, teacher = drawn(seed, (9, 4), (9, 4))
    wanted = ((student - teacher).double() ** 2).mean() / teacher.double().var(correction=0)
    assert float(hint(student, teacher)) == pytest.approx(float(wanted), **close)


@given(seeds)
@few
def test_attention_transfer_is_that_of_its_paper(seed):
    student, teacher = drawn(seed, (3, 4, 5, 5), (3, 7, 5, 5))
    total = 0.0
    for s, t in zip(student.double().numpy(), teacher.double().numpy()):
        maps = [(each**2).mean(0).ravel() for each in (s, t)]
        one, other = (each / np.linalg.norm(each) for each in maps)
        total += ((one - other) ** 2).sum() / 3
    assert float(attention_transfer(student, teacher)) == pytest.approx(total, **close)
    tokens = student.flatten(2).transpose(1, 2), teacher.flatten(2).transpose(1, 2)
    assert float(attention_transfer(*tokens)) == pytest.approx(total, **close)


def test_attention_of_a_larger_picture_is_averaged_down():
    (small,) = drawn(0, (2, 3, 4, 4))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(attention_transfer(small, large)) == pytest.approx(0, abs=1e-6)
    assert [tuple(each.shape) for each in resized(small, large)] == [(2, 3, 4, 4)] * 2


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


@given(seeds, st.floats(0, 3), st.floats(0, 3))
@few
def test_relations_are_those_of_their_paper(seed, distance, angle):
    student, teacher = drawn(seed, (5, 3), (5, 6))
    sides = [each.double().numpy() for each in (student, teacher)]
    lengths, cosines = [], []
    for x in sides:
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        lengths.append(d / d[d > 0].mean())
        c = np.zeros((5, 5, 5))
        for j in range(5):
            for i in range(5):
                for k in range(5):
                    if i != j and k != j:
                        one, other = x[i] - x[j], x[k] - x[j]
                        c[j, i, k] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        cosines.append(c)
    far = np.mean([huber(x) for x in (lengths[0] - lengths[1]).ravel()])
    turned = np.mean([huber(x) for x in (cosines[0] - cosines[1]).ravel()])
    found = relational(student, teacher, distance, angle)
    assert float(found) == pytest.approx(distance * far + angle * turned, rel=1e-3, abs=1e-4)


def test_relations_know_no_turning_and_no_scale():
    (student,) = drawn(1, (6, 4))
    turn = torch.linalg.qr(drawn(2, (4, 4))[0])[0]
    assert float(relational(student, 7 * student @ turn + 3)) == pytest.approx(0, abs=1e-5)


def test_relations_of_equal_inputs_have_a_gradient():
    student = torch.ones(4, 3).requires_grad_()
    relational(student, drawn(3, (4, 3))[0]).backward()
    assert torch.isfinite(student.grad).all()


@given(seeds, st.floats(0.05, 2), st.booleans())
@few
def test_the_contrast_is_that_of_its_paper(seed, temperature, classed):
    one, other = (torch.nn.functional.normalize(each, dim=1) for each in drawn(seed, (6, 4), (6, 4)))
    classes = [0, 0, 1, 2, 2, 2] if classed else list(range(6))
    r = np.exp(one.double().numpy() @ other.double().numpy().T / temperature)
    r /= r.mean()
    total = 0.0
    for i in range(6):
        negatives = [j for j in range(6) if classes[j] != classes[i]]
        m = max(1, len(negatives))
        total -= (math.log(r[i, i] / (r[i, i] + m)) + sum(math.log(1 - r[i, j] / (r[i, j] + m)) for j in negatives)) / 6
    found = contrastive(one, other, temperature, torch.tensor(classes) if classed else None)
    assert float(found) == pytest.approx(total, rel=1e-3, abs=1e-4)


def test_the_contrast_falls_as_embeddings_meet():
    (teacher,) = drawn(4, (16, 8))
    teacher = torch.nn.functional.normalize(teacher, dim=1)
    student = drawn(5, (16, 8))[0].requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        loss = contrastive(torch.nn.functional.normalize(student, dim=1), teacher, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nearest = (torch.nn.functional.normalize(student, dim=1) @ teacher.T).argmax(1)
    assert (nearest == torch.arange(16)).all()
    with pytest.raises(ValueError, match="two inputs"):
        contrastive(teacher[:1], teacher[:1])


@given(seeds)
@few
def test_the_cosine_is_one_minus_the_mean_cosine(seed):
    student, teacher = drawn(seed, (8, 5), (8, 5))
    pairs = zip(student.double().numpy(), teacher.double().numpy())
    wanted = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    assert float(cosine_distance(student, teacher)) == pytest.approx(wanted, **close)


# -- form ------------------------------------------------------------------------------------------------------------
def test_padding_does_not_count():
    (hidden,) = drawn(6, (2, 4, 3))
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert torch.allclose(pooled(hidden, real), torch.stack([hidden[0, :3].mean(0), hidden[1, 0]]))
    assert torch.equal(positions(hidden, real), torch.cat([hidden[0, :3], hidden[1, :1]]))


def test_an_image_is_one_vector_for_each_pixel():
    (image,) = drawn(7, (2, 3, 4, 5))
    assert positions(image).shape == (40, 3) and torch.equal(positions(image)[7], image[0, :, 1, 2])
    assert torch.allclose(pooled(image), image.mean((2, 3)), atol=1e-6)
