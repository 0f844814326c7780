"""What the vLLM teacher makes of an engine's hidden states, without vLLM."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings

from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.teacher import HiddenRowsTeacher, Teacher
from onpolicy_skd.teacher.vllm_teacher import (
    VLLMTeacher,
    check_gap,
    checked_ids,
    documents_of,
    eligible_columns,
    mean_gap,
)


class Encoder(VLLMTeacher):
    """A transformers model in place of the engine: one sequence at a time, as the pooling runner returns them."""

    def __init__(self, model, tokens_per_batch):
        self._model, self._tokens_per_batch = model, tokens_per_batch
        self._device, self._dtype = "cpu", torch.float32
        self.calls = []
        HiddenRowsTeacher.__init__(self, LMHead(model.lm_head.weight.detach()), 1.0, None)

    def _hidden_of_ids(self, sequences):
        self.calls.append(sum(map(len, sequences)))
        return [self._model.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences]


def test_rows_are_those_of_the_transformers_teacher():
    """With supervised positions, documents and another prompt for the teacher."""
    model = tiny_model("qwen3", False)
    batch = make_trajectories([(5, 9), (3, 20), (12, 4), (2, 15)])
    batch[0] = dataclasses.replace(batch[0], supervised=np.arange(9) % 2 == 0)
    batch[1] = dataclasses.replace(batch[1], documents=np.array([4, 11]))
    batch[2] = dataclasses.replace(batch[2], teacher_prompt_ids=np.array([7, 8, 9]))
    teacher, expected = Encoder(model, 25), Teacher(split(model, VOCABULARY), 1_000, 0)
    request = [(t.key, range(len(t.target_ids))) for t in batch]
    for each in (teacher, expected):
        each.encode(batch)
    torch.testing.assert_close(teacher.rows(request), expected.rows(request), rtol=1e-4, atol=1e-5)
    assert len(teacher.rows(request)) == 5 + 20 + 4 + 15  # of the eligible positions alone
    for a, b in zip(*(t.entropy_and_logprob([t.key for t in batch]) for t in (teacher, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert max(teacher.calls) <= 25
    assert sum(teacher.calls) == 14 + 23 + 7 + 17
    teacher.release([t.key for t in batch])
    with pytest.raises(KeyError, match="t0"):
        teacher.rows(request)


def test_columns_and_documents_are_those_of_the_batch():
    t = make_trajectories([(4, 6)])[0]
    assert eligible_columns(t).tolist() == collate([t], 0).columns.tolist() == [3, 4, 5, 6, 7, 8]
    masked = dataclasses.replace(t, supervised=np.array([False, True, False, True, True, False]))
    assert eligible_columns(masked).tolist() == collate([masked], 0).columns.tolist() == [4, 6, 7]
    pieces = documents_of(dataclasses.replace(t, documents=np.array([2, 7])))
    assert [len(piece) for piece in pieces] == [2, 5, 3]
    assert np.array_equal(np.concatenate(pieces), np.concatenate([t.prompt_ids, t.response_ids]))


def logprobs_of(model, ids):
    """What vLLM would return: the five most likely tokens after each prefix, and one beyond the vocabulary."""
    logprobs_LV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    top = logprobs_LV.topk(5)
    rows = zip(top.indices.tolist()[:-1], top.values.tolist()[:-1], strict=True)
    return [dict(zip(tokens, values, strict=True)) | {VOCABULARY + 5: -1.0} for tokens, values in rows]


@torch.no_grad()
def test_the_check_compares_the_head_on_the_states_with_the_engines_log_probabilities():
    model, ids = tiny_model("qwen3", False), [5, 9, 17, 33, 2]
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    head, expected = LMHead(model.lm_head.weight), [logprobs_of(model, ids)]
    assert mean_gap([hidden], head, expected) < 1e-5
    before_norm = hidden / model.model.norm.weight * 3.0
    assert mean_gap([before_norm], head, expected) > 0.1
    assert mean_gap([hidden.roll(1, 0)], head, expected) > 0.1
    assert mean_gap([hidden], LMHead(model.lm_head.weight, None, 1.0, 2.0), expected) > 1e-3


@pytest.mark.parametrize(
    ("gap", "dtype", "refused"),
    [
        (9e-4, torch.float32, False),
        (2e-3, torch.float32, True),
        (2e-3, torch.float16, False),
        (5e-2, torch.bfloat16, False),
        (0.2, torch.bfloat16, True),
        (float("nan"), torch.bfloat16, True),
    ],
)
def test_a_gap_beyond_rounding_and_nan_are_refused(gap, dtype, refused):
    if refused:
        with pytest.raises(ModelError, match=r"prompt_logprobs.*teacher\.engine=transformers"):
            check_gap(gap, dtype, "some/model")
    else:
        check_gap(gap, dtype, "some/model")


def test_checked_texts_leave_one_token_to_generate():
    settings = tiny_settings(data={"max_prompt_tokens": 4}, rollout={"max_tokens": 4})
    assert [len(ids) for ids in checked_ids(settings)] == [7, 7, 7]
    assert all(1 < len(ids) < 224 for ids in checked_ids(tiny_settings()))
