"""Warnings of training that goes wrong without an error, from the metrics of its steps.

Each guard looks at the mean of a reading over the last ``WINDOW`` steps, some beside the mean of the first ones.  It
speaks when that goes wrong, and again only after it has been right in between.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 10  # steps
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Guard:
    name: str
    reading: Callable[[Record], float | None]  # of one step's metrics; None if they do not tell
    wrong: Callable[[float, float], bool]  # of its mean now, and at the start
    says: str  # with {now} and {start}


def _truncated(r: Record) -> float | None:
    if "truncated" not in r:
        return None
    return (r["dropped"].get("truncated", 0) + r["truncated"] * r["samples"]) / r["generated"]


def guards(max_gap: float) -> tuple[Guard, ...]:
    """All of them; ``max_gap``: ``sync.max_gap``."""
    return (
        Guard(
            "length", lambda r: r.get("response_tokens"), lambda now, start: now > max(2 * start, 32),
            "responses have {now:.0f} tokens, {start:.0f} at the start; if truncation follows, lower learner.lr",
        ),
        Guard(
            "repetition", lambda r: r.get("repetition"), lambda now, start: now > max(0.25, 2 * start),
            "{now:.0%} of the responses' tokens repeat what they said before, {start:.0%} at the start; reverse KL can "
            "fall that way: look at the rollouts, lower learner.lr or set alignment.divergence=forward_kl",
        ),
        Guard(
            "truncated", _truncated, lambda now, start: now > 0.5,
            "{now:.0%} of the responses have no end within the limit; raise rollout.max_tokens",
        ),
        Guard(
            "entropy", lambda r: r.get("entropy"), lambda now, start: now < 0.1 * start,
            "the student's entropy is {now:.4f} nats, {start:.4f} at the start: it hardly explores any more; lower "
            "learner.lr or raise rollout.temperature",
        ),
        Guard(
            "gap", lambda r: r.get("sampler_gap"), lambda now, start: now > 0.5 * max_gap,
            "sampler and learner differ by {now:.4f} nats a token, more than half of sync.max_gap; use one dtype for "
            "rollout.dtype and learner.compute_dtype",
        ),
        Guard(
            "ending", lambda r: r.get("teacher_ending"), lambda now, start: now < 0.1,
            "the teacher gives the student's ends of sequence a probability of {now:.3f}; check that both end answers "
            "with the same token (chat template, generation_config.json)",
        ),
    )  # fmt: skip


@dataclass
class HealthMonitor:
    """``for name, text in watch.see(record): ...`` after every step."""

    max_gap: float
    _start: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _last: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=WINDOW)))
    _wrong: set[str] = field(default_factory=set)

    def see(self, record: Record) -> Iterator[tuple[str, str]]:
        """Name and words of each guard that speaks after this step."""
        for guard in guards(self.max_gap):
            value = guard.reading(record)
            if value is None:
                continue
            start, last = self._start[guard.name], self._last[guard.name]
            if len(start) < WINDOW:
                start.append(value)
            last.append(value)
            if len(last) < WINDOW:
                continue
            now, then = float(np.mean(last)), float(np.mean(start))
            if not guard.wrong(now, then):
                self._wrong.discard(guard.name)
            elif guard.name not in self._wrong:
                self._wrong.add(guard.name)
                yield guard.name, guard.says.format(now=now, start=then)
