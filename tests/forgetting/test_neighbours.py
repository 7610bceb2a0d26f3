from __future__ import annotations

import numpy as np
import pytest
import torch
from one_weight import orthonormal

from lora_lens.forgetting import neighbours
from lora_lens.forgetting.neighbours import neighbour_agreement, neighbour_table


def directions(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def features(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_row(x: torch.Tensor, row: int, value: float) -> torch.Tensor:
    x = x.clone()
    x[row] = value
    return x


# by hand: before, the nearest two are 0: 1 2, 1: 0 2, 2: 1 0, 3: 4 2, 4: 3 2
# after, 4 has gone to the other end: 0: 4 1, 1: 0 2, 2: 1 0, 3: 2 1, 4: 0 1
BEFORE = directions(0, 10, 25, 60, 75)
AFTER = directions(0, 10, 25, 60, -9)
TEXTS = ["a", "b", "c", "d", "e"]


def test_agreement_is_the_mean_share_of_neighbours_kept():
    assert neighbour_agreement(BEFORE, AFTER, k=1) == pytest.approx((0 + 1 + 1 + 0 + 0) / 5)
    assert neighbour_agreement(BEFORE, AFTER, k=2) == pytest.approx((1 + 2 + 2 + 1 + 0) / 10)
    assert neighbour_agreement(AFTER, BEFORE, k=2) == neighbour_agreement(BEFORE, AFTER, k=2)
    assert neighbour_agreement(BEFORE, AFTER, k=4) == 1  # all the others


def test_it_does_not_see_lengths_and_turns_but_a_shift():
    x = features(200, 20, 0)
    lengths = torch.logspace(-30, 30, 200)[:, None]  # whose squares float32 does not hold
    assert neighbour_agreement(x, lengths * x) == 1
    assert neighbour_agreement(x, x @ orthonormal(20, 20, 1).float()) > 0.99
    assert neighbour_agreement(x, -x) == 1
    assert neighbour_agreement(x, x + 3) < 0.95


@pytest.mark.parametrize(("n", "k"), [(1000, 10), (600, 60)])
def test_by_chance_it_is_the_neighbours_share_of_the_others(n, k):
    unrelated = [neighbour_agreement(features(n, 30, s), features(n, 50, s + 10), k) for s in range(10)]
    assert np.mean(unrelated) == pytest.approx(k / (n - 1), rel=0.08)
    half = neighbour_agreement(features(n, 30, 0), features(n, 30, 0) + features(n, 30, 1), k)
    assert 2 * k / (n - 1) < half < 0.9


def test_of_equally_near_examples_the_earlier_ones_count():
    x = torch.tensor([[1, 0], [0, 1], [0, -1], [0, 2], [-1, 0]])
    table = neighbour_table(x, x.flip(0), TEXTS, k=2, count=5).set_index("text")
    assert table.loc["a", "before"] == "b | c"  # b, c and d are at right angles to a
    assert table.loc["b", "before"] == "d | a"
    assert table.loc["e", "before"] == "b | c"
    same = torch.ones(300, 4)  # more than one chunk
    assert neighbour_agreement(same, 2 * same, k=5) == 1


def test_chunks_make_no_difference(monkeypatch):
    x = torch.round(features(100, 3, 0))  # with ties
    x = x[x.abs().sum(1) > 0]
    y = x + features(len(x), 3, 1)
    whole = neighbour_agreement(x, y, 7)
    order = (x / x.norm(dim=1, keepdim=True)).double()
    order = (order @ order.T).fill_diagonal_(-2)
    plain = [set(row.argsort(descending=True, stable=True)[:7].tolist()) for row in order.round(decimals=6)]
    other = (y / y.norm(dim=1, keepdim=True)).double()
    other = (other @ other.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :7].tolist()
    expected = np.mean([len(a & set(b)) / 7 for a, b in zip(plain, other, strict=True)])
    assert whole == pytest.approx(expected, abs=0.01)  # ties that rounding breaks
    monkeypatch.setattr(neighbours, "CHUNK", 13)
    assert neighbour_agreement(x, y, 7) == pytest.approx(whole, abs=0.01)


def test_arrays_and_other_kinds_of_numbers_do_as_well(recwarn):
    array = AFTER.numpy().copy()
    array.flags.writeable = False
    assert neighbour_agreement(BEFORE.numpy(), array, 2) == 0.6
    assert neighbour_agreement(BEFORE.bfloat16().requires_grad_(), array, 2) == 0.6
    assert neighbour_agreement((1000 * BEFORE).int(), (1000 * array).astype(int), 2) == 0.6
    assert not recwarn.list


def test_the_table_shows_whose_neighbours_changed_most():
    table = neighbour_table(BEFORE, AFTER, TEXTS, k=2, count=4)
    assert table.columns.tolist() == ["text", "shared", "before", "after"]
    assert table.values.tolist() == [
        ["e", 0, "d | c", "a | b"],
        ["a", 1, "b | c", "e | b"],
        ["d", 1, "e | c", "c | b"],
        ["b", 2, "a | c", "a | c"],
    ]
    assert len(neighbour_table(BEFORE, AFTER, TEXTS, k=2)) == 5
    with pytest.raises(ValueError, match="a text for each of the 5 rows of features, not 4"):
        neighbour_table(BEFORE, AFTER, TEXTS[:-1], k=2)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        neighbour_table(BEFORE, AFTER, TEXTS, k=2, count=0)


@pytest.mark.parametrize(
    ("before", "after", "k", "message"),
    [
        (BEFORE, AFTER[:-1], 2, r"shapes \(5, 2\) and \(4, 2\): expected \(n, p\) and \(n, q\)"),
        (BEFORE[:, 0], AFTER, 2, r"shapes \(5,\) and \(5, 2\): expected"),
        (BEFORE, AFTER, 5, "k must be from 1 to 4, as each of 5 examples has that many others, not 5"),
        (BEFORE, AFTER, 0, "k must be from 1 to 4"),
        (
            with_row(BEFORE, 3, 0),
            AFTER,
            2,
            r"1 of 5 rows of the features before training are zero \(rows 3\)",
        ),
        (BEFORE, with_row(AFTER, 1, torch.nan), 2, r"features after training are not finite \(rows 1\), so"),
        (BEFORE, with_row(AFTER, 4, -torch.inf), 2, r"not finite \(rows 4\).* leave these examples out"),
    ],
)
def test_features_without_neighbours_are_refused(before, after, k, message):
    with pytest.raises(ValueError, match=message):
        neighbour_agreement(before, after, k)
