import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.selection import metrics, positions, samples
from onpolicy_skd.trajectory import Trajectory

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)
shares = st.sampled_from([0.01, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])


def scores_for(counts, seed, ties=False):
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 3, sum(counts)) if ties else draw.random(sum(counts))
    return torch.tensor(values, dtype=torch.float32)


def test_the_quota_is_the_exact_ceiling():
    assert positions.quota(0.2, 15) == 3  # 0.2 * 15 is 3.0000000000000004 in floating point
    assert [positions.quota(0.2, n) for n in (1, 5, 6, 10, 11)] == [1, 1, 2, 2, 3]
    assert all(positions.quota(k / 100, n) == math.ceil(k * n / 100) for k in range(1, 101) for n in range(1, 300))


@given(lengths, shares, st.integers(0, 9), st.booleans())
def test_every_sequence_gives_exactly_its_quota_of_its_highest_scores(counts, k, seed, ties):
    scores = scores_for(counts, seed, ties)
    chosen = positions.top_k(scores, counts, k).tolist()
    assert chosen == sorted(set(chosen))
    start = 0
    for n in counts:
        mine = [i - start for i in chosen if start <= i < start + n]
        part = scores[start : start + n].tolist()
        best = sorted(range(n), key=lambda i: (-part[i], i))[: positions.quota(k, n)]
        assert mine == sorted(best)  # ties go to the earlier position
        start += n


@given(lengths, shares, st.integers(0, 9), st.randoms(use_true_random=False))
def test_selection_does_not_depend_on_the_rest_of_the_batch(counts, k, seed, shuffler):
    scores = scores_for(counts, seed)
    parts = list(scores.split(counts))
    alone = [positions.top_k(part, [len(part)], k).tolist() for part in parts]
    order = list(range(len(counts)))
    shuffler.shuffle(order)
    mixed = positions.select(torch.cat([parts[i] for i in order]), [counts[i] for i in order], "top_k", k)
    start = 0
    for place, i in enumerate(order):
        own = mixed.indices_K.split(mixed.counts)[place] - start
        assert own.tolist() == alone[i]
        start += counts[i]


@given(lengths, shares, st.sampled_from(["top_k", "full"]))
def test_weights_of_each_sequence_sum_to_one(counts, k, policy):
    chosen = positions.select(scores_for(counts, 0), counts, policy, k)
    assert len(chosen.indices_K) == len(chosen.weights_K) == sum(chosen.counts)
    for part in chosen.weights_K.split(chosen.counts):
        assert part.sum().item() == pytest.approx(1.0, rel=1e-5)
    if policy == "full":
        assert chosen.counts == counts


def test_nan_scores_and_unknown_policies_are_errors():
    with pytest.raises(ValueError, match="NaN"):
        positions.top_k(torch.tensor([0.0, float("nan")]), [2], 0.5)
    with pytest.raises(ValueError, match="unknown position policy 'best'"):
        positions.select(torch.zeros(2), [2], "best", 0.5)


def test_metrics():
    signals = metrics.Signals(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([-1.0, -2.0, -3.0]), [2, 1], [7, 8])
    assert metrics.METRICS["student_entropy"](signals).tolist() == pytest.approx([0.1, 0.3, 0.2])
    assert metrics.METRICS["student_ce"](signals).tolist() == [1.0, 2.0, 3.0]
    assert metrics.METRICS["prefix"](signals).tolist() == [0.0, -1.0, 0.0]
    drawn = metrics.METRICS["random"](signals)
    alone = metrics.METRICS["random"](metrics.Signals(torch.zeros(1), torch.zeros(1), [1], [8]))
    assert drawn[2] == alone[0]  # a function of the sequence's own seed
    assert len(set(drawn.tolist())) == 3


def trajectory(key, ids, finish="stop"):
    ids = np.asarray(ids, dtype=np.int64)
    return Trajectory(key, np.array([1]), ids, np.zeros(len(ids), np.float32), finish, 0)


def test_validity_counts_every_reason():
    batch = [trajectory("good", [2, 3]), trajectory("none", []), trajectory("cut", [4], "length"),
             trajectory("alien", [2, 50])]  # fmt: skip
    report = samples.validity(batch, vocabulary=50)
    assert report.kept == ["good"]
    assert report.dropped == {"empty": 1, "truncated": 1, "outside_vocabulary": 1}
    assert report.generated == 4
    assert samples.validity(batch, 51, drop_truncated=False).kept == ["good", "cut", "alien"]


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=40), shares)
def test_top_share_keeps_the_exact_ceiling_and_breaks_ties_early(scores, share):
    kept = samples.top_share(scores, share)
    assert len(kept) == positions.quota(share, len(scores))
    assert kept == sorted(kept)
    worst = min(scores[i] for i in kept)
    for i in set(range(len(scores))) - set(kept):
        assert scores[i] < worst or (scores[i] == worst and all(j < i for j in kept if scores[j] == worst))
