"""Answers for trajectories of a batch of which others are still being encoded."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model

from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.encoding import Encoder
from onpolicy_skd.teacher.teacher import Teacher

BATCH = make_trajectories([(3, 30), (3, 20), (3, 10)])


class GatedTeacher(Teacher):
    """Encodes one trajectory each time that the gate opens; ``fails`` after so many."""

    def __init__(self, fails=None):
        super().__init__(split(tiny_model("qwen3", False), VOCABULARY), 1, 0)
        self.gate, self.fails = threading.Semaphore(0), fails

    def _hidden_of(self, trajectories):
        for number, pair in enumerate(super()._hidden_of(trajectories)):
            assert self.gate.acquire(timeout=10)
            if number == self.fails:
                raise MemoryError("full")
            yield pair


def wanted(*numbers):
    return {BATCH[n].key: BATCH[n].digest for n in numbers}


def rows(teacher, number):
    return teacher.rows([(BATCH[number].key, range(len(BATCH[number].target_ids)))])


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as pool:
        yield pool


def test_rows_are_there_before_the_batch_is_done_and_are_those_of_the_plain_teacher(threads):
    teacher = GatedTeacher()
    encoder = Encoder(teacher)
    first, last = threads.submit(encoder.wait_for, wanted(0)), threads.submit(encoder.wait_for, wanted(0, 2))
    encoding = threads.submit(encoder.encode, BATCH)  # asked for before it began
    teacher.gate.release()
    first.result(10)
    early = rows(teacher, 0)
    assert not encoding.done()
    assert not last.done()
    for _ in BATCH[1:]:
        teacher.gate.release()
    encoding.result(10)
    last.result(10)
    plain = GatedTeacher()
    plain.gate.release(len(BATCH))
    plain.encode(BATCH)
    assert torch.equal(early, rows(plain, 0))
    assert torch.equal(rows(teacher, 2), rows(plain, 2))


def test_an_error_reaches_all_who_wait_and_a_new_batch_is_a_new_chance(threads):
    teacher = GatedTeacher(fails=1)
    encoder = Encoder(teacher)
    waiting = threads.submit(encoder.wait_for, wanted(2))
    encoding = threads.submit(encoder.encode, BATCH)
    teacher.gate.release(2)
    for call in (encoding, waiting, threads.submit(encoder.wait_for, wanted(1))):
        with pytest.raises(MemoryError):
            call.result(10)
    encoder.wait_for(wanted(0))  # which was encoded
    teacher.fails = None
    again = threads.submit(encoder.encode, BATCH)
    waiting = threads.submit(encoder.wait_for, wanted(1, 2))
    teacher.gate.release(2)
    again.result(10)
    waiting.result(10)


def test_other_tokens_under_the_same_key_are_waited_for(threads):
    teacher = GatedTeacher()
    encoder = Encoder(teacher)
    teacher.gate.release(1)
    encoder.encode(BATCH[:1])
    other = dataclasses.replace(BATCH[0], response_ids=BATCH[0].response_ids[::-1].copy())
    waiting = threads.submit(encoder.wait_for, {other.key: other.digest})
    assert not teacher.holds(other.key, other.digest)
    encoding = threads.submit(encoder.encode, [other])
    assert not waiting.done()
    teacher.gate.release()
    encoding.result(10)
    waiting.result(10)
    assert teacher.holds(other.key, other.digest)
