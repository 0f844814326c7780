"""Weight versions of the rollout engines, and sleep of colocated engines."""

from __future__ import annotations

from actors.groups import ActorGroups
from actors.weight_proof import check_sleep, greedy_answers, prove_update
from actors.weight_sync import ObjectStoreSync, build_sync
from onpolicy_skd.types import Trajectory

UNKNOWN = -1  # version of engines that were restarted or slept: they must get weights before they generate


class EngineWeights:
    """Sends the learner's weights to engines that hold older ones; puts colocated engines to sleep between rollouts."""

    def __init__(self, groups: ActorGroups, colocated: bool, vocabulary: int) -> None:
        self._groups = groups
        self._vocabulary = vocabulary
        self._colocated = colocated
        self._awake = True
        self.learner_version = 0  # optimizer steps whose result the driver has received
        self._engine_version = 0  # engines start from the same checkpoint as the learner
        self._sending = False
        self._proved = False  # True once ``prove_update`` has shown that an update reaches every parameter
        self._answers: list[Trajectory] | None = None  # greedy responses before the first sleep, with initial weights

    def connect(self) -> None:
        """Build the connection from the learner to the engines, which must be ready.

        Call this method again after any actor has been replaced.
        """
        groups = self._groups
        self._sync = build_sync(groups.settings, groups.learner, groups.rollouts, groups.gpu_of, groups.log)
        self._awake = True

    def push(self) -> None:
        """Send the learner's weights to every rollout engine, unless the engines hold them already.

        The first call checks that an update reaches every parameter of the engines and that sleep loses no part of the
        model.  Raises ModelError if a check fails.
        """
        if self._groups.engines and not (self._proved and self._engine_version == self.learner_version):
            self._sending = True
            if not self._proved:
                self._check_sleep()
                prove_update(self._groups, self._sync, self.learner_version, self._vocabulary)
                self._proved = True
            self._sync.push(self.learner_version, self._groups.timeout_s())
            self._sending = False
            self._engine_version, self._awake = self.learner_version, True

    def sleep(self) -> None:
        """Put colocated engines to sleep, which frees their memory and discards their weights."""
        if self._colocated and self._awake:
            if self._answers is None and not self._proved:
                self._answers = self._greedy_answers()
            self._groups.get([engine.sleep.remote() for engine in self._groups.engines], "rollout")
            self._engine_version, self._awake = UNKNOWN, False

    def _greedy_answers(self) -> list[Trajectory]:
        groups = self._groups
        longest = groups.settings.max_model_length
        return greedy_answers(groups.rollouts, len(groups.engines), self._vocabulary, longest)

    def _check_sleep(self) -> None:
        """Compare the answers of colocated engines before and after their first sleep, with the initial weights."""
        if self._answers and self._engine_version == UNKNOWN and self.learner_version == 0:
            self._sync.push(0, self._groups.timeout_s())
            check_sleep(self._answers, self._greedy_answers())

    def take_interrupted(self) -> bool:
        """Return True if a push failed midway and may have left engines with mixed weights; then forget that push."""
        interrupted, self._sending = self._sending, False
        return interrupted and not isinstance(self._sync, ObjectStoreSync)

    def forget_engines(self) -> None:
        """Mark the engines' weights as unknown, so that the next ``push`` sends weights."""
        self._engine_version = UNKNOWN
