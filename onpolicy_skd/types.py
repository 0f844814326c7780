"""Records that travel between rollout, teacher, learner and driver.

Notation (docs/method.md): a trajectory is prompt ids followed by response ids ``y_1..y_n``.  Position t predicts
``y_t``; the **eligible positions** are exactly the n positions whose target is a response token, in a conversation the
tokens of the assistant's turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation as a chat template takes it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False  # thinking mode of templates that have one

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The messages before the turn to generate: all but the last, if that is the assistant's."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def question(self) -> str:
        """The text of ``prompt``: the user's words or, if there is more, a transcript."""
        if [m["role"] for m in self.prompt] == ["user"] and not self.tools:
            return self.prompt[0]["content"]
        lines = [f"{m['role']}: {m['content']}" + _as_json(m.get("tool_calls")) for m in self.prompt]
        return "\n\n".join([*(["tools: " + _as_json(self.tools)] if self.tools else []), *lines])


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if value else ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, or a sample of packed text, which has no question: its tokens are the response."""

    key: str  # derived from the question's text, so it does not depend on where the data was read from
    token_ids: list[int]
    question: str
    answer: str  # reference answer, in GSM8K's format for GSM8K-like data; empty if there is none
    documents: np.ndarray | None = None  # packed text: as in Trajectory; its tokens are all in token_ids
    row: str = ""  # file or data set and row number, for messages
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row of the data, for templates and judges
    chat: Chat | None = None  # the conversation, with data.messages_column
    source: int = 0  # index of its source in data.mix
    teacher_ids: list[int] | None = None  # the prompt that the teacher reads; None: the same
    teacher: str | None = None  # name of its teacher among ``teachers``; None: the run has one teacher

    @property
    def has_reference(self) -> bool:
        """True if the data has a response to this prompt: an answer, or turns of the assistant."""
        return any(m["role"] == "assistant" for m in self.chat.messages) if self.chat else bool(self.answer)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt, a response to it, and what the sampler recorded at the n eligible positions."""

    key: str  # "PROMPT KEY/SAMPLE", unique within a step
    prompt_ids: np.ndarray  # int64 [prompt tokens]
    response_ids: np.ndarray  # int64 [response tokens]; ends with the end-of-sequence token if one was produced
    sampler_logprobs: np.ndarray  # float32 [n]; nats, of the unmodified model at temperature 1
    finish_reason: FinishReason  # "length": no end of sequence within the limit
    policy_version: int | None  # optimizer steps done when its weights were current; None: not sampled by the student
    correct: bool | None = None  # True if its answer is right; None: not judged
    weight: float = 1.0  # weight of this sample in the batch's mean
    documents: np.ndarray | None = None  # int64; indices of tokens, after the first, at which attention restarts
    sampler_entropy: np.ndarray | None = None  # float32 [n]; nats, as sampler_logprobs; None: not recorded
    supervised: np.ndarray | None = None  # bool [response tokens]: those that are targets; None: all
    teacher_prompt_ids: np.ndarray | None = None  # int64; the prompt that the teacher reads; None: prompt_ids
    teacher: str | None = None  # as in Prompt

    @property
    def target_ids(self) -> np.ndarray:
        """The n response tokens that are targets of the eligible positions."""
        return self.response_ids if self.supervised is None else self.response_ids[self.supervised]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def digest(self) -> bytes:
        """Eight bytes that identify what the models read: tokens, eligible positions, document starts."""
        digest = hashlib.sha256(len(self.prompt_ids).to_bytes(8, "little"))
        for ids in (self.prompt_ids, self.response_ids):
            digest.update(np.asarray(ids, dtype="<i8").tobytes())
        if self.documents is not None:
            digest.update(b"documents" + np.asarray(self.documents, dtype="<i8").tobytes())
        if self.supervised is not None:
            digest.update(self.supervised.tobytes())
        if self.teacher_prompt_ids is not None:
            digest.update(b"teacher" + np.asarray(self.teacher_prompt_ids, dtype="<i8").tobytes())
        return digest.digest()[:8]

    def as_teacher_reads(self) -> Trajectory:
        """Return the same response after the teacher's prompt; the eligible positions stay the same n."""
        return self if self.teacher_prompt_ids is None else replace(self, prompt_ids=self.teacher_prompt_ids)

    @property
    def prompt_key(self) -> str:
        """The prompt's key within its step."""
        return self.key.rpartition("/")[0] or self.key


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of generation; temperature 0 is greedy decoding."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    entropy: bool = False  # record entropies
    stop: tuple[str, ...] = ()  # texts that end a response


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A response to generate.

    On the CPUs of one machine, the seed determines the response in any batch and on any actor.  GPU kernels round
    differently in another batch; vLLM's VLLM_BATCH_INVARIANT=1 avoids that, at the cost of speed.
    """

    key: str
    prompt_ids: list[int]
    seed: int
    answer: str | None = None  # the reference answer, where correctness is needed; empty: a judge decides
    columns: Mapping[str, Any] | None = None  # the row of the data, for that judge
    teacher_prompt_ids: list[int] | None = None  # copied to the Trajectory
    teacher: str | None = None  # as in Prompt


@dataclass(slots=True)
class FilterReport:
    """Trajectories of a batch that a sample filter kept, and how many it dropped for each reason."""

    kept: list[str]  # trajectory keys
    generated: int
    dropped: dict[str, int] = field(default_factory=dict)  # count per reason
    student_rollouts: int = 0  # trajectories that the student sampled, among those generated
    truncated: int = 0  # student rollouts that reached the token limit, kept or not

    def count(self, reason: str, dropped: int) -> None:
        """Add ``dropped`` trajectories under ``reason``."""
        if dropped:
            self.dropped[reason] = self.dropped.get(reason, 0) + dropped

    def add(self, other: FilterReport) -> None:
        """Add the report of other trajectories of the same batch."""
        self.kept += other.kept
        self.generated += other.generated
        self.student_rollouts += other.student_rollouts
        self.truncated += other.truncated
        for reason, dropped in other.dropped.items():
            self.count(reason, dropped)


def id_array(ids: Sequence[int] | None) -> np.ndarray | None:
    """Return token ids as an int64 array; None stays None."""
    return None if ids is None else np.asarray(ids, dtype=np.int64)


def check_version(trajectories: Iterable[Trajectory], version: int, max_staleness: int = 0) -> None:
    """Check that ``trajectories`` were sampled by policy ``version`` or at most ``max_staleness`` steps before it.

    Trajectories that the student did not sample always pass.  Raises RuntimeError naming the first that is too old, or
    newer than the learner.
    """
    for t in trajectories:
        if t.policy_version is not None and not 0 <= version - t.policy_version <= max_staleness:
            raise RuntimeError(
                f"trajectory {t.key} was sampled by policy version {t.policy_version}, the learner is at {version}; "
                f"at most {max_staleness} steps of staleness are allowed"
            )


def seed_of(*names: object) -> int:
    """Return a 31-bit seed that depends on all ``names``, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
