import dataclasses

import numpy as np
import pytest
from helpers import make_trajectories
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.models.batch import collate, micro_batches
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.storage.trajectories import trajectories_from_tensors, trajectories_to_tensors
from onpolicy_skd.types import check_version, seed_of

pairs = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@given(pairs, st.sampled_from(["right", "left"]))
def test_eligible_positions_are_exactly_those_that_predict_response_tokens(lengths, side):
    members = make_trajectories(lengths)
    batch = collate(members, pad_id=0, padding_side=side)
    assert batch.counts == [response for _, response in lengths]
    start = 0
    for row, t in enumerate(members):
        n = len(t.response_ids)
        positions = slice(start, start + n)
        assert (batch.rows[positions] == row).all()
        following = batch.columns[positions] + 1  # the column after a position holds its target
        assert batch.input_ids[row, following].tolist() == t.response_ids.tolist() == batch.targets[positions].tolist()
        assert batch.attention_mask[row].sum() == t.length
        real = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert real.tolist() == [*t.prompt_ids, *t.response_ids]
        assert batch.position_ids[row][batch.attention_mask[row].bool()].tolist() == list(range(t.length))
        start += n
    assert start == len(batch.targets)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 200))
def test_micro_batches_cover_everything_once_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert max(lengths[i] for i in group) * len(group) <= budget
    longest = [lengths[g[0]] for g in groups]
    assert longest == sorted(longest, reverse=True)


def test_a_sample_over_the_budget_is_alone_in_its_micro_batch():
    assert micro_batches([10, 100, 10], 20) == [[1], [0, 2]]


def test_empty_responses_cannot_be_collated():
    (t,) = make_trajectories([(3, 1)])
    empty = type(t)(t.key, t.prompt_ids, np.array([], dtype=np.int64), t.sampler_logprobs[:0], "stop", 0)
    with pytest.raises(ValueError, match="t0"):
        collate([empty], 0)


def test_stale_trajectories_are_refused():
    batch = make_trajectories([(2, 2)], version=3)
    check_version(batch, 3)
    check_version(batch, 4, max_staleness=1)
    for version, bound in ((4, 0), (2, 5)):  # too old; from the future
        with pytest.raises(RuntimeError, match="t0 was sampled by policy version 3"):
            check_version(batch, version, bound)


def test_seeds_are_stable_and_differ():
    assert seed_of(1, "a", 2) == seed_of(1, "a", 2) == 1678243259
    assert len({seed_of(1, step, i) for step in range(50) for i in range(50)}) == 2500
    assert 0 <= seed_of("x") < 2**31


def test_trajectories_survive_a_checkpoint(tmp_path):
    batch = make_trajectories([(3, 5), (2, 7)], version=4)
    batch[1] = dataclasses.replace(
        batch[1],
        correct=True,
        weight=0.5,
        sampler_entropy=np.ones(7, np.float32),
        documents=np.array([2]),
        supervised=np.arange(7) < 6,
    )
    records, tensors = trajectories_to_tensors(batch)
    checkpoint.save(tmp_path, 1, {"ahead": records}, tensors, keep=1)
    loaded = checkpoint.newest(tmp_path)
    for restored, expected in zip(trajectories_from_tensors(loaded.state["ahead"], loaded.tensors), batch, strict=True):
        for field in dataclasses.fields(expected):
            a, b = getattr(restored, field.name), getattr(expected, field.name)
            assert (a is None and b is None) or np.array_equal(a, b), field.name
