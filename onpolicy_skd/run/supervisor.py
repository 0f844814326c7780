"""What becomes of a failed actor: a pure state machine with an injected clock; nothing of Ray.

Every role has a history of failures.  A failure is answered by a restart after a wait that doubles with each failure
still in the history, or, once ``faults.restarts`` of them lie within an hour, by giving up.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onpolicy_skd.config.schema import FaultSettings
from onpolicy_skd.storage.checkpoint import Checkpoint

LONGEST_WAIT = 60.0  # seconds
WINDOW = 3600.0  # seconds that a failure counts


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the failed actors again after ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run, for ``reason``."""

    reason: str


class Supervisor:
    """``decide`` is asked once for each fault."""

    def __init__(self, settings: FaultSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._failures: defaultdict[str, deque[float]] = defaultdict(deque)

    def decide(self, failed: Mapping[str, str]) -> Restart | GiveUp:
        """``failed``: causes by role.  One fault may take several roles along; the worst-off one decides."""
        now, own = self._clock(), self._settings
        for role, cause in failed.items():
            history = self._failures[role]
            while history and now - history[0] >= WINDOW:
                history.popleft()
            history.append(now)
            if len(history) > own.restarts:
                return GiveUp(
                    f"{role} failed {len(history)} times within an hour, "
                    f"faults.restarts={own.restarts}; the last time: {cause}"
                )
        worst = max(len(self._failures[role]) for role in failed)
        return Restart(min(LONGEST_WAIT, own.backoff_seconds * 2.0 ** (worst - 1)))


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was done about a fault."""

    cause: str
    restarted: list[str]  # roles, one entry an actor
    rolled_back: bool  # the learner is new; it stands where its newest checkpoint, or its model, does
    checkpoint: Checkpoint | None
    ahead: list[Any]  # refs to rollouts of the step to continue with, from that checkpoint
    seconds: float
