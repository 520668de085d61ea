"""Residual vector quantisation: choices by brute force, training steps against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sateen.errors import ShapeError
from sateen.models.mimo_audio.quantizer import Codebook, ResidualQuantizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(sizes=(16, 8, 4), width=6, seed=0) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(sizes, width)
    for book in quantizer.codebooks:
        book.embed.normal_(generator=generator(seed + len(book.embed)))
        book.embed_avg.copy_(book.embed)
        book.cluster_size.fill_(1)
        book.inited.fill_(1)
    return quantizer


def brute_force(quantizer: ResidualQuantizer, x: np.ndarray) -> np.ndarray:
    residual, codes = x.astype(np.float64), []
    for book in quantizer.codebooks:
        entries = book.embed.double().numpy()
        row = [min(range(len(entries)), key=lambda c: ((v - entries[c]) ** 2).sum()) for v in residual]
        codes.append(row)
        residual = residual - entries[row]
    return np.array(codes)


def test_codes_are_the_nearest_entries_of_what_is_left():
    quantizer, x = filled(), torch.randn(50, 6, generator=generator(3)) * 2
    codes = brute_force(quantizer, x.numpy())
    assert np.array_equal(quantizer.encode(x).numpy(), codes)
    assert np.array_equal(quantizer.encode(x, 2).numpy(), codes[:2])
    assert np.array_equal(quantizer(x.view(5, 10, 6)).codes_BRL.transpose(0, 1).reshape(3, 50), codes)


def test_of_equally_near_entries_the_first_is_chosen():
    book = Codebook(5, 2)
    book.embed.copy_(torch.tensor([[9.0, 0], [1, 0], [-1, 0], [1, 0], [0, 1]]))
    assert book.nearest(torch.tensor([[0.0, 0], [1, 0], [0.5, 0.5]])).tolist() == [1, 1, 1]


def test_any_number_of_leading_stages_decodes_to_their_sum():
    quantizer = filled()
    codes = torch.tensor([[3, 15], [7, 0], [0, 2]])
    books = [book.embed for book in quantizer.codebooks]
    assert torch.equal(quantizer.decode(codes[:1]), books[0][[3, 15]])
    assert torch.allclose(quantizer.decode(codes[:2]), books[0][[3, 15]] + books[1][[7, 0]])
    assert torch.allclose(quantizer.decode(codes), books[0][[3, 15]] + books[1][[7, 0]] + books[2][[0, 2]])
    assert quantizer.decode(codes.short()[:, :0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4, 2), r"\(4, 2\); accepted: \[1 to 3 stages, tokens\]"),
        (torch.zeros(0, 2), r"\(0, 2\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.tensor([[0, 16]]), "stage 0: codes from 0 to 16; accepted: 0 to 15"),
        (torch.tensor([[0], [-1]]), "stage 1: codes from -1 to -1; accepted: 0 to 7"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, message):
    with pytest.raises(ShapeError, match=message):
        filled().decode(codes)


@pytest.mark.parametrize("count", [0, 4])
def test_a_number_of_stages_that_is_not_there_is_refused(count):
    with pytest.raises(ShapeError, match=f"num_quantizers {count} .accepted: 1 to 3"):
        filled().encode(torch.zeros(1, 6), count)


def test_gradients_pass_straight_through_and_each_stage_commits():
    quantizer = filled()
    x = torch.randn(2, 7, 6, generator=generator(5), requires_grad=True)
    found = quantizer(x)
    upstream = torch.randn(2, 7, 6, generator=generator(6))
    assert torch.equal(
        torch.autograd.grad((found.vectors_BLD * upstream).sum(), x, retain_graph=True)[0], upstream
    )
    flat = x.detach().double().numpy().reshape(14, 6)
    codes = brute_force(quantizer, flat)
    total, losses, gradient = np.zeros((14, 6)), [], np.zeros((14, 6))
    for book, row in zip(quantizer.codebooks, codes, strict=True):
        left_over = flat - total - book.embed.double().numpy()[row]
        losses.append((left_over**2).mean())
        gradient += 2 * left_over / left_over.size / 3
        total += book.embed.double().numpy()[row]
    assert found.commitment.item() == pytest.approx(np.mean(losses), rel=1e-5)
    ours = torch.autograd.grad(found.commitment, x)[0].numpy().reshape(14, 6)
    assert np.abs(ours - gradient).max() < 1e-6
    assert np.abs(found.vectors_BLD.detach().numpy().reshape(14, 6) - total).max() < 1e-5


def test_one_step_of_the_averages_by_hand():
    # Entries 0 and 10 on a line. Vectors 1, 2 and 3 choose the first, 9 the second.
    book = Codebook(2, 1)
    book.embed.copy_(torch.tensor([[0.0], [10.0]]))
    book.cluster_size.copy_(torch.tensor([2.0, 4.0]))
    book.embed_avg.copy_(torch.tensor([[0.0], [40.0]]))
    assert book.update(torch.tensor([[1.0], [2], [3], [9]]), 2.0, generator()) == 0
    sizes = [0.99 * 2 + 0.01 * 3, 0.99 * 4 + 0.01 * 1]
    sums = [0.01 * 6, 0.99 * 40 + 0.01 * 9]
    assert book.cluster_size.tolist() == pytest.approx(sizes)
    assert book.embed_avg[:, 0].tolist() == pytest.approx(sums)
    total = sum(sizes)
    smoothed = [(n + 1e-5) / (total + 2e-5) * total for n in sizes]
    assert book.embed[:, 0].tolist() == pytest.approx([s / n for s, n in zip(sums, smoothed, strict=True)])


def test_dead_entries_are_replaced_by_vectors_of_the_batch_and_stay():
    book = Codebook(4, 3)
    book.embed.normal_(generator=generator(1))
    book.embed[3] = 100  # no vector is near
    book.cluster_size.copy_(torch.tensor([5.0, 5, 5, 0.01]))
    book.embed_avg.copy_(book.embed * book.cluster_size[:, None])
    x = torch.randn(40, 3, generator=generator(2))
    assert book.update(x, 2.0, generator(3)) == 1
    # The new entry was chosen by nobody yet: 99 % of a vector that counts as 10 uses, the mean.
    assert book.cluster_size[3].item() == pytest.approx(9.9)
    assert (x - book.embed[3]).abs().amax(1).min() < 1e-4
    assert book.update(x, 2.0, generator(3)) == 0
    assert book.embed[3].abs().max() < 10


def test_dead_is_below_the_threshold_or_a_tenth_of_the_mean_use_whichever_is_less():
    sizes = torch.tensor([3.0, 1.0, 0.3, 0.2])
    for num_vectors, threshold, dead in ((400, 2.0, 3), (400, 0.25, 1), (10, 2.0, 1), (4, 2.0, 0)):
        book = Codebook(4, 2)
        book.embed.normal_(generator=generator(1))
        book.cluster_size.copy_(sizes)
        assert (
            book.update(torch.randn(num_vectors, 2, generator=generator(2)), threshold, generator()) == dead
        )


def test_the_first_update_is_a_k_means_that_finds_clusters():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    offsets = torch.randn(4, 50, 2, generator=generator(0)) * 0.1
    x = (centres[:, None] + offsets).flatten(0, 1)
    best = []
    for seed in range(8):  # k-means from random vectors may stop in a worse place; the best start must not
        quantizer = ResidualQuantizer([4, 2], 2)
        assert not quantizer.is_initialized
        assert quantizer.update(x, 2.0, generator(seed)) == [0, 0]
        assert quantizer.is_initialized
        book = quantizer.codebooks[0]
        assert book.cluster_size.sum() == 200
        # At the end each entry is the mean of the vectors that choose it.
        codes = book.nearest(x)
        for c in range(4):
            if (codes == c).any():
                assert torch.allclose(book.embed[c], x[codes == c].mean(0), atol=1e-4)
        best.append((x - book.embed[codes]).square().mean().item())
    means = (centres + offsets.mean(1))[:, None] - x.view(4, 50, 2)
    assert min(best) == pytest.approx(means.square().mean().item(), rel=1e-4)


def test_fewer_vectors_than_entries_still_set_a_codebook():
    quantizer = ResidualQuantizer([8, 4], 2)
    x = torch.tensor([[1.0, 2], [3, 4]])
    quantizer.update(x, 2.0, generator())
    assert {tuple(row) for row in quantizer.codebooks[0].embed.tolist()} <= {
        (1.0, 2.0),
        (3.0, 4.0),
        (2.0, 3.0),
    }
    assert quantizer.codebooks[0].embed.isfinite().all()


def test_training_is_repeatable_and_lowers_the_distance():
    x = torch.randn(600, 6, generator=generator(9))
    x[:, 0] *= 5

    def trained(seed):
        quantizer, draws = ResidualQuantizer([16, 8, 8], 6), generator(seed)
        distances = []
        for _ in range(30):
            quantizer.update(x, 2.0, draws)
            distances.append((quantizer.decode(quantizer.encode(x)) - x).square().mean().item())
        return quantizer, distances

    (first, distances), (second, _), (other, _) = trained(1), trained(1), trained(2)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.buffers(), other.buffers(), strict=True))
    partial = [(first.decode(first.encode(x, r)) - x).square().mean().item() for r in (1, 2, 3)]
    assert partial[2] < partial[1] < partial[0] < x.square().mean().item()
    assert distances[-1] < distances[0] * 1.05


def test_every_stage_moves_by_the_residuals_of_the_entries_that_coded_the_batch():
    quantizer, x = filled(), torch.randn(80, 6, generator=generator(4))
    before = [book.embed.clone() for book in quantizer.codebooks]
    sums = [book.embed_avg.clone() for book in quantizer.codebooks]
    codes = quantizer.encode(x)
    quantizer.update(x, 0.0, generator())
    residual = x.clone()
    for book, old, total, row in zip(quantizer.codebooks, before, sums, codes, strict=True):
        expected = 0.99 * total
        for c in range(len(old)):
            expected[c] += 0.01 * residual[row == c].sum(0)
        assert torch.allclose(book.embed_avg, expected, atol=1e-5)
        residual = residual - old[row]
