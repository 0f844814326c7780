"""State of the rollout engines: the version of their weights, and sleep of colocated engines."""

from __future__ import annotations

from actors.groups import ActorGroups
from actors.weight_proof import prove_update
from actors.weight_sync import build_sync

UNKNOWN = -1  # version of an engine that just started or slept: it must get weights before it generates


class EngineWeights:
    """Sends the learner's weights to the engines when theirs are old; lets colocated engines sleep in between."""

    def __init__(self, groups: ActorGroups, colocated: bool, vocabulary: int) -> None:
        self._groups = groups
        self._vocabulary = vocabulary
        self._colocated = colocated
        self._awake = True
        self.learner_version = 0  # optimizer steps whose result came back
        self._engine_version = 0  # engines start from the same checkpoint as the learner
        self._sending = False
        self._proved = False  # that an update reaches every parameter

    def connect(self) -> None:
        """Build the connection from learner to engines; again after any actor was replaced."""
        self._sync = build_sync(self._groups.settings, self._groups.learner, self._groups.rollouts)
        self._awake = True

    def push(self) -> None:
        """Send the learner's weights to every rollout engine, unless the engines hold them.

        The first call proves that engines take every parameter.  Raises ModelError if they do not.
        """
        if self._groups.engines and not (self._proved and self._engine_version == self.learner_version):
            self._sending = True
            if not self._proved:
                prove_update(self._groups, self._sync, self.learner_version, self._vocabulary)
                self._proved = True
            self._sync.push(self.learner_version, self._groups.timeout_s())
            self._sending = False
            self._engine_version, self._awake = self.learner_version, True

    def sleep(self) -> None:
        """Let colocated engines give back their memory, and with it their weights."""
        if self._colocated and self._awake:
            self._groups.get([engine.sleep.remote() for engine in self._groups.engines], "rollout")
            self._engine_version, self._awake = UNKNOWN, False

    def take_interrupted(self) -> bool:
        """Return True once after a push that failed midway, if it may have left engines with mixed weights."""
        interrupted, self._sending = self._sending, False
        return interrupted and self._groups.settings.sync.method != "object_store"

    def forget_engines(self) -> None:
        """Note that an engine is new: the next ``push`` sends weights."""
        self._engine_version = UNKNOWN
