"""Sampling against a reference that is written from the definitions, and against frequencies."""

import numpy as np
import pytest
import torch

from model.inference.sampling import check_sampling, probabilities, sample


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row, in plain steps: rank the bytes, keep k of them, then keep the shortest run with enough mass."""
    with np.errstate(divide="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    ranked = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    ranked = ranked[:top_k]
    if top_p is not None and top_p < 1:
        total, mass, kept = sum(weights[i] for i in ranked), 0.0, []
        for i in ranked:
            kept.append(i)
            mass += weights[i] / total
            if mass >= top_p - 1e-7:
                break
        ranked = kept
    result = np.zeros(len(logits))
    result[ranked] = weights[ranked] / weights[ranked].sum()
    return result


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 7.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 40, 256])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_probabilities_equal_the_reference(temperature, top_k, top_p):
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, ::2] = -torch.inf
    logits[2] = logits[2].round()  # many ties
    found = probabilities(logits, temperature, top_k, top_p)
    for row, values in zip(found, logits.numpy()):
        np.testing.assert_allclose(row.numpy(), reference(values, temperature, top_k, top_p), atol=1e-12)


def test_ties_leave_exactly_k_and_the_lower_bytes_win():
    logits = torch.zeros(1, 256)
    assert probabilities(logits, 1.0, 3)[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    logits[0, 200] = 1
    assert probabilities(logits, 1.0, 3)[0].nonzero()[:, 0].tolist() == [0, 1, 200]


def test_top_p_is_the_smallest_set_that_reaches_the_mass():
    logits = torch.full((1, 256), -torch.inf)
    logits[0, :4] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, size in ((1e-12, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.9, 4), (1.0, 4)):
        assert probabilities(logits, 1.0, None, top_p).count_nonzero() == size
    tenths = torch.full((1, 256), -torch.inf)
    tenths[0, :10] = 0.0
    for n in range(1, 11):
        assert probabilities(tenths, 1.0, None, n / 10).count_nonzero() == n


def test_top_p_is_a_share_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.2] + [0.0] * 252]).log()
    assert probabilities(logits, 1.0, 2, 0.6).count_nonzero() == 1  # 0.4 of 0.6 is 2/3


def test_temperature_zero_is_greedy_and_tiny_or_huge_ones_are_safe():
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * 20
    greedy = logits.argmax(-1)
    assert torch.equal(sample(logits, 0), greedy) and torch.equal(probabilities(logits, 0).argmax(-1), greedy)
    for temperature in (5e-324, 1e-300, 1e-6):
        assert torch.equal(sample(logits, temperature), greedy)
    flat = probabilities(logits, 1e300)
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 256))


@pytest.mark.parametrize("arguments", [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (0.9, 6, 0.9)])
def test_frequencies_follow_the_probabilities(arguments):
    """χ² over 10,000 draws; a masked or cut byte is never drawn."""
    logits = torch.full((256,), -torch.inf)
    logits[10:22] = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1.5
    expected = probabilities(logits.unsqueeze(0), *arguments)[0].numpy()
    n = 10_000
    drawn = sample(logits.expand(n, -1), *arguments, generator=torch.Generator().manual_seed(3))
    counts = np.bincount(drawn.numpy(), minlength=256)
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    statistic = ((counts[used] - n * expected[used]) ** 2 / (n * expected[used])).sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4  # far beyond the 99.9% point for 1 to 11 degrees


def test_the_generator_decides():
    logits = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    draws = [sample(logits, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    same = sample(logits[:1].expand(64, -1), 1.0, generator=torch.Generator().manual_seed(5))
    assert len(set(same.tolist())) > 20  # rows draw for themselves


def test_the_input_stays_as_it_is_and_half_precision_works():
    logits = torch.randn(2, 256)
    before = logits.clone()
    sample(logits, 0.5, 5, 0.5)
    assert torch.equal(logits, before)
    assert sample(logits.bfloat16(), 0.5, 5, 0.5).shape == (2,)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("temperature", (t, None, None)) for t in (-1, float("nan"), float("inf"), "1", None, True)]
    + [("top_k", (1.0, k, None)) for k in (0, -1, 257, 1.5, True, "3")]
    + [("top_p", (1.0, None, p)) for p in (0, -0.1, 1.01, float("nan"), "0.5", True)],
)
def test_bad_arguments_are_named(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}=.*: accepted is"):
        check_sampling(*arguments)
    with pytest.raises(ValueError, match=rf"^{name}=.*: accepted is"):
        sample(torch.zeros(1, 256), *arguments)
