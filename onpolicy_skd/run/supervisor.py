"""The decision to restart failed actors or to give up: a state machine with an injected clock, without Ray.

Each role has a history of failures.  A failure leads to a restart, after a wait that doubles with each failure still in
the history.  More than ``faults.restarts`` failures within an hour end the run.
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
WINDOW = 3600.0  # seconds for which a failure counts


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart the failed actors after ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run for ``reason``."""

    reason: str


class Supervisor:
    """Failure history of each role; call ``decide`` once for each fault."""

    def __init__(self, settings: FaultSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._failures: defaultdict[str, deque[float]] = defaultdict(deque)

    def decide(self, failed: Mapping[str, str]) -> Restart | GiveUp:
        """Return what to do about ``failed``, causes by role; the role with the most failures decides the wait."""
        now, faults_cfg = self._clock(), self._settings
        for role, cause in failed.items():
            history = self._failures[role]
            while history and now - history[0] >= WINDOW:
                history.popleft()
            history.append(now)
            if len(history) > faults_cfg.restarts:
                return GiveUp(
                    f"{role} failed {len(history)} times within an hour, "
                    f"faults.restarts={faults_cfg.restarts}; the last time: {cause}"
                )
        worst = max(len(self._failures[role]) for role in failed)
        return Restart(min(LONGEST_WAIT, faults_cfg.backoff_seconds * 2.0 ** (worst - 1)))


@dataclass(frozen=True, slots=True)
class Recovery:
    """Result of ``actors.workers.Workers.recover``."""

    cause: str
    restarted: list[str]  # role of each restarted actor
    rolled_back: bool  # the learner restarted from its newest checkpoint, or from the initial student
    checkpoint: Checkpoint | None
    prefetched_rollouts: list[Any]  # refs from that checkpoint, for the step to continue with
    seconds: float
