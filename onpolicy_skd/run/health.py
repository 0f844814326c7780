"""Warnings, from the metrics of steps, about training that goes wrong without an error.

Each guard compares the mean of a metric over its last readings with a limit, which may depend on the mean of the first
readings.  It warns when the mean of a full window crosses the limit, or when any mean crosses the bound ``clear``.  It
warns again only after the mean has recovered.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 10  # readings; one per step, fewer for metrics that are not measured in every step
RECOVERY = 0.8  # a guard can warn again once its mean is below this share of the limit
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Guard:
    name: str
    metric: str  # key in the record of a step
    limit: Callable[[float], float]  # given the mean of the first readings
    text: str  # with {now}, the current mean, and {start}, the first one
    below: bool = False  # warn below the limit, not above it
    clear: float | None = None  # a mean beyond it needs no full window

    def crossed(self, mean: float, limit: float) -> bool:
        return mean < limit if self.below else mean > limit

    def recovered(self, mean: float, limit: float) -> bool:
        return mean > limit / RECOVERY if self.below else mean < limit * RECOVERY


def guards(max_gap: float) -> tuple[Guard, ...]:
    """Return all guards; ``max_gap`` is ``sync.max_gap``."""
    return (
        Guard(
            "length", "response_tokens", lambda start: max(2 * start, 32),
            "responses have {now:.0f} tokens, {start:.0f} at the start; if truncation follows, lower learner.lr",
        ),
        Guard(
            "repetition", "repetition", lambda start: max(0.25, 2 * start),
            "{now:.0%} of the tokens of responses repeat earlier ones, {start:.0%} at the start; reverse KL can fall "
            "that way: look at the rollouts, lower learner.lr or set alignment.divergence=forward_kl",
        ),
        Guard(
            "truncated", "truncated", lambda start: 0.5,
            "{now:.0%} of the responses reach the token limit before they end; raise rollout.max_tokens",
            clear=0.9,
        ),
        Guard(
            "entropy", "entropy", lambda start: 0.1 * start,
            "the student's entropy is {now:.4f} nats, {start:.4f} at the start: it hardly explores any more; lower "
            "learner.lr or raise rollout.temperature",
            below=True,
        ),
        Guard(
            "gap", "sampler_gap", lambda start: min(0.5 * max_gap, max(3 * start, 0.05 * max_gap)),
            "sampler and learner differ by {now:.4f} nats per token, {start:.4f} at the start: more than half of "
            "sync.max_gap, or three times the start; use the same dtype for rollout.dtype and learner.compute_dtype",
        ),
        Guard(
            "ending", "teacher_ending", lambda start: 0.1,
            "the teacher gives the end-of-sequence tokens of the student's responses a probability of {now:.3f}; check "
            "that both models end answers with the same token (chat template, generation_config.json)",
            below=True, clear=0.05,
        ),
    )  # fmt: skip


@dataclass
class HealthMonitor:
    """Monitor of all guards: ``for name, text in monitor.check(record): ...`` after each step."""

    max_gap: float
    growing: bool = False  # the length limit grows, so longer responses are no warning
    _first: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _last: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=WINDOW)))
    _warned: set[str] = field(default_factory=set)

    def check(self, record: Record) -> Iterator[tuple[str, str]]:
        """Yield name and text of each guard that warns after this step."""
        for guard in guards(self.max_gap):
            value = record.get(guard.metric)
            if value is None or (self.growing and guard.name == "length"):
                continue
            first, last = self._first[guard.name], self._last[guard.name]
            if len(first) < WINDOW:
                first.append(value)
            last.append(value)
            now, start = float(np.mean(last)), float(np.mean(first))
            limit = guard.limit(start)
            clear = guard.clear is not None and guard.crossed(now, guard.clear)
            if guard.name in self._warned:
                if len(last) == WINDOW and guard.recovered(now, limit):
                    self._warned.discard(guard.name)
            elif clear or (len(last) == WINDOW and guard.crossed(now, limit)):
                self._warned.add(guard.name)
                yield guard.name, guard.text.format(now=now, start=start)
