"""Trajectories of which only some response tokens are targets: the assistant's turns of a conversation."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import make_trajectories
from learner_helpers import build, gradients, relative

from onpolicy_skd.learner.probe import Probe
from onpolicy_skd.models.batch import collate

SUPERVISED = np.array([True] * 4 + [False] * 5 + [True] * 3)


def conversation_and_turns():
    """Return a conversation with two turns of the assistant, and each turn as a response to what precedes it."""
    (full,) = make_trajectories([(5, 12)], version=None)
    conversation = dataclasses.replace(full, sampler_logprobs=np.zeros(7, np.float32), supervised=SUPERVISED)
    ids = np.concatenate([full.prompt_ids, full.response_ids])
    turns = [
        dataclasses.replace(
            full, key=f"turn{start}", prompt_ids=ids[:start], response_ids=ids[start:end],
            sampler_logprobs=np.zeros(end - start, np.float32),
        )
        for start, end in ((5, 9), (14, 17))
    ]  # fmt: skip
    return conversation, turns


@pytest.mark.parametrize("packed", [False, True])
def test_only_supervised_tokens_are_targets(packed):
    conversation, turns = conversation_and_turns()
    batch = collate([conversation, *make_trajectories([(2, 3)])], 0, packed=packed)
    assert batch.counts == [7, 3]
    following = batch.input_ids[batch.rows, batch.columns + 1]
    assert torch.equal(following, batch.targets)
    assert batch.targets[:7].tolist() == [*turns[0].response_ids, *turns[1].response_ids]


def test_positions_and_gradients_are_those_of_the_turns():
    conversation, turns = conversation_and_turns()
    learner, teacher = build(positions={"policy": "full"})
    teacher.encode([conversation, *turns])
    (full,), split = (learner.scorer.diagnose_positions(batch) for batch in ([conversation], turns))
    for name in ("entropy", "divergence"):
        expected = np.concatenate([getattr(d, name) for d in split])
        np.testing.assert_allclose(getattr(full, name), expected, rtol=1e-4, atol=1e-6)
    weighted = [dataclasses.replace(t, weight=float(len(t.response_ids))) for t in turns]
    assert relative(gradients(learner, teacher, [conversation]), gradients(learner, teacher, weighted)) < 1e-5
    assert learner.step([conversation]).positions == 7


def test_the_mask_belongs_to_the_digest_and_to_a_probe():
    conversation, _ = conversation_and_turns()
    assert conversation.digest != dataclasses.replace(conversation, supervised=None).digest
    assert conversation.digest != dataclasses.replace(conversation, supervised=~SUPERVISED).digest
    _, teacher = build()
    teacher.encode([conversation])
    probe = Probe.of([conversation], teacher)
    (restored,) = Probe.from_state_dict(probe.state_dict()).trajectories
    assert np.array_equal(restored.supervised, SUPERVISED)
    assert restored.digest == conversation.digest
    assert len(probe.rows["probe/0"]) == 7
